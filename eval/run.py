"""`atommem eval`: one policy on one environment.

    atommem eval AtomMem-Synthetic --policy oracle --episodes 50 --out runs/oracle

The folder `--out` then holds `config.json` (what was asked for), `episodes.jsonl` (a line an episode; the same bytes for the
same configuration), `costs.jsonl` (what the clock and a model's service decide: a line an episode, in seconds),
`summary.json` (the numbers) and `memory/` (every entry written, a LanceDB folder).

Many policies on many environments: `eval.recipe`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

from rich.console import Console
from rich.progress import (
    Progress,
)

import atommem_env  # noqa: F401  (registers the environments)
from agents.chat_policy import Sampling
from agents.policy import Policy
from agents.registry import load_policy
from agents.rollout import Driver, EpisodeSpec, episode_specs, run_blocking
from atommem_env.env import AtomMemEnv
from atommem_env.errors import SettingError
from atommem_env.make import make_by_id
from atommem_env.tasks import source_options
from atommem_env.tokens import get_tokenizer
from atommem_env.types import Rollout
from eval.metrics import SCHEMA_VERSION, episode_cost, episode_record, summarise, summarise_costs
from eval.options import EvalConfig, PlayConfig
from eval.progress import _episode_bar
from eval.report.tables import results_table
from eval.run_folder import _open_run, to_jsonl, write_atomic
from eval.workers import Workers


def evaluate(
    config: EvalConfig,
    console: Console | None = None,
    *,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """Runs an evaluation and returns what `summary.json` holds.

    Args:
        console: where a progress bar is drawn; stderr unless told.
        progress: a display that is running already, which gets the bar instead.
        workers: who plays; `config.workers` new ones unless told, and with none of those this process.

    Raises:
        SettingError: the folder holds another run, or an interrupted one and `resume` is off.
        JobFailed: workers died, see `Workers.play`.
        Exception: what the policy, the embedder or the store raised. Finished episodes are kept for `resume`.
    """
    if workers:
        resolved_config, privileged, length = workers.open(prepare_evaluation, config)

        def play_there(specs: Mapping[int, EpisodeSpec], rewards: Sequence[float], finished: _Finished) -> None:
            name = f"{resolved_config['label']} on {config.env_id}"
            with _episode_bar(console, progress, name, len(specs), rewards) as bar:

                def ended(record: dict[str, Any], cost: dict[str, Any]) -> None:
                    finished(record, cost)
                    bar.replied(record["steps"])
                    bar.ended(record["reward"])

                workers.play(specs, config.in_flight, ended)

        return _evaluate(config, resolved_config, privileged, length, play_there)
    if config.workers:
        with Workers(config.workers) as started:
            return evaluate(config, console, progress=progress, workers=started)
    env, policy, resolved_config = prepare_evaluation(config)
    tokenizer = get_tokenizer(env.settings.tokenizer)

    def play_here(specs: Mapping[int, EpisodeSpec], rewards: Sequence[float], finished: _Finished) -> None:
        began: dict[int, float] = {}
        positions = list(specs)

        def begin(number: int) -> None:
            began[number] = time.perf_counter()

        def ended(number: int, rollout: Rollout) -> None:
            position, seconds = positions[number], time.perf_counter() - began[number]
            finished(episode_record(position, rollout, tokenizer), episode_cost(position, rollout, seconds))

        play(
            config,
            env,
            policy,
            list(specs.values()),
            console,
            progress=progress,
            label=resolved_config["label"],
            rewards_before=rewards,
            begun=begin,
            finished=ended,
        )

    with closing(env):
        return _evaluate(config, resolved_config, policy.privileged, len(env.source), play_here)


_Finished = Callable[[dict[str, Any], dict[str, Any]], None]  # told of each episode: its record, and its cost


def _evaluate(
    config: EvalConfig,
    resolved_config: dict[str, Any],
    privileged: bool,
    length: int,
    play_missing: Callable[[Mapping[int, EpisodeSpec], Sequence[float], _Finished], None],
) -> dict[str, Any]:
    """`evaluate`, by whoever plays.

    Args:
        privileged: of the policy.
        length: how many tasks there are.
        play_missing: plays episodes by their position; it is also given the rewards of those that were played before.
    """
    finished, costs = _open_run(config, resolved_config)
    specs = dict(enumerate(episode_specs(length, config.episodes, config.seed)))
    missing = {position: spec for position, spec in specs.items() if position not in finished}
    before = max((cost["elapsed"] for cost in costs.values()), default=0.0)
    started = time.perf_counter()
    lines, cost_lines = config.out / "episodes.jsonl", config.out / "costs.jsonl"
    with (
        lines.open("a", encoding="utf-8", newline="\n") as file,
        cost_lines.open("a", encoding="utf-8", newline="\n") as cost_file,
    ):

        def keep(record: dict[str, Any], cost: dict[str, Any]) -> None:
            position = record["episode"]
            finished[position] = record
            costs[position] = cost | {"elapsed": round(before + time.perf_counter() - started, 3)}
            # A kill between the two leaves a cost without its episode, which does no harm.
            for written, to in ((costs[position], cost_file), (record, file)):
                to.write(to_jsonl(written))
                to.flush()

        play_missing(missing, [record["reward"] for record in finished.values()], keep)
    records, spent = ([kept[position] for position in specs] for kept in (finished, costs))
    write_atomic(lines, "".join(map(to_jsonl, records)))
    write_atomic(cost_lines, "".join(map(to_jsonl, spent)))
    summary = {
        "env_id": config.env_id,
        "environment": config.environment or _environment(resolved_config),
        "label": resolved_config["label"],
        "policy": resolved_config["policy"],
        "privileged": privileged,
        **summarise(records),
        **summarise_costs(spent, sum(record["steps"] for record in records)),
        "settings": {
            **{name: resolved_config[name] for name in ("seed", "layout", "sampling")},
            **resolved_config["options"],
            **resolved_config["settings"],
        },
        "schema_version": SCHEMA_VERSION,
    }
    write_atomic(config.out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def _environment(resolved_config: dict[str, Any]) -> str:
    """What tables call it.

    >>> _environment({"env_id": "AtomMem-HotpotQA", "options": {"num_docs": 200}})
    'AtomMem-HotpotQA, 200 documents'
    """
    documents = resolved_config["options"].get("num_docs")
    return resolved_config["env_id"] + (f", {documents} documents" if documents else "")


def prepare_evaluation(config: EvalConfig) -> tuple[AtomMemEnv, Policy, dict[str, Any]]:
    """`prepare`, with the run's label."""
    env, policy, resolved_config = prepare(config)
    return env, policy, {**resolved_config, "label": config.label or policy.name}


