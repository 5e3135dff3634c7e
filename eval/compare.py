"""`atommem compare`: two runs on the same episodes, question by question.

    atommem compare runs/rag runs/mine

The runs must have asked the same questions of the same tasks. They may differ in policy, model, settings and documents; the
differences are reported. Questions of a task are correlated, so the interval resamples tasks, and the significance test flips
the signs of tasks: McNemar's test on questions would call differences significant that are not.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from atommem_env.env import SETTING_NAMES, AtomMemEnv
from atommem_env.errors import SettingError
from atommem_env.terminal import escape, printable
from eval.metrics import SCHEMA_VERSION, bootstrap_ci95
from eval.run_folder import CONFIG_FIELDS, read_config, read_json, read_records, require_fields, write_atomic

_FLIPS = 10_000
_NO_EFFECT = ("durability",)  # options that do not change the episodes


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig:
    """The two runs to compare."""

    a: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_A")]
    """Run folder of the baseline, written by `atommem eval`."""
    b: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_B")]
    """Run folder to compare with the baseline; a positive difference is in its favour."""
    out: Path | None = None
    """JSON file for the numbers."""


@dataclass(frozen=True, slots=True)
class Run:
    """The contents of a run folder."""

    folder: Path
    config: dict[str, Any]  # config.json
    records: tuple[dict[str, Any], ...]  # the finished episodes, by number
    summary: dict[str, Any] | None  # summary.json; None: the run is not finished

    @property
    def label(self) -> str:
        """The run's name in tables; the policy's name if the run is not finished."""
        return printable(str(self.summary["label"] if self.summary else self.config["policy"]))

    @property
    def environment(self) -> str:
        """The environment's name in tables; its id if the run is not finished."""
        return printable(str((self.summary or {}).get("environment", self.config["env_id"])))

    @property
    def settings(self) -> dict[str, Any]:
        """All settings by name, except policy, label, seed and number of episodes."""
        values = {name: self.config[name] for name in ("env_id", "layout")}
        values["embedder"] = inspect.signature(AtomMemEnv).parameters["embedder"].default
        for name in ("sampling", "options", "settings"):
            values |= self.config[name]
        for name in ("data", "fingerprints"):  # of schema 3
            values |= {f"{name}.{part}": digest[:12] for part, digest in self.config.get(name, {}).items()}
        return {name: value for name, value in values.items() if name not in _NO_EFFECT}


def read_run(folder: Path) -> Run:
    """The run in `folder`, finished or not.

    Raises:
        SettingError: the folder has no run, or one without a finished episode, or one that another version wrote.
    """
    config_path, lines_path = folder / "config.json", folder / "episodes.jsonl"
    if not (config_path.is_file() and lines_path.is_file()):
        raise SettingError(
            f"{folder} is not a run folder: expected config.json and episodes.jsonl in it; name a folder that "
            "`atommem eval --out` wrote."
        )
    config = read_config(config_path)
    if config.get("schema_version") != SCHEMA_VERSION:
        raise SettingError(
            f"{folder} was written in schema {config.get('schema_version')}, but this version reads {SCHEMA_VERSION}; run "
            "`atommem eval` again, into another folder."
        )
    require_fields(config, CONFIG_FIELDS, str(config_path))
    records = sorted(read_records(lines_path), key=lambda record: record["episode"])
    if not records:
        raise SettingError(
            f"No episode in {folder} is finished yet; wait, or resume the run with `atommem eval --resume`."
        )
    summary_path = folder / "summary.json"
    summary = read_json(summary_path) if summary_path.is_file() else None
    if summary is not None:
        require_fields(summary, {"label": str}, str(summary_path))
    return Run(folder, config, tuple(records), summary)


def differences(first: dict[str, Any], second: dict[str, Any]) -> dict[str, list[Any]]:
    """The values in which two dictionaries differ, by name; "not given" where one lacks the name.

    >>> differences({"top_k": 6, "layout": "terse"}, {"top_k": 12, "layout": "terse"})
    {'top_k': [6, 12]}
    """
    names = dict.fromkeys((*first, *second))
    values = {name: [side.get(name, "not given") for side in (first, second)] for name in names}
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}


