"""`atommem report`: runs as tables and plots, beside the figures that papers published.

    atommem report runs/table

Finds every finished run in the folders named and writes into `--out`: `report.md` (what was run, and how it went), `results.csv`
(every number, a line a run), `results.tex` (the tables, for \\input in a paper that uses booktabs) and `plots/` (each picture
with the numbers drawn beside it, as CSV). The same runs give the same bytes of all text.

A table holds the runs that read the same documents in the same steps, and a row those that are alike but for the seed: their
episodes are pooled. What a policy's memory is (its operations, size, retrieval, embedder) may differ from row to row.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape

from atommem_env import ENVIRONMENTS
from atommem_env.errors import MissingDependency, SettingError
from atommem_env.types import ABLATIONS, EpisodeSettings, OperationKind
from eval.compare import Run, read_run
from eval.metrics import SCHEMA_VERSION, summarise
from eval.run import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Settings in which rows of one table may differ: how a policy is asked, and what its memory is.
_OF_A_ROW = (
    "layout",
    "temperature",
    "max_new_tokens",
    "thinking",
    "embedder",
    "ablation",
    "dialect",
    "operations",
    "operations_per_reply",
    "scratchpad",
    "scratchpad_tokens",
    "top_k",
    "memory_tokens",
    "retrieval",
    "capacity",
)
_PUBLISHED = Path(__file__).with_name("published.toml")

# Okabe and Ito's colours, which all eyes can tell apart; black is for what others published
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # eight, so that 56 pairs of colour and marker differ
_KIND_COLOURS = {
    OperationKind.CREATE: "#0072B2",
    OperationKind.READ: "#56B4E9",
    OperationKind.UPDATE: "#E69F00",
    OperationKind.DELETE: "#D55E00",
    OperationKind.SCRATCHPAD: "#CC79A7",
    OperationKind.ANSWER: "#009E73",
}
_STAGES = {"stored": ("stored", "#56B4E9"), "retrieved": ("in view", "#0072B2"), "answered": ("answered", "#009E73")}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """What is reported."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN_OR_FOLDER")]
    """Folders that `atommem eval` wrote, or folders of such folders."""
    out: Path | None = None
    """Folder of the report. Left out: report/ in the first folder named."""


# -------------------------------------------------------------------------------------------------------- what was found


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone."""

    name: str  # in the table: the label, and what tells it from another row of that label
    runs: tuple[Run, ...]  # by seed

    @property
    def head(self) -> dict[str, Any]:
        """The summary of one of the runs, for what they have in common."""
        assert self.runs[0].summary is not None
        return self.runs[0].summary

    @property
    def shown(self) -> str:
        """The name, with a star where the policy is given the golds."""
        return self.name + ("*" if self.head["privileged"] else "")

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The episodes of all runs."""
        return [record for run in self.runs for record in run.records]

    @cached_property
    def numbers(self) -> dict[str, Any]:
        """What `summarise` says of all episodes, and their mean `seconds`, `cached_tokens` and, if judged, `pass_rate`."""
        summaries = [run.summary or {} for run in self.runs]
        spent = {
            name: sum(summary[name] * summary["episodes"] for summary in summaries) / len(self.records)
            for name in ("seconds", "cached_tokens")
        }
        judged = [_judged(run) for run in self.runs]
        clear = sum(result["pass"] + result["fail"] for result in judged if result)
        rate = sum(result["pass"] for result in judged if result) / clear if all(judged) and clear else None
        return {**summarise(self.records), **spent, "pass_rate": rate}


@dataclass(frozen=True, slots=True)
class Environment:
    """The rows of one table."""

    title: str
    env_id: str
    documents: int | None  # in each context; None: the environment does not set it
    settings: dict[str, Any]  # of all its rows
    rows: tuple[Row, ...]  # policies without the golds first, best first

    @property
    def dataset(self) -> str:
        """Which of `atommem_env.scoring.DATASETS` it is."""
        return str(ENVIRONMENTS[re.sub(r"^AtomMem[-/]|-v\d+$", "", self.env_id)]["dataset"])

    @property
    def slug(self) -> str:
        """The title as part of a file's name."""
        return slug(self.title)


@dataclass(frozen=True, slots=True)
class Published:
    """A method's figures in a paper."""

    paper: str
    source: str
    model: str
    metric: str  # "EM" or "judge"
    method: str
    policy: str | None  # our baseline of the same method
    settings: dict[str, Any]  # that it has to have
    drawn: bool  # in plots also without such a baseline
    figures: dict[str, dict[str, float]]  # dataset → number of documents, or "own" → %
    cost: dict[str, float]  # of one task; {}: not given


