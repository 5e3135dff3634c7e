"""The tables of `atommem report`: an environment's rows as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

import atommem_env  # noqa: F401  (registers the environments)
from eval.metrics import SCHEMA_VERSION
from eval.report.rows import Environment, judgement, plain, slug

if TYPE_CHECKING:
    from eval.report.rows import Plot


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
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


def _cells(environment: Environment) -> list[list[str]]:
    """The headings, then the cells of each row; columns without a number in any row are left out."""
    judged = any(row.numbers["pass_rate"] is not None for row in environment.rows)
    columns = {name: cell for name, cell in _COLUMNS.items() if judged or name != "judge"}
    rows = [[row.shown, *(cell(row.numbers) for cell in columns.values())] for row in environment.rows]
    if not environment.beside:
        return [["policy", *columns], *rows]
    for cells, row in zip(rows, environment.rows, strict=True):
        same = [f"{figure:.1f} ({one.method})" for one, figure in environment.beside if one in row.published]
        cells.append("; ".join(same))
    blank = [""] * len(columns)
    drawn = [(one, figure) for one, figure in environment.beside if one.drawn]
    rows += [[f"{one.method} ({one.source}, {one.model})", *blank, f"{figure:.1f}"] for one, figure in drawn]
    return [["policy", *columns, "published EM"], *rows]


def _split_cells(environment: Environment, name: str) -> list[list[str]]:
    """EM by kind of question or by hops; [] where all questions are alike, or of too many kinds for a table."""
    parts = [row.numbers[f"by_{name}"] for row in environment.rows]
    counts = {value: scores["questions"] for part in parts for value, scores in part.items()}
    if not 1 < len(counts) <= 12:
        return []
    values = sorted(counts)
    head = [f"EM by {name}", *(f"{value} (n = {counts[value]:,})" for value in values)]
    ems = [[_percent(part[value]["em"]) if value in part else "–" for value in values] for part in parts]
    return [head, *([row.shown, *cells] for row, cells in zip(environment.rows, ems, strict=True))]


_HOW_TO_READ = """Rates are in %; everything else is the mean of an episode.

- **EM**: exact match, with the 95 % interval that resampling whole tasks gives; **F1**: of words.
- **stored**, **in view**, **answered**: where evidence was lost. Passages that stood in memory or scratchpad when their question
  was settled; that the policy had in view then; whose question it got right.
- **calls**: of a model. **retrievals**: steps with a query in force. **tokens**: of prompts and replies, as the model counts
  them, else by the environment's tokenizer. **seconds**: wall time of a run divided by its episodes. **n**: questions.
- **\\***: knows the golds, and shows what could be reached. **published EM**: by others, with another model.
"""


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is.

    >>> print(_markdown("a|b *c*"))
    a\\|b \\*c\\*
    """
    return re.sub(r"([\\|*_<>`\[\]])", r"\\\1", text)


def _markdown_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns hold text, the others numbers; "" of no rows."""
    if not rows:
        return ""
    ruler = "|" + "".join(" --- |" if place < left else " ---: |" for place in range(len(rows[0])))
    lines = ["| " + " | ".join(map(_markdown, cells)) + " |" for cells in rows]
    return "\n".join([lines[0], ruler, *lines[1:], "", ""])


def markdown(environments: Sequence[Environment], unfinished: Sequence[str], plots: Sequence[Plot]) -> str:
    """The text of `report.md`."""
    runs = [run for environment in environments for row in environment.rows for run in row.runs]
    parts = [f"# Evaluation report\n\nRuns: {len(runs):,}. {_HOW_TO_READ}"]
    judges = {f"{found['model']}, prompt {found['prompt_version']}" for run in runs if (found := judgement(run))}
    if judges:
        parts.append(f"- **judge**: answers that a language model passed ({_markdown('; '.join(sorted(judges)))}).\n")
    if unfinished:
        parts.append(f"\nLeft out, because not finished: {', '.join(f'`{name}`' for name in unfinished)}.\n")
    across = _pictures(plots, "")
    parts.append(f"\n## Exact match against documents\n\n{across}" if across else "")
    for environment in environments:
        tables = [_cells(environment), _split_cells(environment, "hops"), _split_cells(environment, "kind")]
        parts += [f"\n## {_markdown(environment.title)}\n\n", *map(_markdown_table, tables)]
        parts.append(_pictures(plots, environment.title))
    return "".join([*parts, _published(environments), _what_was_run(environments)]).rstrip("\n") + "\n"


def _pictures(plots: Sequence[Plot], of: str) -> str:
    return "".join(
        f"![{one.name}](plots/{one.name}.png)\n\n{_markdown(one.caption)}\n\n" for one in plots if one.of == of
    )


def _published(environments: Sequence[Environment]) -> str:
    """All that was published on the datasets of the report."""
    costs = ("seconds", "output_tokens", "calls", "retrievals")
    parts = []
    for env_id, known in {one.settings["env_id"]: one.published for one in environments if one.published}.items():
        places = list(dict.fromkeys(place for one in known for place in one.figures))
        rows = [["method", "paper", "model", "metric", *places, *(cost.replace("_", " ") for cost in costs)]]
        for one in known:
            numbers = [*map(one.figures.get, places), *map(one.cost.get, costs)]
            cells = ["" if number is None else f"{number:,.1f}" for number in numbers]
            rows.append([one.method, f"{one.paper} ({one.source})", one.model, one.metric, *cells])
        parts.append(f"{_markdown(env_id)}:\n\n{_markdown_table(rows, left=4)}")
    head = (
        "\n## Published by others\n\nWith other models, embedders and set-ups than the runs above: what to expect, not what to "
        "beat by a decimal. In %, by number of documents (own: a paper's own contexts); seconds, tokens, calls and retrievals "
        "are of one task, as the paper gives them.\n\n"
    )
    return "".join([head, *parts]) if parts else ""


def _what_was_run(environments: Sequence[Environment]) -> str:
    """The settings: those of every run, then those of each environment, then those of each row."""
    everywhere = _in_common([run.settings for one in environments for row in one.rows for run in row.runs])
    told = f"Runs in schema {SCHEMA_VERSION}; `results.csv` names their folders and every number. Settings of all runs:"
    rows = [["setting", "value"], *([name, plain(everywhere[name])] for name in sorted(everywhere))]
    parts = [f"\n## What was run\n\n{told}\n\n", _markdown_table(rows, left=2)]
    for environment in environments:
        here = _in_common([run.settings for row in environment.rows for run in row.runs])
        rows = [["row", "policy", "settings of its own", "seeds", "episodes"]]
        for row in environment.rows:
            first, seeds = row.runs[0], ", ".join(str(run.config["seed"]) for run in row.runs)
            own = _told(first.settings, here)
            rows.append([row.shown, first.config["policy"], own, seeds, f"{len(row.records):,}"])
        title = ": ".join(filter(None, (environment.title, _told(here, everywhere))))
        parts += [f"{_markdown(title)}\n\n", _markdown_table(rows, left=3)]
    return "".join(parts)


def _told(settings: dict[str, Any], but: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {plain(settings[name])}" for name in sorted(settings) if name not in but)


def _in_common(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all have alike.

    >>> _in_common([{"top_k": 6, "layout": "terse"}, {"top_k": 12, "layout": "terse"}])
    {'layout': 'terse'}
    """
    return {name: value for name, value in settings[0].items() if all((name, value) in one.items() for one in settings)}


