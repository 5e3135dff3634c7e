"""AtomMem: an environment in which a language model manages its own memory.

>>> import gymnasium as gym
>>> import atommem_env
>>> env = gym.make("AtomMem-Synthetic", durability="off")
>>> observation, info = env.reset(seed=0)
>>> observation["phase"]
'read'
"""

from typing import Any

from gymnasium.envs.registration import register

from atommem_env.episode import Episode
from atommem_env.types import EpisodeSettings

__all__ = ["ENVIRONMENTS", "Episode", "EpisodeSettings"]

# What the bare id of each environment stands for; the dynamics are the paper's, but for chunks that fit short documents.
ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "HotpotQA": {"source": "hotpotqa"},
    "2WikiMultiHopQA": {"source": "2wikimultihopqa"},
    "MuSiQue": {"source": "musique"},
    "Synthetic": {"source": "synthetic", "chunk_tokens": 128},
    "Files": {"source": "files"},
    "Custom": {"chunk_tokens": 128},  # with source=: tasks of one's own
}

for _name, _kwargs in ENVIRONMENTS.items():
    for _id in (f"AtomMem-{_name}", f"AtomMem/{_name}-v0"):
        register(
            _id,
            entry_point="atommem_env.env:AtomMemEnv",
            vector_entry_point="atommem_env.vector:AtomMemVectorEnv",
            kwargs=_kwargs,
        )
