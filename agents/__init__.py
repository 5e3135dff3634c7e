"""Policies, and what drives them through episodes."""

from agents.policy import Act, Policy, as_policy
from agents.registry import load_policy
from agents.rollout import play_episode

__all__ = ["Act", "Policy", "as_policy", "load_policy", "play_episode"]
