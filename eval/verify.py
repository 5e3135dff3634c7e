"""`atommem verify`: whether a run's numbers are still the numbers of what is here.

    atommem verify runs/oracle

Draws the run's tasks again, hashes its data, weights and sources again, counts its episodes in the memory store, and computes its
summary again from its episodes.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from agents.rollout import episode_specs
from atommem_env.errors import AtomMemError
from atommem_env.make import make_env
from atommem_env.plugins import is_target
from atommem_env.store.memory_store import MemoryStore
from atommem_env.store.recorder import INTERRUPTED
from atommem_env.tasks.digests import files_of, task_digest
from atommem_env.terminal import escape
from eval.compare import Run, read_run
from eval.metrics import summarise
from eval.options import EvalConfig
from eval.played_as import read_run as read_played
from eval.players import Parts, prepare
from eval.provenance import read_sessions, versions
from eval.run_folder import require_trusted


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyConfig:
    """The run to verify."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder that `atommem eval` wrote."""
    trust: bool = False
    """Import the modules that the run's config.json names; they run code."""


class Check(NamedTuple):
    """One thing that was compared."""

    name: str
    holds: bool | None  # None: it could not be compared, or does not decide
    detail: str


def verify(folder: Path, *, trust: bool = False) -> list[Check]:
    """What of a run still holds.

    Raises:
        SettingError: there is no run, an earlier version wrote it, or it names modules and `trust` is off.
    """
    run = read_run(folder)
    require_trusted(run.config, folder / "config.json", trust=trust)
    checks = [_summary(run), _versions(folder)]
    options = {**run.config["options"], "durability": "off", "embedder": "hashing"}  # nothing is played
    try:
        with closing(make_env(run.config["env_id"], **options)) as env:
            checks += [_equal("data", run.config.get("data"), files_of(env.source)), _tasks(run, env.source)]
    except AtomMemError as error:
        checks.append(Check("data", False, str(error)))
    return [*checks, _fingerprints(run, trust), _memory(run)]


def _equal(name: str, before: dict[str, str] | None, now: dict[str, str]) -> Check:
    if before is None:
        return Check(name, None, "an earlier version did not record it")
    changed = sorted(part for part in {*before, *now} if before.get(part) != now.get(part))
    return Check(
        name, not changed, f"changed: {', '.join(changed)}" if changed else ", ".join(sorted(now)) or "no files"
    )


def _summary(run: Run) -> Check:
    if run.summary is None:
        return Check(
            "summary", None, f"the run is not finished: {len(run.records)} of {run.config['episodes']} episodes"
        )
    now = json.loads(json.dumps(summarise(run.records)))
    changed = sorted(name for name, value in now.items() if name in run.summary and run.summary[name] != value)
    detail = f"not those of its episodes: {', '.join(changed)}" if changed else f"{len(run.records)} episodes"
    return Check("summary", not changed, detail)


def _versions(folder: Path) -> Check:
    sessions = read_sessions(folder)
    if not sessions:
        return Check("versions", None, "no provenance.json")
    before, now = sessions[-1]["versions"], versions()
    changed = [f"{name} {before.get(name)} → {now[name]}" for name in now if before.get(name) != now[name]]
    return Check("versions", None if changed else True, ", ".join(changed) or "the same")


def _tasks(run: Run, source: object) -> Check:
    specs = episode_specs(len(source), run.config["episodes"], run.config["seed"])  # type: ignore[arg-type]
    recorded = [record for record in run.records if record.get("task_digest")]
    if not recorded:
        return Check("tasks", None, "an earlier version did not record them")
    changed = []
    for record in recorded:
        spec = specs[record["episode"]]
        task = source.task(spec.index, spec.task_seed)  # type: ignore[attr-defined]
        if (task.id, task_digest(task)) != (record["task_id"], record["task_digest"]):
            changed.append(str(record["episode"]))
    detail = (
        f"other questions, golds or documents in episodes {', '.join(changed[:10])}"
        if changed
        else f"{len(recorded)} drawn again"
    )
    return Check("tasks", not changed, detail)


def _fingerprints(run: Run, trust: bool) -> Check:
    if "fingerprints" not in run.config:
        return Check("weights and sources", None, "an earlier version did not record them")
    if not run.config["fingerprints"]:
        return Check("weights and sources", True, "all of this package")
    try:
        played = read_played(run.folder)
        fields = played.environment() | played.playing() | {"durability": "off", "policy": run.config["policy"]}
        if not trust and is_target(run.config["policy"].partition("@")[0]):
            return Check("weights and sources", None, "the policy is a module's, which is not imported without --trust")
        driver, _, now = prepare(EvalConfig(**fields, out=run.folder), Parts())
        driver.store.close()
    except AtomMemError as error:
        return Check("weights and sources", None, str(error))
    return _equal("weights and sources", run.config["fingerprints"], now["fingerprints"])


def _memory(run: Run) -> Check:
    if run.config["options"].get("durability") == "off":
        return Check("memory", None, "not stored (durability off)")
    with closing(MemoryStore(run.folder / "memory")) as store:
        rows = {(row.task_id, row.episode_seed): row.steps for row in store.episodes() if row.status != INTERRUPTED}
    missing = [str(one["episode"]) for one in run.records if rows.get((one["task_id"], one["seed"])) != one["steps"]]
    detail = (
        f"missing or of another length: episodes {', '.join(missing[:10])}"
        if missing
        else f"{len(run.records)} episodes"
    )
    return Check("memory", not missing, detail)


def main(config: VerifyConfig) -> None:
    """Check whether a run's data, weights, sources, memory and summary are still those that it was played with."""
    checks = verify(config.run, trust=config.trust)
    table = Table(title=escape(str(config.run)), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("", "holds", "detail"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        holds = {True: "yes", False: "NO", None: "–"}[check.holds]
        table.add_row(check.name, holds, escape(check.detail))
    Console().print(table)
    if any(check.holds is False for check in checks):
        sys.exit(1)
