"""Policies that need no training: bounds, cheats that must not pay, and methods that prompt a model as it comes."""
