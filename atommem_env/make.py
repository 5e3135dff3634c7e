"""Environments by their ids."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec, load_env_creator

from atommem_env.env import AtomMemEnv
from atommem_env.errors import SettingError
from atommem_env.plugins import load_module, suggest


def make_env(env_id: str, **options: Any) -> AtomMemEnv:
    """An environment by `gym.make`, without the wrappers.

    Args:
        env_id: of one that is registered, or `module:ID` of one that a module of the working folder registers.

    Raises:
        SettingError: there is no such environment, it is not one of ours, or an option cannot work.
        PluginError: there is no such module.
    """
    made = gym.make(find_spec(env_id), **options).unwrapped
    if not isinstance(made, AtomMemEnv):
        raise _of_others(env_id, type(made))
    return made


def find_spec(env_id: str) -> EnvSpec:
    """What Gymnasium registered under an id, or under `module:ID` once the module is imported.

    Raises:
        SettingError: there is no such environment, or another class than `AtomMemEnv` makes it.
        PluginError: there is no such module.
    """
    module, colon, name = env_id.rpartition(":")
    if colon:
        load_module(module)
    try:
        spec = gym.spec(name)
    except gym.error.Error as error:
        ours = sorted(known for known in gym.registry if known.startswith("AtomMem-"))
        raise SettingError(
            f"There is no environment {env_id!r}{suggest(name, gym.registry) or '.'} There are {', '.join(ours)}, and module:ID "
            "of one that your module registers."
        ) from error
    made = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
    if isinstance(made, type) and not issubclass(made, AtomMemEnv):
        raise _of_others(env_id, made)
    return spec


def _of_others(env_id: str, made: type) -> SettingError:
    return SettingError(f"{env_id} must be an environment of AtomMem, got {made.__name__}.")
