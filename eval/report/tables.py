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

from atommem_env.terminal import escape, printable
from eval.metrics import SCHEMA_VERSION
from eval.report.rows import Environment, judgement, plain, slug

if TYPE_CHECKING:
    from eval.report.rows import Plot


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _count(number: float | None) -> str:
    return "–" if number is None else f"{number:,.0f}"


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "EM": lambda of: _percent(of["em"]),
    "95 % CI": lambda of: "–".join(map(_percent, of["em_ci95"] or [None])),
    "F1": lambda of: _percent(of["f1"]),
    "judge": lambda of: _percent(of["pass_rate"]),
    "stored": lambda of: _percent(of["evidence_recall"]["stored"]),
    "in view": lambda of: _percent(of["evidence_recall"]["retrieved"]),
    "answered": lambda of: _percent(of["evidence_recall"]["answered"]),
    "steps": lambda of: f"{of['steps']:.1f}",
    "calls": lambda of: f"{of['calls']:.1f}",
    "retrievals": lambda of: f"{of['retrievals']:.1f}",
    "tokens in": lambda of: _count(of["tokens"]["prompt"]),
    "out": lambda of: _count(of["tokens"]["completion"]),
    "seconds": lambda of: f"{of['seconds']:.2f}",
    "faults": lambda of: f"{sum(of['faults'].values()):.1f}",
    "n": lambda of: f"{of['questions']:,}",
}


def _cells(environment: Environment) -> list[list[str]]:
    """The headings, then the cells of each row; without the judge's column if no row was judged."""
    judged = any(row.numbers["pass_rate"] is not None for row in environment.rows)
    columns = {name: cell for name, cell in _COLUMNS.items() if judged or name != "judge"}
    rows = [[row.display_name, *(cell(row.numbers) for cell in columns.values())] for row in environment.rows]
    if not environment.published_em:
        return [["policy", *columns], *rows]
    for cells, row in zip(rows, environment.rows, strict=True):
        same = [f"{figure:.1f} ({one.method})" for one, figure in environment.published_em if one in row.published]
        cells.append("; ".join(same))
    blank = [""] * len(columns)
    drawn = [(one, figure) for one, figure in environment.published_em if one.drawn]
    rows += [[f"{one.method} ({one.source}, {one.model})", *blank, f"{figure:.1f}"] for one, figure in drawn]
    return [["policy", *columns, "published EM"], *rows]


def _split_cells(environment: Environment, name: str) -> list[list[str]]:
    """EM by kind of question or by hops; [] if all questions have the same, or too many different ones for a table."""
    parts = [row.numbers[f"by_{name}"] for row in environment.rows]
    counts = {value: scores["questions"] for part in parts for value, scores in part.items()}
    if not 1 < len(counts) <= 12:
        return []
    values = sorted(counts)
    head = [f"EM by {name}", *(f"{value} (n = {counts[value]:,})" for value in values)]
    ems = [[_percent(part[value]["em"]) if value in part else "–" for value in values] for part in parts]
    return [head, *([row.display_name, *cells] for row, cells in zip(environment.rows, ems, strict=True))]


_LEGEND = """Rates are in %; everything else is the mean per episode.

- **EM**: exact match, with its 95 % interval from resampling whole tasks; **F1**: of words.
- **stored**, **in view**, **answered**: where evidence was lost. Passages that were in memory or scratchpad when their question
  was resolved; that the policy had in view then; whose question it got right.
- **calls**: of a model. **retrievals**: steps with an active query. **tokens**: of prompts and replies, as counted by the model,
  else by the environment's tokenizer. **seconds**: wall time of a run divided by its episodes. **n**: questions.
- **\\***: is given the golds; an upper bound. **published EM**: by others, with another model.
"""


def _escape_markdown(text: str) -> str:
    """Text that Markdown renders literally.

    >>> print(_escape_markdown("a|b *c*"))
    a\\|b \\*c\\*
    """
    return re.sub(r"([\\|*_<>`\[\]])", r"\\\1", text)