def prepare(config: PlayConfig) -> tuple[AtomMemEnv, Policy, dict[str, Any]]:
    """The environment, the policy, and what tells the run from every other, as `config.json` says it; nothing is written.

    Raises:
        AtomMemError: the environment or the policy cannot be had as asked.
    """
    options = config.env_options()
    if config.episodes < 1:
        raise SettingError(f"episodes must be at least 1, got {config.episodes}.")
    env = make_by_id(config.env_id, **{"store": str(config.out / "memory"), **options}).unwrapped
    assert isinstance(env, AtomMemEnv)
    sampling = Sampling(config.temperature, config.max_new_tokens, config.thinking)
    policy = load_policy(config.policy, env.settings, sampling, config.layout)
    defaults = {name: option.default for name, option in source_options(env.source.dataset).items()}
    resolved_config = {
        "env_id": config.env_id,
        "policy": policy.name,
        "episodes": config.episodes,
        "seed": config.seed,
        "options": {**defaults, **options},  # defaults too, so that the run stays what it is when one changes
        "layout": config.layout,
        "sampling": dataclasses.asdict(sampling),
        "settings": dataclasses.asdict(env.settings),
        "schema_version": SCHEMA_VERSION,
    }
    return env, policy, json.loads(json.dumps(resolved_config))


def play(
    config: PlayConfig,
    env: AtomMemEnv,
    policy: Policy,
    specs: Sequence[EpisodeSpec],
    console: Console | None = None,
    *,
    progress: Progress | None = None,
    label: str | None = None,
    rewards_before: Sequence[float] = (),
    begun: Callable[[int], None] = lambda position: None,
    finished: Callable[[int, Rollout], None] = lambda position, rollout: None,
) -> list[Rollout]:
    """Plays `specs` in their order under a progress bar.

    Args:
        console: where the bar is drawn; stderr unless told.
        progress: a display that is running already, which gets the bar instead.
        label: what the bar calls the policy, instead of its name.
        rewards_before: of episodes that were played before, for the bar.
        begun: see `Driver.run`, as for `finished` and what is returned and raised.
    """
    name = f"{label or policy.name} on {config.env_id}"
    with _episode_bar(console, progress, name, len(specs), rewards_before) as bar:

        def ended(position: int, rollout: Rollout) -> None:
            finished(position, rollout)
            bar.ended(rollout.reward)

        return run_blocking(
            Driver.of(env).run(
                specs, policy, in_flight=config.in_flight, begun=begun, finished=ended, replied=bar.replied
            )
        )


def main(config: EvalConfig) -> None:
    """Evaluate a policy: a table here, and a folder with every number and every memory entry.

    With RECIPE.toml in the place of ENV_ID: many policies on many environments, see `atommem eval quick.toml --help`.
    """
    summary = evaluate(config)
    title = f"{config.env_id}, {summary['episodes']} episodes, {summary['questions']} questions"
    console = Console()
    console.print(results_table([summary], title))
    memory = "" if config.durability == "off" else ", memory/ (LanceDB)"
    console.print(f"Written to [bold]{config.out}[/]: summary.json, episodes.jsonl, costs.jsonl, config.json{memory}.")
