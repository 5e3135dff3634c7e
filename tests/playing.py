"""Runs of a policy that several tests play."""

from __future__ import annotations

import asyncio
from typing import Any

import gymnasium as gym
import numpy as np

from agents.registry import load_policy
from agents.rollout import Driver, EpisodeSpec
from atommem_env.types import Rollout

SPECS = [EpisodeSpec(index, index + 100, index + 200) for index in range(24)]


def make_driver(**options: Any) -> Driver:
    return Driver.of(gym.make("AtomMem-Synthetic", **{"split": "test", "durability": "off", "num_docs": 20, **options}))


def play(policy: str, specs: list[EpisodeSpec] = SPECS, **options: Any) -> list[Rollout]:
    driver = make_driver(**options)
    return asyncio.run(driver.run(specs, load_policy(policy, driver.settings)))


def mean_reward(rollouts: list[Rollout]) -> float:
    return float(np.mean([rollout.reward for rollout in rollouts]))