def find_runs(folders: Sequence[Path]) -> tuple[list[Run], list[Path]]:
    """The finished runs in some folders, by path, and the folders of those that are not finished.

    Raises:
        SettingError: there is no finished run, or another version wrote one.
    """
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        raise SettingError(f"There is no folder {', '.join(missing)}.")
    found = {path.parent.resolve(): path.parent for folder in folders for path in folder.rglob("episodes.jsonl")}
    paths = [found[place] for place in sorted(found) if (place / "config.json").is_file()]
    finished = [path for path in paths if (path / "summary.json").is_file()]
    if not finished:
        raise SettingError(
            f"No finished run in {', '.join(map(str, folders))}: expected folders with summary.json, that `atommem eval` wrote."
        )
    return [read_run(path) for path in finished], [path for path in paths if path not in finished]


def group(runs: Sequence[Run]) -> list[Environment]:
    """The tables of a report.

    Raises:
        SettingError: two runs are alike, seed and all, and did not give the same episodes.
    """
    tables: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        shared = {name: value for name, value in run.settings.items() if name not in _OF_A_ROW}
        own = {"label": run.label, "policy": run.config["policy"], **_own_settings(run)}
        rows = tables.setdefault(json.dumps(shared, sort_keys=True), {})
        rows.setdefault(json.dumps(own, sort_keys=True), []).append(run)
    settings = {key: json.loads(key) for key in tables}
    titles = {key: _title(settings[key], list(settings.values())) for key in tables}
    environments = []
    for key, members in tables.items():
        pooled = [Row(name, _seeds(same)) for name, same in _named(list(members.values()))]
        pooled.sort(key=lambda row: (row.head["privileged"], -row.numbers["em"], row.name))
        known = settings[key]
        environments.append(Environment(titles[key], known["env_id"], known.get("num_docs"), known, tuple(pooled)))
    return sorted(environments, key=lambda one: (one.env_id, one.documents or 0, one.title))


def _own_settings(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.settings.items() if name in _OF_A_ROW}


def _title(mine: dict[str, Any], all_of_them: list[dict[str, Any]]) -> str:
    """The environment, its number of documents, and what else tells it from the others."""
    told = [mine["env_id"]]
    if mine.get("num_docs") is not None:
        told.append(_count(mine["num_docs"], "document"))
    like = [
        one for one in all_of_them if (one["env_id"], one.get("num_docs")) == (mine["env_id"], mine.get("num_docs"))
    ]
    names = sorted({name for one in like for name in one})
    differ = [name for name in names if len({json.dumps(one.get(name)) for one in like}) > 1]
    told += [f"{name} {_plain(mine.get(name))}" for name in differ]
    return ", ".join(told)


def _named(members: list[list[Run]]) -> Iterator[tuple[str, list[Run]]]:
    """Each row's runs with a name that no other row of the table has: of a setting that differs, what is not the default."""
    defaults = json.loads(json.dumps(dataclasses.asdict(EpisodeSettings())))
    own = [{"policy": runs[0].config["policy"], **_own_settings(runs[0])} for runs in members]
    for runs, mine in zip(members, own, strict=True):
        label = runs[0].label
        like = [other for others, other in zip(members, own, strict=True) if others[0].label == label]
        implied = ABLATIONS.get(mine.get("ablation", ""), {})
        told = [
            f"{name}={_plain(value)}"
            for name, value in mine.items()
            if any(other.get(name) != value for other in like)
            and name not in implied
            and not (name in defaults and defaults[name] == value)
        ]
        yield (f"{label} ({', '.join(told)})" if told else label), runs


def _seeds(runs: list[Run]) -> tuple[Run, ...]:
    """One run for each seed; a run that is there twice counts once."""
    kept: dict[int, Run] = {}
    for run in runs:
        other = kept.setdefault(run.config["seed"], run)
        if run.records != other.records:
            raise SettingError(
                f"{other.folder} and {run.folder} are runs of the same configuration, seed {run.config['seed']}, and gave "
                "different episodes: they cannot be pooled. Report one of them, or give one another --label."
            )
    return tuple(kept[seed] for seed in sorted(kept))


def read_published() -> list[Published]:
    """What `published.toml` holds."""
    datasets = [options["dataset"] for options in ENVIRONMENTS.values()]
    return [
        Published(
            paper=paper["name"],
            source=paper["source"],
            model=paper["model"],
            metric=paper["metric"],
            method=method["name"],
            policy=method.get("policy"),
            settings=method.get("settings", {}),
            drawn=method.get("drawn", False),
            figures={dataset: method[dataset] for dataset in datasets if dataset in method},
            cost=method.get("cost", {}),
        )
        for paper in tomllib.loads(_PUBLISHED.read_text(encoding="utf-8"))["papers"]
        for method in paper["methods"]
    ]


