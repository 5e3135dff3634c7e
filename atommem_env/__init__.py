"""AtomMem: an environment in which a language model manages its own memory.

>>> import gymnasium as gym
>>> import atommem_env
>>> env = gym.make("AtomMem-Synthetic")
>>> observation, info = env.reset(seed=0)
>>> observation["phase"]
'read'

The rest of the Python API is here as well, imported on first use: `evaluate`, `play_episode`, `collect`, `load_policy`,
`render_reply`, the checkers of user-defined parts, and the types of the data contract.
"""

from typing import Any

from gymnasium.envs.registration import register

from atommem_env.usage_reports import switch_off_usage_reports

__all__ = ["ENVIRONMENTS"]

switch_off_usage_reports()

# The arguments of each environment; the dynamics are the paper's, except for smaller chunks where documents are short.
ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "HotpotQA": {"source": "hotpotqa"},
    "2WikiMultiHopQA": {"source": "2wikimultihopqa"},
    "MuSiQue": {"source": "musique"},
    "Synthetic": {"source": "synthetic", "chunk_tokens": 128},
    "Files": {"source": "files"},
    "Custom": {"chunk_tokens": 128},  # with source=: your own tasks
}

for _name, _kwargs in ENVIRONMENTS.items():
    for _id in (f"AtomMem-{_name}", f"AtomMem/{_name}-v0"):
        register(
            _id,
            entry_point="atommem_env.env:AtomMemEnv",
            vector_entry_point="atommem_env.vector:AtomMemVectorEnv",
            kwargs=_kwargs,
        )

# The public Python API: where each name is defined.
_DOOR = {
    "eval.api": ("evaluate", "evaluate_async", "Result"),
    "train.api": ("collect",),
    "agents.rollout": ("play_episode", "play_episode_async"),
    "agents.registry": ("load_policy",),
    "agents.policy": ("Policy",),
    "agents.models.load": ("load_model",),
    "agents.prompting": ("render_reply",),
    "agents.testing": ("check_policy",),
    "atommem_env.testing": ("check_dialect", "check_embedder", "check_env", "check_task_source"),
    "atommem_env.episode": ("Episode",),
    "atommem_env.store.memory_store": ("MemoryStore",),
    "atommem_env.errors": ("AtomMemError", "SettingError"),
    "atommem_env.types": (
        *("Document", "EpisodeSettings", "EpisodeSummary", "Evidence", "Observation", "Operation", "OperationKind"),
        *("Question", "Reply", "Rollout", "Score", "Task"),
    ),
}
_MODULES = {name: module for module, names in _DOOR.items() for name in names}
__all__ += _MODULES


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from atommem_env.packages import PACKAGES, check_packages

    package = _MODULES[name].partition(".")[0]
    if package in PACKAGES:
        check_packages(package)
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
