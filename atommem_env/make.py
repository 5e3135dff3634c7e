"""Environments by their ids."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from atommem_env import ENVIRONMENTS
from atommem_env.errors import SettingError
from atommem_env.plugins import suggest


def make_by_id(env_id: str, **options: Any) -> gym.Env[Any, Any]:
    """`gym.make`, where an id that does not exist is a `SettingError` which lists those that do.

    Raises:
        SettingError: no environment has this id.
        Exception: what the environment raises when it is made.
    """
    try:
        return gym.make(env_id, **options)
    except gym.error.Error as error:
        raise unknown_id(env_id) from error
    except ModuleNotFoundError as error:
        if ":" in env_id:  # "module:id"
            raise unknown_id(env_id) from error
        raise


def unknown_id(env_id: str) -> SettingError:
    """The error of an id that no environment has."""
    ids = [f"AtomMem-{name}" for name in ENVIRONMENTS]
    near = suggest(env_id, [*ids, *(f"AtomMem/{name}-v0" for name in ENVIRONMENTS)]) or "."
    return SettingError(
        f"No environment is called {env_id!r}{near} There are: {', '.join(ids)}, and what a module of yours registers with "
        "Gymnasium, as module:id."
    )
