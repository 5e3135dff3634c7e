"""`atommem eval`: one policy on one environment.

    atommem eval AtomMem-Synthetic --policy oracle --episodes 50 --out runs/oracle

The run folder `--out` then has `config.json` (the resolved configuration), `episodes.jsonl` (a line for each episode; the same
bytes for the same configuration), `costs.jsonl` (a line for each episode, in seconds; depends on timing and on a model's
service), `summary.json` (the numbers) and `memory/` (every entry written, a LanceDB folder).

Many policies on many environments: `eval.recipe`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress

from agents.rollout import EpisodeSpec, episode_specs
from atommem_env.errors import JobFailed
from atommem_env.terminal import escape
from eval.metrics import SCHEMA_VERSION, summarise, summarise_costs
from eval.options import EvalConfig
from eval.players import LocalPlayer, Player, PreparedRun
from eval.progress import episode_bar
from eval.provenance import add_session
from eval.report.tables import answers_table, results_table
from eval.run_folder import Record, RunFolder, read_records
from eval.workers import Workers
from eval.workload import NOTE, check_config, episode_workload


def evaluate(
    config: EvalConfig,
    console: Console | None = None,
    *,
    progress: Progress | None = None,
    player: Player | None = None,
) -> dict[str, Any]:
    """Runs an evaluation and returns the contents of `summary.json`.

    Args:
        console: for the progress bar; by default stderr.
        progress: a running display, to which the bar is added instead.
        player: plays the episodes, and stays open for another run; by default `config.workers` Ray workers, or this process.

    Raises:
        SettingError: the folder has another run, or an interrupted one and `resume` is off.
        JobFailed: workers died, see `Workers.play`.
        Exception: raised by the policy, the embedder or the store. Finished episodes are saved for `resume`.
    """
    if player is None:
        with Workers(config.workers) if config.workers else nullcontext(LocalPlayer()) as own:
            return evaluate(config, console, progress=progress, player=own)
    with player.open(config) as prepared, _evaluation(config, prepared, console, progress) as run:
        player.play(run.missing, config.in_flight, run.finished, run.replied)
    return run.summary


async def evaluate_async(config: EvalConfig, player: LocalPlayer, console: Console | None = None) -> dict[str, Any]:
    """`evaluate` in the caller's event loop, for a policy whose client is bound to it."""
    with player.open(config) as prepared, _evaluation(config, prepared, console, None) as run:
        await player.play_async(run.missing, config.in_flight, run.finished, run.replied)
    return run.summary


@dataclass(slots=True)
class _Evaluation:
    """The missing episodes of a run, and the callbacks for its player."""

    missing: dict[int, EpisodeSpec]  # by number
    finished: Callable[[Record, Record], None]
    replied: Callable[[int], None]
    summary: Record  # empty until all episodes are played


@contextmanager
def _evaluation(
    config: EvalConfig, prepared: PreparedRun, console: Console | None, progress: Progress | None
) -> Iterator[_Evaluation]:
    """Opens the run folder and a progress bar while the missing episodes are played; then writes the summary."""
    with RunFolder.claimed(config.out, prepared.resolved_config, resume=config.resume) as folder:
        add_session(config.out)
        specs = dict(enumerate(episode_specs(prepared.tasks, config.episodes, config.seed)))
        missing = {number: spec for number, spec in specs.items() if number not in folder.records}
        rewards = [record["reward"] for record in folder.records.values()]
        name = f"{prepared.resolved_config['label']} on {config.env_id}"
        with folder.appending() as append, episode_bar(console, progress, name, len(missing), rewards) as bar:

            def finished(record: Record, cost: Record) -> None:
                append(record, cost)
                bar.ended(record["reward"])

            run = _Evaluation(missing, finished, bar.replied, {})
            yield run
        scored = [number for number in specs if number in folder.records]
        if not scored:
            raise JobFailed(
                "No episode could be scored: a service refused a prompt of each; the warnings above say why."
            )
        records, costs = ([by_number[number] for number in scored] for by_number in (folder.records, folder.costs))
        run.summary = _summary(config, prepared, records, costs)
        folder.finish(scored, run.summary)


def _summary(config: EvalConfig, prepared: PreparedRun, records: list[Record], costs: list[Record]) -> Record:
    resolved = prepared.resolved_config
    return {
        "env_id": config.env_id,
        "environment": config.environment or _environment_name(resolved),
        "label": resolved["label"],
        "policy": resolved["policy"],
        "privileged": prepared.privileged,
        "unscored": config.episodes - len(records),  # episodes with a prompt that a service refuses to answer
        **summarise(records),
        **summarise_costs(costs, sum(record["steps"] for record in records)),
        "data": resolved["data"],
        "fingerprints": resolved["fingerprints"],
        "settings": {
            **{name: resolved[name] for name in ("seed", "layout", "sampling")},
            **resolved["options"],
            **resolved["settings"],
        },
        "schema_version": SCHEMA_VERSION,
    }


def _environment_name(resolved_config: Record) -> str:
    """The environment's name in tables.

    >>> _environment_name({"env_id": "AtomMem-HotpotQA", "options": {"num_docs": 200}})
    'AtomMem-HotpotQA, 200 documents'
    """
    documents = resolved_config["options"].get("num_docs")
    return resolved_config["env_id"] + (f", {documents} documents" if documents else "")


def main(config: EvalConfig) -> None:
    """Evaluate a policy: prints a table, and writes a run folder with every number and every memory entry.

    With RECIPE.toml instead of ENV_ID: many policies on many environments, see `atommem eval quick.toml --help`.
    """
    if config.dry_run:
        check_config(config)
        work = episode_workload(config).times(config.episodes)
        print(
            f"{config.episodes:,} episodes of {config.env_id}: {work.replies:,} replies, {work.tokens:,} tokens read.\n{NOTE}"
        )
        return
    summary = evaluate(config)
    title = f"{config.env_id}, {summary['episodes']} episodes, {summary['questions']} questions"
    console = Console()
    if summary["questions"]:
        console.print(results_table([summary], title))
    if summary["ungraded"]:
        console.print(answers_table(read_records(config.out / "episodes.jsonl")))
    memory = "" if config.durability == "off" else ", memory/ (LanceDB)"
    console.print(
        f"Written to [bold]{escape(str(config.out))}[/]: summary.json, episodes.jsonl, costs.jsonl, config.json, "
        f"provenance.json{memory}."
    )
    if summary["unscored"]:
        print(
            f"{summary['unscored']} of {config.episodes} episodes are unscored, since a service refused to answer one of their "
            "prompts; --resume tries them again.",
            file=sys.stderr,
        )
        sys.exit(3)
