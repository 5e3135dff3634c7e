"""`atommem report`: runs as tables and plots, next to published figures.

    atommem report runs/table

Finds every finished run in the given folders and writes into `--out`: `report.md` (settings and results), `results.csv` (every
number, a line for each run), `results.tex` (the tables, for \\input in a paper that uses booktabs) and `plots/` (each figure
with its numbers as CSV). The same runs give the same bytes of all text files.

A table has the runs that read the same documents in the same steps. A row has those that differ only in their seed: their
episodes are pooled. The memory of a policy (its operations, size, retrieval, embedder) may differ from row to row.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from atommem_env import ENVIRONMENTS
from atommem_env.errors import MissingDependency, SettingError
from atommem_env.terminal import escape
from atommem_env.types import ABLATIONS, EpisodeSettings
from eval.compare import Run, read_run
from eval.report.plots import draw, save
from eval.report.rows import Environment, Published, Row, plain
from eval.report.tables import csv_text, latex, markdown, results
from eval.run_folder import write_atomic

# Settings in which rows of one table may differ: those of the prompt, of sampling and of the memory.
_ROW_SETTINGS = {
    *("layout", "temperature", "max_new_tokens", "thinking"),
    *("embedder", "ablation", "dialect", "operations", "operations_per_reply", "scratchpad", "scratchpad_tokens"),
    *("top_k", "memory_tokens", "retrieval", "capacity"),
}
_DEFAULTS: dict[str, Any] = json.loads(json.dumps(EpisodeSettings().record()))
_log = logging.getLogger(__name__)
_PUBLISHED = Path(__file__).with_name("published.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """The runs to report."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN_OR_FOLDER")]
    """Run folders that `atommem eval` wrote, or folders that contain them."""
    out: Path | None = None
    """Folder of the report. Default: report/ in the first folder given."""


def find_runs(folders: Sequence[Path]) -> tuple[list[Run], list[Path]]:
    """The finished runs in some folders, sorted by path, and the folders of the unfinished ones.

    Raises:
        SettingError: there is no finished run, or another version wrote one.
    """
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        raise SettingError(f"There is no folder {', '.join(missing)}; give folders that `atommem eval` wrote.")
    candidates = {path.parent.resolve(): path.parent for folder in folders for path in folder.rglob("episodes.jsonl")}
    paths = [candidates[path] for path in sorted(candidates) if (path / "config.json").is_file()]
    finished = [path for path in paths if (path / "summary.json").is_file()]
    if not finished:
        raise SettingError(
            f"No finished run in {', '.join(map(str, folders))}: expected folders with summary.json, as `atommem eval` writes it."
        )
    return [read_run(path) for path in finished], [path for path in paths if path not in finished]


def group(runs: Sequence[Run]) -> list[Environment]:
    """The tables of a report.

    Raises:
        SettingError: two runs have the same configuration and seed, but different episodes.
    """
    tables = [(_table_settings(members[0]), members) for members in _group_by(runs, _table_settings)]
    titles = distinct([(_title(members), settings) for settings, members in tables])
    families = distinct([(settings["env_id"], settings | {"num_docs": None}) for settings, _ in tables])
    environments = []
    for title, family, (settings, members) in zip(titles, families, tables, strict=True):
        published = read_published(settings["env_id"])
        groups = _group_by(members, _row_settings)
        names = distinct([(same[0].label, _row_settings(same[0])) for same in groups])
        rows = [
            Row(name, _unique_seeds(same), tuple(one for one in published if _is_same_method(same[0], one)))
            for name, same in zip(names, groups, strict=True)
        ]
        rows.sort(key=lambda row: (row.numbers["privileged"], -(row.numbers["em"] or 0.0), row.name))
        environments.append(Environment(title, family, settings, tuple(rows), published))
    return sorted(environments, key=lambda one: (one.family, one.documents or 0, one.title))


def _table_settings(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.settings.items() if not _is_row_setting(name)}


def _is_row_setting(name: str) -> bool:
    return name in _ROW_SETTINGS or name.startswith("fingerprints.")


def _row_settings(run: Run) -> dict[str, Any]:
    """Without those that its ablation implies."""
    implied = ABLATIONS.get(run.settings.get("ablation", ""), {})
    own = {name: value for name, value in run.settings.items() if _is_row_setting(name) and name not in implied}
    return {"label": run.label, "policy": run.config["policy"], **own}


