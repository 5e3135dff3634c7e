"""Figures of training's speed, each against a peer in the same run."""
