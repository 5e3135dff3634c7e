"""The picture of a training run: what was gained, and what the policy does otherwise than before."""

from __future__ import annotations

from pathlib import Path

from atommem_env.errors import DataError, MissingDependency
from eval.run_folder import read_jsonl

_KINDS = ("create", "read", "update", "delete", "scratchpad", "answer")


def draw_curve(metrics: Path, picture: Path) -> None:
    """Draws the `metrics.jsonl` of a GRPO run: exact match, operations a turn, and faults, over steps.

    Raises:
        DataError: no step was logged.
        MissingDependency: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency(f"A picture needs {error.name!r}: pip install 'atommem[plots]'.") from error
    lines = read_jsonl(metrics)
    steps = [line for line in lines if "reward" in line]
    if not steps:
        raise DataError(f"Expected the metrics of at least one step in {metrics}, found none.")
    figure = Figure(figsize=(7.0, 8.0), layout="constrained")
    gain, operations, faults = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1))
    at = [line["step"] for line in steps]

    gain.plot(at, [100 * line["reward"] for line in steps], color="0.75", linewidth=1, label="rollouts, sampled")
    evaluated = [line for line in lines if "eval_em" in line]
    if evaluated:
        points = [line["step"] for line in evaluated]
        low, high = zip(*(line["eval_em_ci95"] for line in evaluated), strict=True)
        gain.fill_between(points, [100 * em for em in low], [100 * em for em in high], alpha=0.2, linewidth=0)
        gain.plot(points, [100 * line["eval_em"] for line in evaluated], marker="o", label="held out, greedy (95 % CI)")
    gain.set_ylabel("exact match [%]")
    gain.set_ylim(bottom=0)
    gain.legend(loc="lower right", frameon=False)

    for kind in _KINDS:
        if any(kind in line["operations"] for line in steps):
            operations.plot(at, [line["operations"].get(kind, 0.0) for line in steps], label=kind)
    operations.set_ylabel("operations a turn")
    operations.set_ylim(0, 1.25 * operations.get_ylim()[1])  # the legend has the room above
    operations.legend(loc="upper right", frameon=False, ncols=3)

    faults.plot(at, [line["faults"] for line in steps], color="tab:red")
    faults.set_ylabel("faults an episode")
    faults.set_ylim(bottom=0)
    faults.set_xlabel("GRPO step")
    for axes in (gain, operations, faults):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(picture, dpi=130)
