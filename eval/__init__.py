"""Evaluation of policies on environments, as tables that others can reproduce."""
