"""The figures of `atommem report`: one of environments that differ in their number of documents, and five of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from atommem_env.errors import MissingDependency
from atommem_env.types import OperationKind
from eval.report.rows import Environment, Plot, Row, slug

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 150

# Okabe and Ito's colours, safe for the colour-blind; black is for published figures
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # eight, so that 56 pairs of colour and marker differ
_KINDS = dict(zip(OperationKind, ("#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#CC79A7", "#009E73"), strict=True))
_STAGES = {"stored": ("stored", "#56B4E9"), "retrieved": ("in view", "#0072B2"), "answered": ("answered", "#009E73")}

_Styles = dict[str, dict[str, Any]]  # a row's name → its colour and marker, the same in all figures
_Data = list[dict[str, Any]]


def draw(environments: Sequence[Environment]) -> list[Plot]:
    """All plots of a report.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependency(f"Plots need {error.name!r}: pip install 'atommem[plots]'.") from error
    names = dict.fromkeys(row.name for environment in environments for row in environment.rows)
    looks = zip(names, cycle(_COLOURS), cycle(_MARKERS), strict=False)
    styles = {name: {"color": colour, "marker": marker} for name, colour, marker in looks}
    families: dict[str, list[Environment]] = {}
    for environment in environments:
        families.setdefault(environment.family, []).append(environment)
    with matplotlib.rc_context({"text.parse_math": False}):  # labels are literal, dollar signs included
        plots = [_em_by_documents(members, styles) for members in families.values() if len(members) > 1]
        for environment in environments:
            plots.append(_exact_match(environment))
            if environment.rows[0].numbers["evidence_recall"]["stored"] is not None:
                plots.append(_evidence(environment))
            plots += [_cost(environment, styles), _memory(environment, styles), _operations(environment)]
    return plots


