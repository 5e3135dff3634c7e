"""The space of all texts."""

from __future__ import annotations

import string
from typing import Any

import gymnasium as gym
import numpy as np

_ALPHABET = np.array(list(string.ascii_letters + string.digits + string.punctuation + " \n"))


class Text(gym.Space[str]):
    """Every `str`.

    `gymnasium.spaces.Text` has an alphabet and a maximum length; the output of a language model has neither.
    """

    def __init__(self, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(shape=None, dtype=None, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def sample(self, mask: None = None, probability: None = None) -> str:
        """A text of 0 to 99 printable characters."""
        if mask is not None or probability is not None:
            raise gym.error.Error("Text.sample takes neither mask nor probability.")
        return "".join(self.np_random.choice(_ALPHABET, size=int(self.np_random.integers(100))))

    def contains(self, x: Any) -> bool:
        return isinstance(x, str)

    def to_jsonable(self, sample_n: Any) -> list[str]:
        return list(sample_n)

    def from_jsonable(self, sample_n: list[Any]) -> list[str]:
        return [str(sample) for sample in sample_n]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Text)

    def __repr__(self) -> str:
        return "Text()"
