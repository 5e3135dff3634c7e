"""Policies, and what drives them through episodes."""

from atommem_env.packages import check_packages

check_packages("agents")

from agents.policy import Act, Policy, as_policy  # noqa: E402
from agents.registry import load_policy  # noqa: E402
from agents.rollout import play_episode  # noqa: E402

__all__ = ["Act", "Policy", "as_policy", "load_policy", "play_episode"]