def save(plot: Plot, folder: Path) -> None:
    """Writes a plot as PNG, PDF and SVG; the same plot gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context(
        {"pdf.fonttype": 42, "svg.hashsalt": plot.name}
    ):  # 42: text that can be searched and edited
        for form, metadata in (("png", {}), ("pdf", {"CreationDate": None}), ("svg", {"Date": None})):
            plot.figure.savefig(folder / f"{plot.name}.{form}", metadata=metadata)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=_DPI)


def _axes(title: str, height: float, x: str, y: str = "") -> Axes:
    axes = _figure(8.0, height).subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    return axes


def _style_axes(axes: Axes, grid: str = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.3)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def _plot(kind: str, environment: Environment, description: str, axes: Axes, data: _Data) -> Plot:
    name, caption = f"{kind}-{slug(environment.title)}", f"{environment.title}: {description}."
    return Plot(name, environment.title, caption, _add_legend(axes), data)


def _add_legend(axes: Axes) -> Any:
    """The figure, with a legend in which each label occurs once and published figures come last."""
    figure: Any = axes.figure
    handles, labels = axes.get_legend_handles_labels()
    handle_of = dict(zip(labels, handles, strict=True))
    order = sorted(handle_of, key=lambda label: "published" in label)
    figure.legend([handle_of[label] for label in order], order, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _em(row: Row) -> dict[str, float]:
    """Exact match and the ends of its interval, in %."""
    low, high = row.numbers["em_ci95"] or (math.nan, math.nan)  # which is not drawn
    em = row.numbers["em"]
    return {"em": math.nan if em is None else 100 * em, "low": 100 * low, "high": 100 * high}


def _over_steps(row: Row, name: str, *, held: bool) -> list[float]:
    """The mean over all episodes at each step; after its end an episode has 0 or, with `held`, its last value."""
    series = [record["by_step"][name] for record in row.records]
    longest = max(map(len, series))
    padded = [values + [values[-1] if held else 0] * (longest - len(values)) for values in series]
    return [fmean(step) for step in zip(*padded, strict=True)]


def _em_by_documents(members: list[Environment], styles: _Styles) -> Plot:
    title = members[0].family
    axes = _axes(title, 4.5, "documents in the context", "exact match [%]")
    data: _Data = []
    names = [name for name in styles if any(row.name == name for one in members for row in one.rows)]
    counts = [one.documents or 0 for one in members]
    for index, name in enumerate(names):
        pairs = [(one.documents, row) for one in members for row in one.rows if row.name == name]
        points = [{"row": row.display_name, "documents": documents, **_em(row)} for documents, row in pairs]
        x, em, low, high = np.array([list(point.values())[1:] for point in points], dtype=float).T
        # Each is shifted by a hundredth of the logarithmic axis, so that intervals do not hide one another.
        x *= (max(counts) / min(counts)) ** (0.01 * (index - (len(names) - 1) / 2))
        label = pairs[0][1].display_name
        axes.errorbar(x, em, [em - low, high - em], label=label, linewidth=1.5, elinewidth=1, **styles[name])
        data += points
    dashes = cycle((":", "--", "-."))
    for one in members[0].published:
        figures = {int(size): figure for size, figure in one.figures.items() if size.isdigit()}
        measured = [row.name for member in members for row in member.rows if one in row.published]
        if figures and (measured or one.drawn):
            black = {"color": "black", "marker": "o"}
            style = styles[measured[0]] | {"linestyle": "--"} if measured else black | {"linestyle": next(dashes)}
            label = f"{one.method} (published)"
            axes.plot(*zip(*figures.items(), strict=True), label=label, markerfacecolor="white", linewidth=1.2, **style)
            data += [{"row": label, "documents": size, "em": figure} for size, figure in figures.items()]
            counts += figures
    axes.set(xscale="log", ylim=(-3, 103))
    axes.set_xticks(sorted(set(counts)), [f"{count:,}" for count in sorted(set(counts))])
    axes.set_xticks([], minor=True)
    _style_axes(axes)
    caption = f"{title}: exact match against the number of documents; bars are 95 % intervals."
    return Plot(f"em-by-documents-{slug(title)}", "", caption, _add_legend(axes), data)


def _exact_match(environment: Environment) -> Plot:
    rows = environment.rows[::-1]  # the first one is drawn at the top
    axes = _axes(environment.title, 1.3 + 0.3 * len(rows), "exact match [%]")
    data: _Data = []
    for y, row in enumerate(rows):
        em, low, high = _em(row).values()
        privileged = row.numbers["privileged"]
        colour, label = ("#7F7F7F", "is given the golds") if privileged else ("#0072B2", "measured, 95 % interval")
        axes.plot([low, high], [y, y], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot(em, y, "o", color=colour, markersize=7, label=label)
        data.append({"row": row.display_name, **_em(row)})
    lines = cycle(("dotted", "dashed", "dashdot"))
    for one, figure in environment.published_em:
        if one.drawn:
            axes.axvline(figure, color="black", linewidth=1, linestyle=next(lines), label=f"{one.method} (published)")
            data.append({"row": f"{one.method} (published)", "em": figure})
        for y, row in enumerate(rows):
            if one in row.published:
                axes.plot(figure, y, "D", color="black", markerfacecolor="white", label="same method (published)")
                data.append({"row": f"{row.display_name} (published)", "em": figure})
    axes.set_yticks(range(len(rows)), [row.display_name for row in rows])
    axes.set(xlim=(-3, 103), ylim=(-0.6, len(rows) - 0.4))
    _style_axes(axes, "x")
    return _plot("em", environment, "exact match, with 95 % intervals", axes, data)


def _evidence(environment: Environment) -> Plot:
    rows = environment.rows[::-1]
    axes = _axes(environment.title, 1.3 + 0.55 * len(rows), "passages of evidence [%]")
    data: _Data = []
    for number, (stage, (label, colour)) in enumerate(_STAGES.items()):
        shares = [100 * row.numbers["evidence_recall"][stage] for row in rows]
        bars = axes.barh(np.arange(len(rows)) + 0.26 * (1 - number), shares, 0.24, color=colour, label=label)
        axes.bar_label(bars, [f"{share:.0f}" for share in shares], padding=2, fontsize=7, color="0.3")
        for row, share in zip(rows, shares, strict=True):
            data.append({"row": row.display_name, "stage": label, "passages_percent": share})
    axes.set_yticks(range(len(rows)), [row.display_name for row in rows])
    axes.set(xlim=(0, 106), ylim=(-0.6, len(rows) - 0.4))
    _style_axes(axes, "x")
    description = "where evidence was lost, from stored to in view (when a question was resolved) to answered"
    return _plot("evidence", environment, description, axes, data)


def _cost(environment: Environment, styles: _Styles) -> Plot:
    axes = _axes(environment.title, 4.2, "tokens of prompts and replies per episode", "exact match [%]")
    data: _Data = []
    for row in environment.rows:
        em, low, high = _em(row).values()
        if None in row.numbers["tokens"].values():
            continue  # not measured
        tokens = sum(row.numbers["tokens"].values())
        error = [[em - low], [high - em]]
        axes.errorbar(
            tokens, em, error, label=row.display_name, linestyle="none", markersize=8, elinewidth=1, **styles[row.name]
        )
        data.append({"row": row.display_name, "tokens": tokens, **_em(row)})
    spent = [line["tokens"] for line in data] or [1]
    least, most = min(spent) / 1.4, max(spent) * 1.4  # with a margin, as all can be within a decade
    ticks = [tick for power in range(12) for tick in (10**power, 2 * 10**power, 5 * 10**power) if least <= tick <= most]
    axes.set(xscale="log", xlim=(least, most), ylim=(-3, 103))
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    _style_axes(axes, "both")
    description = "exact match against its cost, in tokens of prompts and replies; bars are 95 % intervals"
    return _plot("cost", environment, description, axes, data)


def _memory(environment: Environment, styles: _Styles) -> Plot:
    axes = _axes(environment.title, 4.2, "step", "entries in memory, mean of all episodes")
    data: _Data = []
    for row in environment.rows:
        entries = _over_steps(row, "entries", held=True)
        steps, every = range(1, len(entries) + 1), max(1, len(entries) // 8)
        axes.plot(steps, entries, label=row.display_name, markersize=5, markevery=every, **styles[row.name])
        data += [
            {"row": row.display_name, "step": step, "entries": mean} for step, mean in zip(steps, entries, strict=True)
        ]
    axes.locator_params("x", integer=True)
    axes.set_ylim(bottom=0)
    _style_axes(axes)
    description = "entries in memory after each step, mean of all episodes; finished ones count with their last value"
    return _plot("memory", environment, description, axes, data)


def _operations(environment: Environment) -> Plot:
    columns = min(3, len(environment.rows))
    lines = -(-len(environment.rows) // columns)
    figure = _figure(2.9 * columns + 1.3, 0.6 + 1.9 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    data: _Data = []
    for axes, row in zip(panels, environment.rows, strict=False):
        means = {kind: _over_steps(row, kind, held=False) for kind in _KINDS}
        below = np.zeros(len(means[OperationKind.CREATE]))
        steps = range(1, len(below) + 1)
        for kind, heights in means.items():
            axes.bar(steps, heights, 1.0, bottom=below, color=_KINDS[kind], label=str(kind), linewidth=0)
            below = below + heights
            for step, mean in zip(steps, heights, strict=True):
                data.append({"row": row.display_name, "step": step, "kind": str(kind), "mean": mean})
        axes.set_title(row.display_name, fontsize=9)
        axes.set(xlim=(0.4, len(below) + 0.6), ylim=(0, 1.08 * max(below) or 1))
        axes.locator_params("x", nbins=5, integer=True)
        axes.locator_params("y", nbins=4)
        axes.tick_params(labelsize=8)
        _style_axes(axes)
    for axes in panels[len(environment.rows) :]:
        axes.set_visible(False)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("operations at that step, mean of all episodes", fontsize=10)
    figure.suptitle(environment.title, fontsize=12)
    description = "operations carried out at each step, mean of all episodes; each panel has its own scale"
    return _plot("operations", environment, description, panels[0], data)
