"""Policies that need no training: bounds, sanity policies that must score near zero, and methods that prompt a model."""