def _title(runs: Sequence[Run]) -> str:
    """The environment's name in all the runs; its id if they differ."""
    names = {run.environment for run in runs}
    return names.pop() if len(names) == 1 else str(runs[0].config["env_id"])


def _group_by(runs: Sequence[Run], settings: Callable[[Run], dict[str, Any]]) -> list[list[Run]]:
    """The runs in groups with equal settings."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(settings(run), sort_keys=True), []).append(run)
    return list(groups.values())


def distinct(named: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Distinct names: those that occur more than once get the settings in which they differ, except defaults.

    >>> distinct([("rag", {"top_k": 6}), ("rag", {"top_k": 12}), ("mine", {"top_k": 12})])
    ['rag', 'rag (top_k=12)', 'mine']
    """

    def differing(name: str, settings: dict[str, Any]) -> Iterator[str]:
        others = [other for same, other in named if same == name]
        for key, value in settings.items():
            if any(other.get(key) != value for other in others) and (key, value) not in _DEFAULTS.items():
                yield f"{key}={plain(value)}"

    return [f"{name} ({', '.join(differing(name, own))})".removesuffix(" ()") for name, own in named]


def _unique_seeds(runs: Sequence[Run]) -> tuple[Run, ...]:
    """One run for each seed; copies of a run count once."""
    by_seed: dict[int, Run] = {}
    for run in runs:
        other = by_seed.setdefault(run.config["seed"], run)
        if run.records != other.records:
            raise SettingError(
                f"{other.folder} and {run.folder} have the same configuration and seed {run.config['seed']}, but different "
                "episodes: they cannot be pooled. Report one of them, or give one another --label."
            )
    return tuple(by_seed[seed] for seed in sorted(by_seed))


def read_published(env_id: str) -> tuple[Published, ...]:
    """The published figures on an environment's dataset in `published.toml`; none for a user-defined environment."""
    dataset = ENVIRONMENTS.get(re.sub(r"^AtomMem[-/]|-v\d+$", "", env_id), {}).get("source")
    papers = tomllib.loads(_PUBLISHED.read_text(encoding="utf-8"))["papers"]
    methods = [paper | method for paper in papers for method in paper["methods"] if dataset in method]
    names = [field.name for field in dataclasses.fields(Published)]
    return tuple(
        Published(**{name: method[name] for name in names if name in method}, figures=method[dataset])
        for method in methods
    )


def _is_same_method(run: Run, published: Published) -> bool:
    name, _, model = run.config["policy"].partition("@")
    return bool(model) and name == published.policy and published.settings.items() <= run.settings.items()


def report(folders: Sequence[Path], out: Path) -> list[Environment]:
    """Writes the report of all finished runs in `folders` into `out`; without plots, and a warning, where matplotlib is missing.

    Raises:
        SettingError: as in `find_runs` and `group`.
    """
    runs, unfinished = find_runs(folders)
    environments = group(runs)
    try:
        plots = draw(environments)
    except MissingDependency as error:
        _log.warning("The report has no plots. %s", error)
        plots = []
    root = os.path.commonpath([folder.resolve().parent for folder in folders])

    def relative(folder: Path) -> str:
        return Path(os.path.relpath(folder.resolve(), root)).as_posix()

    out.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        (out / "plots").mkdir(exist_ok=True)
        save(plot, out / "plots")
        write_atomic(out / "plots" / f"{plot.name}.csv", csv_text(plot.data))
    write_atomic(out / "report.md", markdown(environments, [relative(folder) for folder in unfinished], plots))
    write_atomic(out / "results.csv", csv_text(results(environments, relative)))
    write_atomic(out / "results.tex", latex(environments))
    return environments


def main(config: ReportConfig) -> None:
    """Turn runs into tables (Markdown, CSV, LaTeX) and plots, next to published figures."""
    if not config.runs:
        raise SettingError(
            "Expected at least one run folder to report, got none: atommem report RUN_OR_FOLDER … [--out FOLDER]"
        )
    out = config.out or config.runs[0] / "report"
    environments = report(config.runs, out)
    rows = [row for environment in environments for row in environment.rows]
    runs = sum(len(row.runs) for row in rows)
    counts = f"Runs: {runs:,}; rows: {len(rows):,}; tables: {len(environments):,}."
    plots = ", plots/" if (out / "plots").is_dir() else ""
    Console().print(f"{counts}\nWritten to [bold]{escape(str(out))}[/]: report.md, results.csv, results.tex{plots}.")