def sign_flip_p(values: Sequence[float]) -> float:
    """Two-sided p-value of a paired permutation test: how often a sum is as far from 0 when each sign is drawn at random.

    Under the null hypothesis each task's difference could equally have had the other sign. 10,000 draws with a fixed seed; the
    observed outcome counts as one of them, so that p is never 0 (Phipson and Smyth, 2010).

    Args:
        values: [C] for each task, how many more questions one run got right than the other.

    Three tasks that all favour one run are no evidence: two of the eight combinations of signs are as extreme.

    >>> abs(sign_flip_p([1.0, 2.0, 1.0]) - 2 / 8) < 0.01, sign_flip_p([0.0, 0.0])
    (True, 1.0)
    """
    size, count = np.unique(np.abs(np.asarray(values, dtype=float)), return_counts=True)
    # Of n tasks with the same size of difference only the number of positive signs matters: a binomial number.
    positive = np.random.default_rng(0).binomial(count, 0.5, size=(_FLIPS, len(count)))
    sums = np.abs((2 * positive - count) @ size)
    return float((1 + (sums >= abs(sum(values)) - 1e-9).sum()) / (1 + _FLIPS))


def compare(first: Run, second: Run) -> dict[str, Any]:
    """Compares run B (`second`) with run A (`first`) on the episodes that both have finished.

    Returns:
        `runs` (A's and B's label and folder), `settings_that_differ`, `episodes`, `tasks`, `left_out` (finished episodes that
        the other run lacks, of A and of B), `all`, `by_kind` and `by_hops`. For each group of questions: `questions`, `em` (of A
        and of B), `difference` (B − A) with `ci95` (None: one task only), `won` (only B is right), `lost` (only A), `both` and
        `neither`; `all` also has `p_value`, see `sign_flip_p`.

    Raises:
        SettingError: an episode is not of the same task, seed and questions in both.
    """
    mine, theirs = ({record["episode"]: record for record in run.records} for run in (first, second))
    pairs = [(mine[number], theirs[number]) for number in mine if number in theirs]
    if not pairs:
        raise SettingError(f"{first.folder} and {second.folder} have no finished episode in common.")
    for one, other in pairs:
        keys = [
            (line["task_id"], line["seed"], [question["id"] for question in line["questions"]]) for line in (one, other)
        ]
        if keys[0] != keys[1]:
            differ = [
                f"{name} {a!r} and {b!r}" for name, (a, b) in differences(first.settings, second.settings).items()
            ]
            raise SettingError(
                f"Expected the same episodes in {first.folder} and {second.folder}; number {one['episode']} is (task, seed, "
                f"questions) {_shorten(keys[0])} in one, {_shorten(keys[1])} in the other. Use the same environment, "
                f"--seed and --questions for both; they differ in: {', '.join(differ) or 'the seed only'}."
            )
        digests = {line["task_digest"] for line in (one, other) if line.get("task_digest")}
        if len(digests) > 1 and not _read_otherwise(first, second):
            raise SettingError(
                f"Expected the same questions, golds and documents in {first.folder} and {second.folder}; those of episode "
                f"{one['episode']}, task {one['task_id']}, differ, although their ids are the same: the data were replaced "
                "between the runs. Play one of them again."
            )
    kinds = sorted({question["kind"] for one, _ in pairs for question in one["questions"]})
    hops = sorted({question["hops"] for one, _ in pairs for question in one["questions"]})
    totals: dict[str, float] = {}
    for one, other in pairs:
        gained = sum(after - before for before, after in _graded(one, other))
        totals[one["task_id"]] = totals.get(one["task_id"], 0.0) + gained
    return {
        "runs": [{"label": run.label, "folder": str(run.folder)} for run in (first, second)],
        "settings_that_differ": differences(first.settings, second.settings),
        "episodes": len(pairs),
        "tasks": len(totals),
        "left_out": [len(mine) - len(pairs), len(theirs) - len(pairs)],
        "all": {**_group(pairs), "p_value": round(sign_flip_p(list(totals.values())), 4)},
        "by_kind": {kind: _group(pairs, "kind", kind) for kind in kinds},
        "by_hops": {str(number): _group(pairs, "hops", number) for number in hops},
    }


def _read_otherwise(first: Run, second: Run) -> bool:
    """Whether the runs read other documents on purpose: by an option of the task source, and from the same data."""
    if first.config.get("data") != second.config.get("data"):
        return False
    changed = differences(first.config["options"], second.config["options"])
    return bool(set(changed) - SETTING_NAMES - {"embedder", "durability"})