def _markdown_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are texts, the others numbers; "" without rows."""
    if not rows:
        return ""
    ruler = "|" + "".join(" --- |" if column < left else " ---: |" for column in range(len(rows[0])))
    lines = ["| " + " | ".join(map(_escape_markdown, cells)) + " |" for cells in rows]
    return "\n".join([lines[0], ruler, *lines[1:], "", ""])


def markdown(environments: Sequence[Environment], unfinished: Sequence[str], plots: Sequence[Plot]) -> str:
    """The text of `report.md`."""
    runs = [run for environment in environments for row in environment.rows for run in row.runs]
    parts = [f"# Evaluation report\n\nRuns: {len(runs):,}. {_LEGEND}"]
    judges = {f"{result['model']}, prompt {result['prompt_version']}" for run in runs if (result := judgement(run))}
    if judges:
        names = _escape_markdown("; ".join(sorted(judges)))
        parts.append(f"- **judge**: answers that a language model passed ({names}).\n")
    if unfinished:
        parts.append(f"\nLeft out, because not finished: {', '.join(f'`{name}`' for name in unfinished)}.\n")
    overview = _images(plots, "")
    parts.append(f"\n## Exact match against documents\n\n{overview}" if overview else "")
    for environment in environments:
        tables = [_cells(environment), _split_cells(environment, "hops"), _split_cells(environment, "kind")]
        parts += [f"\n## {_escape_markdown(environment.title)}\n\n", *map(_markdown_table, tables)]
        parts.append(_images(plots, environment.title))
    return "".join([*parts, _published_section(environments), _settings_section(environments)]).rstrip("\n") + "\n"


def _images(plots: Sequence[Plot], of: str) -> str:
    return "".join(
        f"![{one.name}](plots/{one.name}.png)\n\n{_escape_markdown(one.caption)}\n\n" for one in plots if one.of == of
    )


def _published_section(environments: Sequence[Environment]) -> str:
    """All published figures on the datasets of the report."""
    costs = ("seconds", "output_tokens", "calls", "retrievals")
    parts = []
    for env_id, known in {one.settings["env_id"]: one.published for one in environments if one.published}.items():
        sizes = list(dict.fromkeys(size for one in known for size in one.figures))
        rows = [["method", "paper", "model", "metric", *sizes, *(cost.replace("_", " ") for cost in costs)]]
        for one in known:
            numbers = [*map(one.figures.get, sizes), *map(one.cost.get, costs)]
            cells = ["" if number is None else f"{number:,.1f}" for number in numbers]
            rows.append([one.method, f"{one.paper} ({one.source})", one.model, one.metric, *cells])
        parts.append(f"{_escape_markdown(env_id)}:\n\n{_markdown_table(rows, left=4)}")
    head = (
        "\n## Published by others\n\nWith other models, embedders and set-ups than the runs above, so not comparable to the "
        "decimal. In %, by number of documents (own: a paper's own contexts); seconds, tokens, calls and retrievals are of one "
        "task, as the paper gives them.\n\n"
    )
    return "".join([head, *parts]) if parts else ""


def _settings_section(environments: Sequence[Environment]) -> str:
    """The settings: those of every run, then those of each environment, then those of each row."""
    shared = _common_settings([run.settings for one in environments for row in one.rows for run in row.runs])
    intro = f"Runs in schema {SCHEMA_VERSION}; `results.csv` has their folders and every number. Settings of all runs:"
    rows = [["setting", "value"], *([name, plain(shared[name])] for name in sorted(shared))]
    parts = [f"\n## What was run\n\n{intro}\n\n", _markdown_table(rows, left=2)]
    for environment in environments:
        common = _common_settings([run.settings for row in environment.rows for run in row.runs])
        rows = [["row", "policy", "other settings", "seeds", "episodes"]]
        for row in environment.rows:
            first, seeds = row.runs[0], ", ".join(str(run.config["seed"]) for run in row.runs)
            other = _format_settings(first.settings, common)
            rows.append([row.display_name, first.config["policy"], other, seeds, f"{len(row.records):,}"])
        title = ": ".join(filter(None, (environment.title, _format_settings(common, shared))))
        parts += [f"{_escape_markdown(title)}\n\n", _markdown_table(rows, left=3)]
    return "".join(parts)


def _format_settings(settings: dict[str, Any], excluded: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {plain(settings[name])}" for name in sorted(settings) if name not in excluded)


def _common_settings(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The settings that all have in common.

    >>> _common_settings([{"top_k": 6, "layout": "terse"}, {"top_k": 12, "layout": "terse"}])
    {'layout': 'terse'}
    """
    return {name: value for name, value in settings[0].items() if all((name, value) in one.items() for one in settings)}


_TEX = str.maketrans(
    {character: "\\" + character for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "–": "--"}
)


