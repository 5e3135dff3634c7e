"""How an observation becomes chat messages, one layout a file."""

from __future__ import annotations

from collections.abc import Callable

from atommem_env.errors import SettingError
from atommem_env.prompts import shared_prefix, terse
from atommem_env.types import EpisodeSettings, Message, Observation

Layout = Callable[[Observation, EpisodeSettings], list[Message]]

_LAYOUTS: dict[str, Layout] = {"shared_prefix": shared_prefix.messages, "terse": terse.messages}


def get_layout(name: str) -> Layout:
    """The layout of that name.

    Raises:
        SettingError: there is none.
    """
    if name not in _LAYOUTS:
        raise SettingError(f"layout must be one of {sorted(_LAYOUTS)}, got {name!r}.")
    return _LAYOUTS[name]
