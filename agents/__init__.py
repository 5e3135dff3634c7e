"""Policies, the models and methods behind them, and what plays episodes with them."""

from agents.chat_policy import ChatModel, Sampling
from agents.policy import Act, Policy, as_policy
from agents.prompting import Ask, Method, render_reply
from agents.registry import load_policy
from agents.rollout import play_episode, play_episode_async

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
