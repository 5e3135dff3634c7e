"""How an observation becomes chat messages, one layout a file."""

from __future__ import annotations

from collections.abc import Callable

from atommem_env.errors import SettingError
from atommem_env.prompts import public_code, shared_prefix, terse
from atommem_env.types import EpisodeSettings, Message, Observation

Layout = Callable[[Observation, EpisodeSettings], list[Message]]

_LAYOUTS: dict[str, Layout] = {"shared_prefix": shared_prefix.messages, "terse": terse.messages}


def get_layout(name: str) -> Layout:
    """The layout of that name: `shared_prefix`, `terse`, or `public_code:PATH` with your checkout of AtomMem's public code.

    Raises:
        SettingError: there is none, or the words of `public_code` cannot be read.
    """
    kind, _, path = name.partition(":")
    if kind == "public_code":
        return public_code.read(path).messages
    if name not in _LAYOUTS:
        raise SettingError(f"layout must be one of {[*_LAYOUTS, 'public_code:PATH']}, got {name!r}.")
    return _LAYOUTS[name]
