"""How an observation becomes chat messages, one layout a file."""

from __future__ import annotations

from collections.abc import Callable

from atommem_env.plugins import find_function
from atommem_env.prompts import public_code, shared_prefix, terse
from atommem_env.types import EpisodeSettings, Message, Observation

Layout = Callable[[Observation, EpisodeSettings], list[Message]]

_LAYOUTS: dict[str, Layout] = {"shared_prefix": shared_prefix.messages, "terse": terse.messages}


def get_layout(layout: str | Layout) -> Layout:
    """The layout of that name: `shared_prefix`, `terse`, `public_code:PATH` with your checkout of AtomMem's public code, or
    `module:attribute` of a function of one's own; or the function itself.

    Raises:
        SettingError: there is none, or the words of `public_code` cannot be read.
        PluginError: `module:attribute` names nothing.
    """
    if isinstance(layout, str):
        kind, _, path = layout.partition(":")
        if kind == "public_code":
            return public_code.read(path).messages
    expected = "public_code:PATH, module:attribute, or a function (observation, settings) -> messages"
    return find_function(layout, _LAYOUTS, "layout", expected)