def _escape_tex(text: str) -> str:
    """Text that LaTeX prints literally.

    >>> print(_escape_tex("rag_2 (50 %)"))
    rag\\_2 (50 \\%)
    """
    return printable(text).translate(_TEX)


def latex(environments: Sequence[Environment]) -> str:
    """The text of `results.tex`: a table for each environment."""
    parts = [r"% Written by atommem report. Needs \usepackage{booktabs}; \input this file." + "\n"]
    for environment in environments:
        rows = _cells(environment)
        head, *body = (" & ".join(map(_escape_tex, cells)) + r" \\" for cells in rows)
        caption = (
            f"{environment.title}. Rates in %; the interval of exact match (EM) resamples tasks. Evidence: in memory when its "
            "question was resolved (stored), in view then, and of a question answered correctly. The rest are means per episode; "
            "n: questions."
        )
        if environment.published_em:
            caption += " Published EM: by others, with another model."
        if any(row.numbers["privileged"] for row in environment.rows):
            caption += " *: is given the golds."
        lines = [
            r"\begin{table*}",
            r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
            r"\begin{tabular}{l" + "r" * (len(rows[0]) - 1) + "}",
            *(r"\toprule", head, r"\midrule", *body, r"\bottomrule"),
            r"\end{tabular}",
            rf"\caption{{{_escape_tex(caption)}}}",
            rf"\label{{tab:{slug(environment.title)}}}",
            r"\end{table*}",
        ]
        parts += ["\n", "\n".join(lines), "\n"]
    return "".join(parts)


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV, with a column for each name, in order of appearance; a list is written as JSON."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _csv_cell(value) for name, value in row.items()} for row in rows)
    return file.getvalue()


def _csv_cell(value: object) -> object:
    """A value for a spreadsheet; a text that one would take for a formula is quoted by an apostrophe.

    >>> _csv_cell("=HYPERLINK(1)"), _csv_cell(-0.5), _csv_cell("-"), _csv_cell([1])
    ("'=HYPERLINK(1)", -0.5, '-', '[1]')
    """
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, str):
        text = printable(value)
        return f"'{text}" if len(text) > 1 and text[0] in "=+-@\t\r" else text
    return value


def _flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names.

    >>> _flatten({"em": 0.5, "tokens": {"prompt": 7, "completion": 1}})
    {'em': 0.5, 'tokens.prompt': 7, 'tokens.completion': 1}
    """
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def results(environments: Sequence[Environment], relative: Callable[[Path], str]) -> list[dict[str, Any]]:
    """The lines of `results.csv`, one for each run; `relative` gives the path of its folder in the file."""
    lines = []
    for environment in environments:
        for row in environment.rows:
            for run in row.runs:
                head = {"folder": relative(run.folder), "table": environment.title, "row": row.name}
                judged = {name: value for name, value in (judgement(run) or {}).items() if name != "disagreements"}
                lines.append(head | _flatten({**(run.summary or {}), "judge": judged}))
    return lines


def results_table(summaries: list[dict[str, Any]], title: str) -> Table:
    """Summaries as a table of at most 80 columns."""
    table = Table(
        title=title,
        caption=("* is given the golds. " if any(row["privileged"] for row in summaries) else "")
        + "In %: exact match with its interval, evidence stored and in view when its question was resolved. "
        "Per episode: steps, creates, faults.",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("policy", overflow="fold")
    for heading in ("EM", "95 % CI", "stored", "in view", "steps", "creates", "faults"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in summaries:
        recall = row["evidence_recall"]
        table.add_row(
            escape(row["label"]) + ("*" if row["privileged"] else ""),
            *(_COLUMNS[name](row) for name in ("EM", "95 % CI")),
            *(_percent(recall[stage]) for stage in ("stored", "retrieved")),
            f"{row['steps']:.1f}",
            f"{row['operations'].get('create', 0):.1f}",
            f"{sum(row['faults'].values()):.1f}",
        )
    return table


def answers_table(records: Sequence[dict[str, Any]]) -> Table:
    """The answers to questions without a gold, which are in no mean."""
    table = Table(title="Answers that no gold grades", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("episode", "question", "answer"):
        table.add_column(heading, overflow="fold")
    for record in records:
        for question in record["questions"]:
            if question["em"] is None:
                answer = "–" if question["prediction"] is None else question["prediction"]
                table.add_row(str(record["episode"]), escape(question["id"]), escape(answer))
    return table
