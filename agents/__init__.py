"""Policies, the models and methods behind them, and what plays episodes with them."""

from atommem_env.packages import check_packages

check_packages("agents")

from agents.chat_policy import ChatModel, Sampling  # noqa: E402
from agents.policy import Act, Policy, as_policy  # noqa: E402
from agents.prompting import Ask, Method, render_reply  # noqa: E402
from agents.registry import load_policy  # noqa: E402
from agents.rollout import play_episode, play_episode_async  # noqa: E402

__all__ = [
    "Act",
    "Ask",
    "ChatModel",
    "Method",
    "Policy",
    "Sampling",
    "as_policy",
    "load_policy",
    "play_episode",
    "play_episode_async",
    "render_reply",
]
