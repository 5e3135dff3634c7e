"""Runs to look at: episodes as a page for a browser."""