def published_for(environment: Environment) -> list[tuple[Published, float]]:
    """The exact match [%] published on an environment's dataset, with its number of documents."""
    place = str(environment.documents)
    known = [(one, one.figures.get(environment.dataset, {})) for one in read_published() if one.metric == "EM"]
    return [(one, figures[place]) for one, figures in known if place in figures]


def counterpart(row: Row, published: Published) -> bool:
    """Whether a row is our baseline of a published method."""
    name, _, model = row.head["policy"].partition("@")
    settings = row.runs[0].settings
    return (
        bool(model)
        and name == published.policy
        and all(settings[key] == published.settings[key] for key in published.settings)
    )


def slug(text: str) -> str:
    """A text as part of a file's name.

    >>> slug("AtomMem-HotpotQA, 200 documents")
    'atommem-hotpotqa-200-documents'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _judged(run: Run) -> dict[str, Any] | None:
    """What `atommem judge` found."""
    path = run.folder / "judge.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _plain(value: object) -> str:
    """A setting as people write it.

    >>> _plain(["create", "read"]), _plain(None), _plain(True), _plain(0.25)
    ('create, read', 'none', 'true', '0.25')
    """
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


# --------------------------------------------------------------------------------------------------------------- tables


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _table(environment: Environment) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; a column for which there is nothing to say is left out."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "EM": lambda of: _percent(of["em"]),
        "95 % CI": lambda of: "–".join(map(_percent, of["em_ci95"])),
        "F1": lambda of: _percent(of["f1"]),
        "judge": lambda of: _percent(of["pass_rate"]),
        "stored": lambda of: _percent(of["evidence_recall"]["stored"]),
        "in view": lambda of: _percent(of["evidence_recall"]["retrieved"]),
        "answered": lambda of: _percent(of["evidence_recall"]["answered"]),
        "steps": lambda of: f"{of['steps']:.1f}",
        "calls": lambda of: f"{of['calls']:.1f}",
        "retrievals": lambda of: f"{of['retrievals']:.1f}",
        "tokens in": lambda of: f"{of['tokens']['prompt']:,.0f}",
        "out": lambda of: f"{of['tokens']['completion']:,.0f}",
        "seconds": lambda of: f"{of['seconds']:.2f}",
        "faults": lambda of: f"{sum(of['faults'].values()):.1f}",
        "n": lambda of: f"{of['questions']:,}",
    }
    if all(row.numbers["pass_rate"] is None for row in environment.rows):
        del columns["judge"]
    headings = ["policy", *columns]
    rows = [[row.shown, *(cell(row.numbers) for cell in columns.values())] for row in environment.rows]
    published = published_for(environment)
    if published:
        headings.append("published EM")
        for cells, row in zip(rows, environment.rows, strict=True):
            cells.append(
                "; ".join(f"{figure:.1f} ({one.method})" for one, figure in published if counterpart(row, one))
            )
        rows += [
            [f"{one.method} ({one.source}, {one.model})", *[""] * len(columns), f"{figure:.1f}"]
            for one, figure in published
            if one.drawn
        ]
    return headings, rows


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns hold text, the others numbers."""
    lines = [headings, ["---" if place < left else "---:" for place in range(len(headings))], *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is.

    >>> print(_markdown("a|b *c*"))
    a\\|b \\*c\\*
    """
    return re.sub(r"([\\|*_<>`\[\]])", r"\\\1", text)


def _split_table(environment: Environment, name: str) -> str:
    """EM by kind of question or by hops; "" where all questions are alike or there are too many kinds for a table."""
    parts = [row.numbers[f"by_{name}"] for row in environment.rows]
    values = sorted({value for part in parts for value in part})
    if not 1 < len(values) <= 12:
        return ""
    headings = []
    for value in values:
        counts = sorted({part[value]["questions"] for part in parts if value in part})
        headings.append(_markdown(value) + (f" (n = {counts[0]:,})" if len(counts) == 1 else ""))
    cells = [
        [_markdown(row.shown), *(_percent(part[value]["em"]) if value in part else "–" for value in values)]
        for row, part in zip(environment.rows, parts, strict=True)
    ]
    return f"EM by {name}:\n\n" + _markdown_table(["policy", *headings], cells) + "\n"


def _published_line(environment: Environment) -> str:
    """What was published on the environment's dataset with as many documents."""
    by: dict[str, list[str]] = {}
    for one, figure in published_for(environment):
        by.setdefault(f"{one.paper}, {one.source}, {one.model}", []).append(f"{one.method} {figure:.1f}")
    return "".join(
        f"*Published by others, with another model ({_markdown(source)}), EM:* {'; '.join(told)}.\n\n"
        for source, told in by.items()
    )


def _published_tables(environments: Sequence[Environment]) -> str:
    """All that was published on the datasets of the report."""
    parts = []
    costs = ("seconds", "output_tokens", "calls", "retrievals")
    for dataset, name in {environment.dataset: environment.env_id for environment in environments}.items():
        known = [one for one in read_published() if dataset in one.figures]
        if not known:
            continue
        places = list(dict.fromkeys(place for one in known for place in one.figures[dataset]))
        rows = [
            [
                one.method,
                f"{one.paper} ({one.source})",
                one.model,
                one.metric,
                *(f"{one.figures[dataset][place]:.1f}" if place in one.figures[dataset] else "" for place in places),
                *(f"{one.cost[cost]:,.1f}" if cost in one.cost else "" for cost in costs),
            ]
            for one in known
        ]
        headings = ["method", "paper", "model", "metric", *places, *(cost.replace("_", " ") for cost in costs)]
        parts.append(f"{_markdown(name)}:\n\n{_markdown_table(headings, rows, left=4)}\n")
    if not parts:
        return ""
    head = (
        "\n## Published by others\n\nWith other models, embedders and set-ups than the runs above: what to expect, not what to "
        "beat by a decimal. In %, by number of documents (own: a paper's own contexts); seconds, tokens, calls and retrievals "
        "are of one task, as the paper gives them.\n\n"
    )
    return head + "".join(parts)


_HOW_TO_READ = """ Rates are in %; everything else is the mean of an episode.

- **EM**: exact match, with the 95 % interval that resampling whole tasks gives; **F1**: of words.
- **stored**, **in view**, **answered**: where evidence was lost. Passages that stood in memory or scratchpad when their question
  was settled; that the policy had in view then; whose question it got right.
- **calls**: of a model. **retrievals**: steps with a query in force. **tokens**: of prompts and replies, as the model counts
  them, else by the environment's tokenizer. **seconds**: wall time of a run divided by its episodes. **n**: questions.
- **\\***: knows the golds, and shows what could be reached.
"""


def _count(number: int, what: str) -> str:
    """A number of things.

    >>> _count(1, "run"), _count(1200, "run")
    ('1 run', '1,200 runs')
    """
    return f"{number:,} {what}{'s' * (number != 1)}"


def _pictures(plots: Sequence[Plot]) -> str:
    return "".join(f"![{plot.name}](plots/{plot.name}.png)\n\n{_markdown(plot.caption)}\n\n" for plot in plots)


def markdown(environments: Sequence[Environment], unfinished: Sequence[str], plots: Sequence[Plot]) -> str:
    """The text of `report.md`."""
    runs = [run for environment in environments for row in environment.rows for run in row.runs]
    policies = len({row.name for environment in environments for row in environment.rows})
    told = f"{_count(len(runs), 'run')}, {_count(policies, 'row')}, {_count(len(environments), 'environment')}."
    parts = ["# Evaluation report\n\n", told, _HOW_TO_READ]
    if any(row.numbers["pass_rate"] is not None for one in environments for row in one.rows):
        judges = sorted(
            {f"{found['model']}, prompt {found['prompt_version']}" for run in runs if (found := _judged(run))}
        )
        parts.append(f"- **judge**: answers that a language model passed ({_markdown('; '.join(judges))}).\n")
    if unfinished:
        parts.append(f"\nLeft out, because not finished: {', '.join(f'`{name}`' for name in unfinished)}.\n")
    across = [plot for plot in plots if not plot.of]
    if across:
        parts.append(f"\n## Exact match against documents\n\n{_pictures(across)}")
    for environment in environments:
        headings, rows = _table(environment)
        parts += [
            f"\n## {_markdown(environment.title)}\n\n",
            _markdown_table(headings, [list(map(_markdown, cells)) for cells in rows]) + "\n",
            _published_line(environment),
            _split_table(environment, "hops"),
            _split_table(environment, "kind"),
            _pictures([plot for plot in plots if plot.of == environment.title]),
        ]
    return "".join([*parts, _published_tables(environments), _what_was_run(environments)])


def _what_was_run(environments: Sequence[Environment]) -> str:
    """The settings: those of every run, then those of each environment, then those of each row."""
    runs = [run for environment in environments for row in environment.rows for run in row.runs]
    everywhere = _in_common([run.settings for run in runs])
    parts = [
        "\n## What was run\n\n",
        f"Runs in schema {SCHEMA_VERSION}; `results.csv` names their folders and every number.\n\nSettings of all runs:\n\n",
        _markdown_table(
            ["setting", "value"], [[name, _markdown(_plain(everywhere[name]))] for name in sorted(everywhere)], 2
        ),
    ]
    for environment in environments:
        here = _in_common([run.settings for row in environment.rows for run in row.runs])
        told = ", ".join(f"{name} = {_plain(here[name])}" for name in sorted(here) if name not in everywhere)
        rows = []
        for row in environment.rows:
            settings = row.runs[0].settings
            own = ", ".join(f"{name} = {_plain(settings[name])}" for name in sorted(settings) if name not in here)
            seeds = ", ".join(str(run.config["seed"]) for run in row.runs)
            rows.append(
                [_markdown(row.shown), _markdown(row.head["policy"]), _markdown(own), seeds, f"{len(row.records):,}"]
            )
        parts += [
            f"\n{_markdown(environment.title)}" + (f": {_markdown(told)}" if told else "") + "\n\n",
            _markdown_table(["row", "policy", "settings of its own", "seeds", "episodes"], rows, 3),
        ]
    return "".join(parts)


def _in_common(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all have alike.

    >>> _in_common([{"top_k": 6, "layout": "terse"}, {"top_k": 12, "layout": "terse"}])
    {'layout': 'terse'}
    """
    first, *others = settings
    return {name: first[name] for name in first if all(name in one and one[name] == first[name] for one in others)}


_TEX = {character: "\\" + character for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
}


def tex_text(text: str) -> str:
    """Text that LaTeX prints as it is.

    >>> print(tex_text("rag_2 (50 %)"))
    rag\\_2 (50 \\%)
    """
    return "".join(_TEX.get(character, character) for character in text)


def latex(environments: Sequence[Environment]) -> str:
    """The text of `results.tex`: a table an environment."""
    parts = [r"% Written by atommem report. Needs \usepackage{booktabs}; \input this file." + "\n"]
    for environment in environments:
        headings, rows = _table(environment)
        body = [" & ".join(map(tex_text, cells)) + r" \\" for cells in rows]
        caption = (
            f"{environment.title}. Rates in %; the interval of exact match (EM) resamples tasks. Evidence: in memory when its "
            "question was settled (stored), in view then, and of a question that was answered. The rest are means of an episode; "
            "n: questions."
        )
        if headings[-1] == "published EM":
            caption += " Published EM: by others, with another model."
        if any(row.head["privileged"] for row in environment.rows):
            caption += " *: knows the golds."
        parts.append(
            "\n".join(
                [
                    "",
                    r"\begin{table*}",
                    r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
                    r"\begin{tabular}{l" + "r" * (len(headings) - 1) + "}",
                    r"\toprule",
                    " & ".join(map(tex_text, headings)) + r" \\",
                    r"\midrule",
                    *body,
                    r"\bottomrule",
                    r"\end{tabular}",
                    rf"\caption{{{tex_text(caption)}}}",
                    rf"\label{{tab:{environment.slug}}}",
                    r"\end{table*}",
                    "",
                ]
            )
        )
    return "".join(parts)


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """Rows under the names of all of them, in order of appearance; a list is written as JSON."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        values = (row.get(name, "") for name in names)
        writer.writerow(json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value for value in values)
    return file.getvalue()


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dictionaries in dictionaries as one, with dotted names.

    >>> flat({"em": 0.5, "tokens": {"prompt": 7, "completion": 1}})
    {'em': 0.5, 'tokens.prompt': 7, 'tokens.completion': 1}
    """
    found: dict[str, Any] = {}
    for name, value in nested.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def results(environments: Sequence[Environment], shown: Callable[[Path], str]) -> list[dict[str, Any]]:
    """The lines of `results.csv`, one a run."""
    lines = []
    for environment in environments:
        for row in environment.rows:
            beside = [
                (one, figure)
                for one, figure in published_for(environment)
                if one.metric == "EM" and counterpart(row, one)
            ]
            for run in row.runs:
                found = _judged(run) or {}
                judged = {
                    f"judge.{name}": found[name]
                    for name in ("model", "pass_rate", "pass_rate_ci95", "unclear")
                    if found
                }
                published = {
                    "published.em": beside[0][1] if beside else "",
                    "published.by": f"{beside[0][0].method}, {beside[0][0].source}, {beside[0][0].model}"
                    if beside
                    else "",
                }
                head = {"folder": shown(run.folder), "environment": environment.title, "row": row.name}
                lines.append({**head, **flat(run.summary or {}), **judged, **published})
    return lines


# ---------------------------------------------------------------------------------------------------------------- plots


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture and the numbers that it shows."""

    name: str  # of its files
    of: str  # the environment's title; "": of more than one
    caption: str
    figure: Figure
    drawn: list[dict[str, Any]]


def draw(environments: Sequence[Environment]) -> list[Plot]:
    """All plots of a report.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependency(f"Plots need {error.name!r}: pip install 'atommem[train]'.") from error
    names = list(dict.fromkeys(row.name for environment in environments for row in environment.rows))
    styles = {
        name: {
            "color": _COLOURS[place % len(_COLOURS)],
            "marker": _MARKERS[place % len(_MARKERS)],
        }
        for place, name in enumerate(names)
    }
    families: dict[str, list[Environment]] = {}
    for environment in environments:
        same = {name: value for name, value in environment.settings.items() if name != "num_docs"}
        families.setdefault(json.dumps(same, sort_keys=True), []).append(environment)
    with matplotlib.rc_context({"text.parse_math": False}):  # a label is shown as it is, dollars and all
        plots = [_em_by_documents(members, styles) for members in families.values() if len(members) > 1]
        for environment in environments:
            plots.append(_exact_match(environment))
            if environment.rows[0].numbers["evidence_recall"]["stored"] is not None:
                plots.append(_evidence(environment))
            plots += [_cost(environment, styles), _memory(environment, styles), _operations(environment)]
    return plots


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _tidy(axes: Axes, grid: str = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.3)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    order = sorted(found, key=lambda label: "published" in label)
    figure.legend([found[label] for label in order], order, loc="outside right upper", frameon=False, fontsize=9)


def _em_by_documents(members: list[Environment], styles: dict[str, dict[str, str]]) -> Plot:
    title = members[0].title.replace(f", {_count(members[0].documents or 0, 'document')}", "")
    figure = _figure(8.0, 4.5)
    axes = figure.subplots()
    drawn: list[dict[str, Any]] = []
    names = [name for name in styles if any(row.name == name for one in members for row in one.rows)]
    counts = [one.documents or 0 for one in members]
    span = max(counts) / min(counts)
    for place, name in enumerate(names):
        points = [(one.documents or 0, row) for one in members for row in one.rows if row.name == name]
        # Shifted by a hundredth of the logarithmic axis each, or intervals would hide one another.
        dodge = span ** (0.01 * (place - (len(names) - 1) / 2))
        values = [100 * row.numbers["em"] for _, row in points]
        ends = [[100 * end for end in row.numbers["em_ci95"]] for _, row in points]
        axes.errorbar(
            [documents * dodge for documents, _ in points],
            values,
            [
                [v - low for v, (low, _) in zip(values, ends, strict=True)],
                [h - v for v, (_, h) in zip(values, ends, strict=True)],
            ],
            label=points[0][1].shown,
            linewidth=1.5,
            elinewidth=1,
            markersize=6,
            **styles[name],  # type: ignore[arg-type]
        )
        for (documents, row), value, (low, high) in zip(points, values, ends, strict=True):
            drawn.append(
                {
                    "line": row.shown,
                    "documents": documents,
                    "em": round(value, 2),
                    "low": round(low, 2),
                    "high": round(high, 2),
                }
            )
    ticks = set(counts)
    dashes = iter((":", "--", "-."))
    for published in read_published():
        figures = {
            int(at): value for at, value in published.figures.get(members[0].dataset, {}).items() if at.isdigit()
        }
        ours = [row.name for one in members for row in one.rows if counterpart(row, published)]
        if not figures or not (ours or published.drawn):
            continue
        label = f"{published.method} (published)"
        look = (
            {**styles[ours[0]], "linestyle": "--"}
            if ours
            else {"color": "black", "marker": "o", "linestyle": next(dashes)}
        )
        axes.plot(list(figures), list(figures.values()), label=label, markerfacecolor="white", linewidth=1.2, **look)  # type: ignore[arg-type]
        drawn += [{"line": label, "documents": at, "em": value} for at, value in figures.items()]
        ticks |= set(figures)
    axes.set_xscale("log")
    axes.set_xticks(sorted(ticks), [f"{tick:,}" for tick in sorted(ticks)])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("documents in the context")
    axes.set_ylabel("exact match [%]")
    axes.set_ylim(-3, 103)
    axes.set_title(title)
    _tidy(axes)
    _legend(figure, axes)
    caption = f"{title}: exact match against the number of documents; bars are 95 % intervals."
    return Plot(f"em-by-documents-{slug(title)}", "", caption, figure, drawn)


def _exact_match(environment: Environment) -> Plot:
    rows = environment.rows[::-1]  # the first one is drawn at the top
    figure = _figure(8.0, 1.3 + 0.3 * len(rows))
    axes = figure.subplots()
    drawn: list[dict[str, Any]] = []
    for place, row in enumerate(rows):
        em, (low, high) = row.numbers["em"], row.numbers["em_ci95"]
        colour = _COLOURS[-1] if row.head["privileged"] else _COLOURS[0]
        told = "knows the golds" if row.head["privileged"] else "measured, 95 % interval"
        axes.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot(100 * em, place, "o", color=colour, markersize=7, linestyle="none", label=told)
        drawn.append({"row": row.shown, "em": 100 * em, "low": 100 * low, "high": 100 * high})
    lines = iter(("dotted", "dashed", "dashdot"))
    for one, value in published_for(environment):
        if one.drawn:
            axes.axvline(value, color="black", linewidth=1, linestyle=next(lines), label=f"{one.method} (published)")
            drawn.append({"row": f"{one.method} (published)", "em": value})
        for place, row in enumerate(rows):
            if counterpart(row, one):
                axes.plot(
                    value,
                    place,
                    "D",
                    color="black",
                    markerfacecolor="white",
                    linestyle="none",
                    label="same method (published)",
                )
                drawn.append({"row": f"{row.shown} (published)", "em": value})
    axes.set_yticks(range(len(rows)), [row.shown for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(-3, 103)
    axes.set_xlabel("exact match [%]")
    axes.set_title(environment.title)
    _tidy(axes, "x")
    _legend(figure, axes)
    caption = f"{environment.title}: exact match, with 95 % intervals."
    return Plot(f"em-{environment.slug}", environment.title, caption, figure, _rounded(drawn))


def _cost(environment: Environment, styles: dict[str, dict[str, str]]) -> Plot:
    figure = _figure(8.0, 4.2)
    axes = figure.subplots()
    drawn: list[dict[str, Any]] = []
    for row in environment.rows:
        em, (low, high) = row.numbers["em"], row.numbers["em_ci95"]
        tokens = sum(row.numbers["tokens"].values())
        axes.errorbar(
            tokens,
            100 * em,
            [[100 * (em - low)], [100 * (high - em)]],
            linestyle="none",
            markersize=8,
            elinewidth=1,
            label=row.shown,
            **styles[row.name],  # type: ignore[arg-type]
        )
        drawn.append({"row": row.shown, "tokens": tokens, "em": 100 * em, "low": 100 * low, "high": 100 * high})
    axes.set_xscale("log")
    _few_ticks(axes, [line["tokens"] for line in drawn])
    axes.set_ylim(-3, 103)
    axes.set_xlabel("tokens of prompts and replies, an episode")
    axes.set_ylabel("exact match [%]")
    axes.set_title(environment.title)
    _tidy(axes, "both")
    _legend(figure, axes)
    caption = f"{environment.title}: what exact match costs, in tokens of prompts and replies; bars are 95 % intervals."
    return Plot(f"cost-{environment.slug}", environment.title, caption, figure, _rounded(drawn))


def _few_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Round numbers on a logarithmic axis, and room for them: a decade can be all that there is."""
    low, high = min(values) / 1.4, max(values) * 1.4
    ticks = [digit * 10**power for power in range(12) for digit in (1, 2, 5) if low <= digit * 10**power <= high]
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _over_steps(row: Row, name: str, *, held: bool) -> list[float]:
    """The mean over all episodes at each step; after its end an episode has 0 or, where `held`, its last value."""
    series = [record["by_step"][name] for record in row.records]
    longest = max(map(len, series))
    padded = [values + [values[-1] if held else 0] * (longest - len(values)) for values in series]
    return [fmean(at) for at in zip(*padded, strict=True)]


def _operations(environment: Environment) -> Plot:
    across = min(3, len(environment.rows))
    down = -(-len(environment.rows) // across)
    figure = _figure(2.9 * across + 1.3, 0.6 + 1.9 * down)
    panels = figure.subplots(down, across, squeeze=False).ravel().tolist()
    drawn: list[dict[str, Any]] = []
    for axes, row in zip(panels, environment.rows, strict=False):
        below = [0.0] * max(record["steps"] for record in row.records)
        steps = range(1, len(below) + 1)
        for kind, colour in _KIND_COLOURS.items():
            means = _over_steps(row, kind, held=False)
            axes.bar(steps, means, 1.0, bottom=below, color=colour, label=str(kind), linewidth=0)
            below = [one + more for one, more in zip(below, means, strict=True)]
            drawn += [
                {"row": row.shown, "step": step, "kind": str(kind), "mean": mean}
                for step, mean in zip(steps, means, strict=True)
            ]
        axes.set_title(row.shown, fontsize=9)
        axes.set_xlim(0.4, len(below) + 0.6)
        axes.set_ylim(0, 1.08 * max(below) or 1)
        axes.locator_params("x", nbins=5, integer=True)
        axes.locator_params("y", nbins=4)
        axes.tick_params(labelsize=8)
        _tidy(axes)
    for axes in panels[len(environment.rows) :]:
        axes.set_visible(False)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("operations at that step, mean of all episodes", fontsize=10)
    figure.suptitle(environment.title, fontsize=12)
    _legend(figure, panels[0])
    caption = f"{environment.title}: operations carried out at each step, the mean of all episodes; each panel has its own scale."
    return Plot(f"operations-{environment.slug}", environment.title, caption, figure, _rounded(drawn))


def _memory(environment: Environment, styles: dict[str, dict[str, str]]) -> Plot:
    figure = _figure(8.0, 4.2)
    axes = figure.subplots()
    drawn: list[dict[str, Any]] = []
    for row in environment.rows:
        entries = _over_steps(row, "entries", held=True)
        steps = range(1, len(entries) + 1)
        axes.plot(
            steps,
            entries,
            label=row.shown,
            markersize=5,
            markevery=max(1, len(entries) // 8),
            **styles[row.name],  # type: ignore[arg-type]
        )
        drawn += [{"row": row.shown, "step": step, "entries": mean} for step, mean in zip(steps, entries, strict=True)]
    axes.locator_params("x", integer=True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("entries in memory, mean of all episodes")
    axes.set_title(environment.title)
    _tidy(axes)
    _legend(figure, axes)
    caption = (
        f"{environment.title}: entries in memory after each step, the mean of all episodes; ended ones keep theirs."
    )
    return Plot(f"memory-{environment.slug}", environment.title, caption, figure, _rounded(drawn))


def _evidence(environment: Environment) -> Plot:
    rows = environment.rows[::-1]
    figure = _figure(8.0, 1.3 + 0.55 * len(rows))
    axes = figure.subplots()
    drawn: list[dict[str, Any]] = []
    for number, (stage, (label, colour)) in enumerate(_STAGES.items()):
        places = [place + 0.26 * (1 - number) for place in range(len(rows))]
        shares = [100 * row.numbers["evidence_recall"][stage] for row in rows]
        bars = axes.barh(places, shares, 0.24, color=colour, label=label)
        axes.bar_label(bars, [f"{share:.0f}" for share in shares], padding=2, fontsize=7, color="0.3")
        drawn += [
            {"row": row.shown, "stage": label, "passages_percent": share}
            for row, share in zip(rows, shares, strict=True)
        ]
    axes.set_yticks(range(len(rows)), [row.shown for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(0, 106)
    axes.set_xlabel("passages of evidence [%]")
    axes.set_title(environment.title)
    _tidy(axes, "x")
    _legend(figure, axes)
    caption = f"{environment.title}: where evidence was lost, from stored to in view (when a question was settled) to answered."
    return Plot(f"evidence-{environment.slug}", environment.title, caption, figure, _rounded(drawn))


def _rounded(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: round(value, 4) if isinstance(value, float) else value for name, value in line.items()} for line in lines
    ]


# ----------------------------------------------------------------------------------------------------------------- all


def report(folders: Sequence[Path], out: Path) -> list[Environment]:
    """Writes the report of all finished runs in `folders` into `out`.

    Raises:
        SettingError: as in `find_runs` and `group`.
        MissingDependency: matplotlib is not installed; nothing is written then.
    """
    runs, unfinished = find_runs(folders)
    environments = group(runs)
    plots = draw(environments)
    root = os.path.commonpath([folder.resolve().parent for folder in folders])

    def shown(folder: Path) -> str:
        return Path(os.path.relpath(folder.resolve(), root)).as_posix()

    (out / "plots").mkdir(parents=True, exist_ok=True)
    for plot in plots:
        plot.figure.savefig(out / "plots" / f"{plot.name}.png", dpi=150)
        replace_file(out / "plots" / f"{plot.name}.csv", csv_text(plot.drawn))
    replace_file(out / "report.md", markdown(environments, [shown(folder) for folder in unfinished], plots))
    replace_file(out / "results.csv", csv_text(results(environments, shown)))
    replace_file(out / "results.tex", latex(environments))
    return environments


def main(config: ReportConfig) -> None:
    """Turn runs into tables (Markdown, CSV, LaTeX) and plots, beside the figures that papers published."""
    if not config.runs:
        raise SettingError(
            "Expected folders of runs to report, got none: atommem report RUN_OR_FOLDER … [--out FOLDER]"
        )
    out = config.out or config.runs[0] / "report"
    environments = report(config.runs, out)
    rows = sum(len(environment.rows) for environment in environments)
    runs = sum(len(row.runs) for environment in environments for row in environment.rows)
    console = Console()
    console.print(f"{runs:,} runs in {rows:,} rows of {len(environments):,} tables.", highlight=False)
    console.print(f"Written to [bold]{escape(str(out))}[/]: report.md, results.csv, results.tex, plots/.")
