"""Policies that need no training: bounds, and cheats that must not pay."""
