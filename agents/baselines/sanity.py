"""Sanity policies: they understand nothing and must score near zero. Where one scores more, the environment has a hole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agents.policy import Act
from agents.prompting import render_reply
from atommem_env.types import EpisodeSettings, Observation, Operation, OperationKind, Phase, Task


@dataclass(frozen=True, slots=True)
class Silent:
    """Says nothing at all."""

    settings: EpisodeSettings
    name: str = "silent"
    privileged: bool = False

    def begin(self, seed: int, task: Task | None) -> Act:
        return lambda observation: ""


@dataclass(frozen=True, slots=True)
class Constant:
    """Gives the same answer to every question; by default the most frequent gold of the datasets."""

    settings: EpisodeSettings
    answer: str = "yes"
    privileged: bool = False

    @property
    def name(self) -> str:
        return f"constant={self.answer}"

    def begin(self, seed: int, task: Task | None) -> Act:
        reply = render_reply(self.settings, Operation(OperationKind.ANSWER, self.answer))
        return lambda observation: reply if observation["phase"] == Phase.ANSWER else ""


@dataclass(frozen=True, slots=True)
class Random:
    """Random operations with random words of what it sees."""

    settings: EpisodeSettings
    name: str = "random"
    privileged: bool = False

    def begin(self, seed: int, task: Task | None) -> Act:
        rng = np.random.default_rng(seed)

        def words(observation: Observation, most: int) -> str:
            seen = " ".join([observation["chunk"], observation["questions"], observation["retrieved"]]).split()
            start = int(rng.integers(len(seen)))
            return " ".join(seen[start : start + 1 + int(rng.integers(most))])

        def act(observation: Observation) -> str:
            kinds = rng.choice(list(OperationKind), size=int(rng.integers(1, 6)))
            operations = [
                Operation(OperationKind(kind), words(observation, 12), f"m{rng.integers(1, 40)}") for kind in kinds
            ]
            return "".join(render_reply(self.settings, operation) for operation in operations)

        return act


@dataclass(frozen=True, slots=True)
class Spam:
    """All that tricked the public code of AtomMem: hundreds of entries, answers in every turn."""

    settings: EpisodeSettings
    name: str = "spam"
    privileged: bool = False

    def begin(self, seed: int, task: Task | None) -> Act:
        def act(observation: Observation) -> str:
            seen = (observation["chunk"] or observation["retrieved"]).split()
            pieces = [" ".join(seen[start : start + 8]) for start in range(0, len(seen), 8)][:200]
            operations = [Operation(OperationKind.CREATE, piece) for piece in pieces]
            operations += [
                Operation(OperationKind.UPDATE, observation["questions"], f"m{number}") for number in range(3)
            ]
            operations += [Operation(OperationKind.READ, observation["questions"])] * 5
            operations += [Operation(OperationKind.ANSWER, text) for text in ("yes", "no", "unknown", " ".join(seen))]
            return "".join(render_reply(self.settings, operation) for operation in operations)

        return act