_TEX = str.maketrans(
    {character: "\\" + character for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "–": "--"}
)


def tex_text(text: str) -> str:
    """Text that LaTeX prints as it is.

    >>> print(tex_text("rag_2 (50 %)"))
    rag\\_2 (50 \\%)
    """
    return text.translate(_TEX)


def latex(environments: Sequence[Environment]) -> str:
    """The text of `results.tex`: a table an environment."""
    parts = [r"% Written by atommem report. Needs \usepackage{booktabs}; \input this file." + "\n"]
    for environment in environments:
        rows = _cells(environment)
        head, *body = (" & ".join(map(tex_text, cells)) + r" \\" for cells in rows)
        caption = (
            f"{environment.title}. Rates in %; the interval of exact match (EM) resamples tasks. Evidence: in memory when its "
            "question was settled (stored), in view then, and of a question that was answered. The rest are means of an episode; "
            "n: questions."
        )
        if environment.beside:
            caption += " Published EM: by others, with another model."
        if any(row.numbers["privileged"] for row in environment.rows):
            caption += " *: knows the golds."
        lines = [
            r"\begin{table*}",
            r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
            r"\begin{tabular}{l" + "r" * (len(rows[0]) - 1) + "}",
            *(r"\toprule", head, r"\midrule", *body, r"\bottomrule"),
            r"\end{tabular}",
            rf"\caption{{{tex_text(caption)}}}",
            rf"\label{{tab:{slug(environment.title)}}}",
            r"\end{table*}",
        ]
        parts += ["\n", "\n".join(lines), "\n"]
    return "".join(parts)


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """Rows under the names of all of them, in order of appearance; a list is written as JSON."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _csv_cell(value) for name, value in row.items()} for row in rows)
    return file.getvalue()


def _csv_cell(value: object) -> object:
    if isinstance(value, float):
        return round(value, 4)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


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
            for run in row.runs:
                head = {"folder": shown(run.folder), "table": environment.title, "row": row.name}
                judged = {name: found for name, found in (judgement(run) or {}).items() if name != "disagreements"}
                lines.append(head | flat({**(run.summary or {}), "judge": judged}))
    return lines


def results_table(summaries: list[dict[str, Any]], title: str) -> Table:
    """Summaries as a table for people; fits into 80 columns."""
    table = Table(
        title=title,
        caption=("* is given the golds. " if any(row["privileged"] for row in summaries) else "")
        + "In %: exact match with its interval, evidence stored and in view when its question was settled. "
        "An episode: steps, creates, faults.",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("policy", overflow="fold")
    for heading in ("EM", "95 % CI", "stored", "in view", "steps", "creates", "faults"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in summaries:
        low, high = row["em_ci95"]
        recall = row["evidence_recall"]
        table.add_row(
            row["label"] + ("*" if row["privileged"] else ""),
            f"{100 * row['em']:.1f}",
            f"{100 * low:.1f}–{100 * high:.1f}",
            *("–" if recall[stage] is None else f"{100 * recall[stage]:.1f}" for stage in ("stored", "retrieved")),
            f"{row['steps']:.1f}",
            f"{row['operations'].get('create', 0):.1f}",
            f"{sum(row['faults'].values()):.1f}",
        )
    return table
