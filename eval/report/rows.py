"""The rows of a report: runs that are alike but for the seed, by environment."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import atommem_env  # noqa: F401  (registers the environments)
from eval.compare import Run
from eval.metrics import summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A method's figures on one dataset in a paper."""

    paper: str
    source: str
    model: str
    metric: str  # "EM" or "judge"
    method: str
    policy: str | None = None  # our baseline of the same method
    settings: dict[str, Any] = field(default_factory=dict)  # that it has to have
    drawn: bool = False  # also without such a baseline
    cost: dict[str, float] = field(default_factory=dict)  # of one task; {}: not given
    figures: dict[str, float]  # number of documents, or "own" → %


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone."""

    name: str  # no other row of the table has it
    runs: tuple[Run, ...]  # by seed
    published: tuple[Published, ...] = ()  # of the same method

    @property
    def shown(self) -> str:
        """The name, with a star where the policy is given the golds."""
        return self.name + "*" * self.numbers["privileged"]

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The episodes of all runs."""
        return [record for run in self.runs for record in run.records]

    @cached_property
    def numbers(self) -> dict[str, Any]:
        """What `summarise` says of all episodes, and `privileged`, `seconds`, `cached_tokens` and, if judged, `pass_rate`."""
        summaries = [run.summary or {} for run in self.runs]
        spent = {
            name: sum(summary[name] * summary["episodes"] for summary in summaries) / len(self.records)
            for name in ("seconds", "cached_tokens")
        }
        judged = [judgement(run) for run in self.runs]
        clear = sum(found["pass"] + found["fail"] for found in judged if found)
        rate = sum(found["pass"] for found in judged if found) / clear if all(judged) and clear else None
        return {**summarise(self.records), **spent, "privileged": summaries[0]["privileged"], "pass_rate": rate}


@dataclass(frozen=True, slots=True)
class Environment:
    """The rows of one table."""

    title: str
    family: str  # those that differ from it in their number of documents alone have the same
    settings: dict[str, Any]  # of all its rows
    rows: tuple[Row, ...]  # policies without the golds first, best first
    published: tuple[Published, ...]  # on its dataset

    @property
    def documents(self) -> int | None:
        """In each context; None: the environment does not set it."""
        return self.settings.get("num_docs")

    @property
    def beside(self) -> list[tuple[Published, float]]:
        """The exact match [%] published for its number of documents."""
        place = str(self.documents)
        return [(one, one.figures[place]) for one in self.published if one.metric == "EM" and place in one.figures]


def judgement(run: Run) -> dict[str, Any] | None:
    """What `atommem judge` found."""
    path = run.folder / "judge.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def slug(text: str) -> str:
    """A text as part of a file's name.

    >>> slug("AtomMem-HotpotQA, 200 documents")
    'atommem-hotpotqa-200-documents'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def plain(value: object) -> str:
    """A setting as people write it.

    >>> plain(["create", "read"]), plain(None), plain(True), plain(0.25)
    ('create, read', 'none', 'true', '0.25')
    """
    if isinstance(value, list):
        return ", ".join(map(plain, value)) or "none"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture and the numbers that it shows."""

    name: str  # of its files
    of: str  # the environment's title; "": of more than one
    caption: str
    figure: Figure
    drawn: list[dict[str, Any]]