def _group(
    pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], name: str = "", value: object = None
) -> dict[str, Any]:
    """The numbers over the questions whose field `name` is `value`; over all questions without a `name`."""
    gains, weights, clusters = [], [], []
    ems: list[tuple[float, float]] = []  # of A and of B, by question
    for one, other in pairs:
        both = _graded(one, other, name, value)
        if both:
            gains.append(sum(after - before for before, after in both) / len(both))
            weights.append(len(both))
            clusters.append(one["task_id"])
        ems += both
    count = len(ems)
    means = [round(sum(pair[side] for pair in ems) / count, 4) if ems else None for side in (0, 1)]
    return {
        "questions": count,
        "em": means,
        "difference": round(sum(after - before for before, after in ems) / count, 4) if ems else None,
        "ci95": _interval(gains, weights, clusters),
        "won": sum(after > before for before, after in ems),
        "lost": sum(after < before for before, after in ems),
        "both": sum(after == before > 0 for before, after in ems),
        "neither": sum(after == before == 0 for before, after in ems),
    }


def _graded(
    one: dict[str, Any], other: dict[str, Any], name: str = "", value: object = None
) -> list[tuple[float, float]]:
    """The exact match of both runs for each graded question of an episode whose field `name` is `value`."""
    return [
        (mine["em"], theirs["em"])
        for mine, theirs in zip(one["questions"], other["questions"], strict=True)
        if (not name or mine[name] == value) and None not in (mine["em"], theirs["em"])
    ]


def _interval(values: Sequence[float], weights: Sequence[float], clusters: Sequence[str]) -> list[float] | None:
    """The 95 % interval of a difference; None for one task, or none."""
    if len(set(clusters)) < 2:
        return None
    return [round(end, 4) for end in bootstrap_ci95(values, weights, clusters, bounds=(-1.0, 1.0))]


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:119] + "…"


def comparison_table(result: dict[str, Any]) -> Table:
    """The comparison as a table of at most 80 columns."""
    first, second = (escape(run["label"]) for run in result["runs"])
    table = Table(
        title=f"A: {first}   B: {second}",
        caption="EM in %. B − A with its interval, tasks resampled. won: only B is right;\n"
        f"lost: only A; tied: both or neither. p = {result['all']['p_value']:.4f}: paired permutation\n"
        f"test, two-sided, signs of {result['tasks']:,} tasks' differences drawn {_FLIPS:,} times.",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("questions", no_wrap=True)
    for heading in ("n", "EM of A", "of B", "B − A", "95 % CI", "won", "lost", "tied"):
        table.add_column(heading, justify="right", no_wrap=True)
    groups = [("all", result["all"])]
    for title, by in (("", result["by_kind"]), ("hops: ", result["by_hops"])):
        groups += [(title + name, group) for name, group in by.items()] if len(by) > 1 else []
    for name, group in groups:
        table.add_row(
            escape(name),
            f"{group['questions']:,}",
            *("–" if em is None else f"{100 * em:.1f}" for em in group["em"]),
            _percentage_points(group["difference"]),
            ", ".join(map(_percentage_points, group["ci95"])) if group["ci95"] else "–",
            *(f"{count:,}" for count in (group["won"], group["lost"], group["both"] + group["neither"])),
            end_section=name == "all",
        )
    return table


def _percentage_points(share: float) -> str:
    """A difference in percentage points, with its sign.

    >>> _percentage_points(0.125), _percentage_points(-0.02), _percentage_points(0.0)
    ('+12.5', '−2.0', '0.0')
    """
    return f"{100 * share:+.1f}".replace("-", "−") if round(share, 3) else "0.0"


def main(config: CompareConfig) -> None:
    """Compare two runs on the same episodes: questions won and lost, and the significance of the difference."""
    result = compare(read_run(config.a), read_run(config.b))
    console = Console()
    console.print(comparison_table(result))
    console.print(f"{result['episodes']:,} episodes of {result['tasks']:,} tasks, paired.", highlight=False)
    for name, (a, b) in result["settings_that_differ"].items():
        console.print(
            f"The runs also differ in [bold]{name}[/]: {escape(repr(a))} and {escape(repr(b))}.", highlight=False
        )
    for run, count in zip("AB", result["left_out"], strict=True):
        if count:
            console.print(f"Left out: {count:,} episodes that only {run} has finished.", highlight=False)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(config.out, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        console.print(f"Written to [bold]{escape(str(config.out))}[/].")
