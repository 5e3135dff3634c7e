"""The rows of a report: runs that differ only in their seed, by environment."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import atommem_env  # noqa: F401  (registers the environments)
from eval.compare import Run
from eval.metrics import summarise
from eval.run_folder import read_json

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
    policy: str | None = None  # this project's baseline of the same method
    settings: dict[str, Any] = field(default_factory=dict)  # required of that baseline
    drawn: bool = False  # whether it is drawn without such a baseline as well
    cost: dict[str, float] = field(default_factory=dict)  # of one task; {}: not given
    figures: dict[str, float]  # number of documents, or "own" → %


@dataclass(frozen=True)
class Row:
    """Runs that differ only in their seed."""

    name: str  # unique in the table
    runs: tuple[Run, ...]  # by seed
    published: tuple[Published, ...] = ()  # of the same method

    @property
    def display_name(self) -> str:
        """The name, with a star if the policy is given the golds."""
        return self.name + "*" * self.numbers["privileged"]

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The episodes of all runs."""
        return [record for run in self.runs for record in run.records]

    @cached_property
    def numbers(self) -> dict[str, Any]:
        """`summarise` of all episodes, and `privileged`, `seconds`, `cached_tokens`, `pass_rate` (None: not all judged alike)."""
        summaries = [run.summary or {} for run in self.runs]
        spent = {
            name: None
            if any(summary[name] is None for summary in summaries)
            else sum(summary[name] * summary["episodes"] for summary in summaries) / len(self.records)
            for name in ("seconds", "cached_tokens")
        }
        judged = [result for run in self.runs if (result := judgement(run))]
        judges = {(result["model"], result["prompt_version"]) for result in judged}
        questions = sum(result["pass"] + result["fail"] + result["unclear"] for result in judged)
        rate = None
        if len(judged) == len(self.runs) and len(judges) == 1 and questions:
            rate = sum(result["pass"] for result in judged) / questions
        return {**summarise(self.records), **spent, "privileged": summaries[0]["privileged"], "pass_rate": rate}


@dataclass(frozen=True, slots=True)
class Environment:
    """The rows of one table."""

    title: str
    family: str  # the same for environments that differ only in their number of documents
    settings: dict[str, Any]  # of all its rows
    rows: tuple[Row, ...]  # policies without the golds first, best first
    published: tuple[Published, ...]  # on its dataset

    @property
    def documents(self) -> int | None:
        """In each context; None: the environment does not set it."""
        return self.settings.get("num_docs")

    @property
    def published_em(self) -> list[tuple[Published, float]]:
        """The exact match [%] published for its number of documents."""
        size = str(self.documents)
        return [(one, one.figures[size]) for one in self.published if one.metric == "EM" and size in one.figures]


def judgement(run: Run) -> dict[str, Any] | None:
    """The contents of `judge.json`, which `atommem judge` writes; None: the run was not judged."""
    path = run.folder / "judge.json"
    return read_json(path) if path.is_file() else None


def slug(text: str) -> str:
    """A text as part of a file name.

    >>> slug("AtomMem-HotpotQA, 200 documents")
    'atommem-hotpotqa-200-documents'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def plain(value: object) -> str:
    """A setting as readable text.

    >>> plain(["create", "read"]), plain(None), plain(True), plain(0.25)
    ('create, read', 'none', 'true', '0.25')
    """
    if isinstance(value, list):
        return ", ".join(map(plain, value)) or "none"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure and the numbers that it shows."""

    name: str  # of its files
    of: str  # the environment's title; "": several environments
    caption: str
    figure: Figure
    data: list[dict[str, Any]]
