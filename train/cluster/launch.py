"""`atommem train cluster RECIPE`: a training run on a cluster, from its checks to its model.

    atommem train cluster qwen3-8b-hotpotqa --dry-run              # the checks, then every command; starts nothing
    atommem train cluster qwen3-8b-hotpotqa --out runs/qwen3       # this machine's GPUs, a Ray of the run's own
    atommem train cluster qwen3-8b-2-nodes --out /shared/runs/qwen3 --ray-address http://HEAD:8265  # those of a Ray that runs

A recipe is one of `configs/cluster/`, or a TOML file; any of its settings can be given on the command line as well, and flags
of OpenRLHF after a `--`. In order: preflight; the folder `--out`, which all machines must see under the same path, with
`config.json` and the prompts; the embedding service, where the recipe has one; the job, followed to its end; the curve.
However that ends, service and job are stopped. The folder then holds what `atommem grpo` leaves, and `job.log`, `embedding.log`;
`checkpoints/` is DeepSpeed's, which unpickles it: with `--resume` such a folder of someone else could run code of theirs.

Two other ways to start the same job. By hand: `--prepare` writes the folder and prints the commands that it did not run. On
Slurm: `sbatch --nodes=2 --gpus-per-node=8 train/cluster/slurm.sh RECIPE …`, with the same words (`--dry-run` prints it in full).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from atommem_env.errors import DataError, JobFailed, SettingError
from atommem_env.plugins import MODULES
from atommem_env.redaction import without_secrets
from atommem_env.usage_reports import USAGE_REPORTS_OFF
from eval.progress import step_progress
from eval.provenance import add_session
from eval.run_folder import read_jsonl, write_atomic
from train.cluster.jobs import (
    SLURM,
    EmbeddingService,
    Job,
    LocalJob,
    RayJob,
    check_running,
    embedding_command,
    ended_by_signals,
    own_address,
    wait_for,
)
from train.cluster.machines import Machines
from train.cluster.preflight import (
    Plan,
    check_embedder,
    check_machines,
    check_services,
    make_plan,
    task_source,
)
from train.cluster.recipe import (
    RUN_VARIABLE,
    ClusterGRPOConfig,
    add_card,
    openrlhf_flags,
    read_recipe,
    recipe_names,
    write_prompts,
    write_run_card,
)
from train.curve import draw_curve
from train.estimate import estimate_table
from train.grpo import METRICS, report_end
from train.overlap import overlap_warning
from train.settings import open_run

_POLL = 2.0  # seconds between looks at the job
# -P: else a `train.py` or an `agents/` of the working folder would be imported instead of ours.
_JOB = ["-P", "-m", "train.cluster.job"]
_SECRETS = ("OPENAI_API_KEY", "WANDB_API_KEY")
# Variables of this process that the job gets.
_PASSED_ON = ("OPENAI_BASE_URL", "OPENAI_EMBEDDING_BASE_URL", *USAGE_REPORTS_OFF, *_SECRETS)
_FOLDERS = ("ATOMMEM_DATA", MODULES)  # likewise, as absolute paths


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """A run, and how it is started."""

    run: ClusterGRPOConfig
    ray_address: str | None = None
    """Dashboard of the Ray to join, for example http://head:8265; else one is started on this machine, for this run alone."""
    dry_run: bool = False
    """Check the recipe and print every command; nothing is started, nothing is written."""
    prepare: bool = False
    """Write the run's folder and print the commands to type; nothing is started."""


def call(command: str, function: Any, words: Sequence[str]) -> None:
    """Parses `RECIPE [options] [-- flags of OpenRLHF]` and hands the `LaunchConfig` to `function`.

    Raises:
        SettingError: as in `read_recipe`.
    """
    notes = f"RECIPE is one of: {', '.join(recipe_names())}; or a TOML file of yours.\n" if recipe_names() else ""
    notes += "What --set and --openrlhf name is added to the recipe's; flags of OpenRLHF can also follow a --."
    words, flags = _split(words)
    name = words[0] if words and not words[0].startswith("-") else None
    if name is None and not {"-h", "--help"} & set(words):
        raise SettingError(f"RECIPE comes first: atommem {command} RECIPE [options]. {notes}")
    recipe = ClusterGRPOConfig(env_id="ENV_ID") if name is None else read_recipe(name)
    config: LaunchConfig = tyro.cli(
        LaunchConfig,
        default=LaunchConfig(run=recipe),
        prog=f"atommem {command} {name or 'RECIPE'}",
        description=f"{inspect.getdoc(function)}\n\n{notes}",
        args=words[1:] if name else words,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    run = dataclasses.replace(
        config.run,
        set=_added(recipe.set, config.run.set),
        openrlhf=_added(recipe.openrlhf, config.run.openrlhf) + flags,
    )
    function(dataclasses.replace(config, run=run))


def _added(before: tuple[str, ...], given: tuple[str, ...]) -> tuple[str, ...]:
    return before if given == before else before + given  # of two values the later one counts


def _split(words: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """
    >>> _split(["tiny", "--steps", "3", "--", "--ds.zpg", "8"])
    (['tiny', '--steps', '3'], ('--ds.zpg', '8'))
    """
    end = words.index("--") if "--" in words else len(words)
    return list(words[:end]), tuple(words[end + 1 :])


def main(config: LaunchConfig) -> None:
    """Train a model on a cluster: checks, Ray, the embedding service, the job, its progress and its end."""
    launch(config, Console(), Console(stderr=True))


def launch(config: LaunchConfig, out: Console, err: Console) -> None:
    """Checks a run and starts it, or only shows what would be started.

    Args:
        out: where results and commands are printed.
        err: where progress is shown.

    Raises:
        SettingError: preflight rejected the run, or its folder is not as it must be.
        JobFailed: the job ended before it was done.
    """
    plan, address = make_plan(with_absolute_paths(config.run)), config.ray_address
    run = plan.run
    if run.nodes > 1 and not (address or config.dry_run or config.prepare):
        raise SettingError(
            f"This run takes {run.nodes} machines: start Ray on them and give --ray-address http://HEAD:8265, or use {SLURM}."
        )
    if config.dry_run or config.prepare:
        out.print(estimate_table(run, plan.size, plan.task, None))
        if config.prepare:
            write_folder(run)
        for line in commands(plan, address):
            out.print(line, soft_wrap=True, markup=False, highlight=False)
        return
    machines = Machines.at(address)
    check_machines(plan, machines)
    check_services(plan)
    out.print(estimate_table(run, plan.size, plan.task, machines.gpu_memory))
    write_folder(run)
    carry_out(plan, address, err)
    add_card(run)
    draw_curve(run.out / METRICS, run.out / "curve.png")
    report_end(run, out)
    serve = shlex.join(["vllm", "serve", str(run.out / "model"), "--max-model-len", str(run.max_tokens)])
    out.print(f"Serve it:\n  {serve}", soft_wrap=True, markup=False, highlight=False)


def carry_out(plan: Plan, address: str | None, console: Console) -> None:
    """Starts what a run in a written folder needs, follows its job, and stops all of it, whatever happens.

    Raises:
        JobFailed: the job, or the embedding service, ended before it was done.
    """
    run = plan.run
    words = [*_JOB, *openrlhf_flags(run, plan.model)]
    with contextlib.ExitStack() as stack, ended_by_signals():
        service = None
        if run.embedding_model:
            service = EmbeddingService(run, own_address(address))
            stack.callback(service.stop)
            wait_for(service, console)
            os.environ["OPENAI_EMBEDDING_BASE_URL"] = service.url  # of this process, which checks it, and so of the job
            check_embedder(run)
        job: Job
        if address is None:
            own_ray = {"RAY_ADDRESS": "local"}  # else it would join one that runs on this machine already
            job = LocalJob([sys.executable, *words], job_environment(run) | own_ray, run.out / "job.log")
        else:
            job = RayJob(address, ["python", *words], job_environment(run), run.out / "job.log")
        stack.callback(job.stop)
        follow(run, job, service, console)


def with_absolute_paths(run: ClusterGRPOConfig) -> ClusterGRPOConfig:
    """The run with paths that mean the same in any folder: its job does not run in this one."""
    paths: dict[str, Any] = {
        name: path.resolve() for name in ("out", "data", "corpus") if (path := getattr(run, name)) is not None
    }
    if Path(run.model).is_dir():
        paths["model"] = str(Path(run.model).resolve())
    for name in ("layout", "embedder"):
        kind, _, folder = (getattr(run, name) or "").partition(":")
        if kind in ("public_code", "st") and Path(folder).is_dir():
            paths[name] = f"{kind}:{Path(folder).resolve()}"
    return dataclasses.replace(run, **paths, files=tuple(path.resolve() for path in run.files))


def write_folder(run: ClusterGRPOConfig) -> None:
    """Writes all that the job reads: `config.json` and the prompts.

    Raises:
        SettingError: as in `open_run`.
        DataError: a split has no tasks.
    """
    config = open_run(run)
    sources = []
    for split in (run.split, run.eval_split)[: 2 if run.eval_every else 1]:
        source = task_source(run, split)
        if not len(source):
            raise DataError(f"The {source.dataset} source has no tasks in {split!r}; choose another split.")
        sources.append(source)
    warning = overlap_warning(sources[0], sources[1]) if run.eval_every else None
    if warning:
        Console(stderr=True).print(warning, soft_wrap=True, markup=False, highlight=False)
    write_prompts(run, len(sources[0]), len(sources[-1]))
    write_run_card(run)
    write_atomic(run.out / "config.json", config)
    add_session(run.out)


def job_environment(run: ClusterGRPOConfig) -> dict[str, str]:
    """The variables that every process of the job must have.

    Modules of your own (`module:attribute`) are found in the folder that `ATOMMEM_MODULES` names; where it is not set, it becomes
    this process's working folder.
    """
    folders = {MODULES: ".", **{name: os.environ[name] for name in _FOLDERS if os.environ.get(name)}}
    return (
        {RUN_VARIABLE: str(run.out)}
        | {name: str(Path(folder).resolve()) for name, folder in folders.items()}
        | {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    )


# -------------------------------------------------------------------------------------------------------------- commands


def commands(plan: Plan, address: str | None) -> Iterator[str]:
    """What a launch would run, as lines for a shell; secrets are named, not shown.

    A run of several machines without an address is shown with the placeholder HEAD.
    """
    run = plan.run
    if plan.missing_model:
        yield f"# {plan.missing_model}"
    if address is None and run.nodes > 1:
        address = "http://HEAD:8265"
    environment = job_environment(run)
    if run.embedding_model:
        host = "127.0.0.1" if address is None else socket.gethostname()
        environment["OPENAI_EMBEDDING_BASE_URL"] = f"http://{host}:8100/v1"
        yield "# the embedding service; the launcher takes a free port, and waits until it answers"
        service = shlex.join(embedding_command(run, host, 8100))
        yield f"{service} &> {shlex.quote(str(run.out / 'embedding.log'))} &"
    words = ["python", *_JOB, *openrlhf_flags(run, plan.model)]
    yield "# the job; --prepare writes the folder that it reads"
    if address is None:
        environment["RAY_ADDRESS"] = "local"
        given = " ".join(f"{name}={_shown(name, value)}" for name, value in environment.items())
        yield f"{given} \\\n{_lines(words)}"
    else:
        secrets = [name for name, value in environment.items() if _is_secret(name, value)]
        shown = {name: f"${name}" if name in secrets else value for name, value in environment.items()}
        text = shlex.quote(json.dumps({"env_vars": shown}))
        for name in secrets:  # ends the single quotes before it, so that the shell puts in the value
            text = text.replace(f'"${name}"', f'"\'"${name}"\'"')
        yield f"ray job submit --address {address} --runtime-env-json {text} -- \\\n{_lines(words)}"
    yield "# or all of this by Slurm, with the words of this command"
    yield f"sbatch --nodes={run.nodes} --gpus-per-node={run.gpus_per_node} {shlex.quote(str(SLURM))} RECIPE …"


def _shown(name: str, value: str) -> str:
    return f'"${name}"' if _is_secret(name, value) else shlex.quote(value)


def _is_secret(name: str, value: str) -> bool:
    """Whether a variable's value is a key, or an address with a password or a key in it."""
    return name in _SECRETS or (name.endswith("_BASE_URL") and without_secrets(value) != value)


def _lines(words: Sequence[str]) -> str:
    r"""A command with every option on a line of its own.

    >>> print(_lines(["python", "-m", "job", "--a", "1 2", "--b"]))
    python -m job \
      --a '1 2' \
      --b
    """
    return re.sub(r" (--[a-z])", r" \\\n  \1", shlex.join(words))


# -------------------------------------------------------------------------------------------------------------- progress


def follow(run: ClusterGRPOConfig, job: Job, service: EmbeddingService | None, console: Console) -> None:
    """Shows the job's progress until it has ended.

    Raises:
        JobFailed: the job failed, or the embedding service ended under it.
    """
    printed = 0
    with step_progress(console) as progress:
        bar = progress.add_task("GRPO", total=run.steps, status="starting")
        running = True
        while running:
            running = check_running("The job", job)
            if running and service and not check_running("The embedding service", service):
                raise JobFailed(f"The embedding service ended. Its log is {service.log}.")
            step, text = _progress(run)
            progress.update(bar, completed=step, status=text)
            if step != printed and not console.is_terminal:  # in a file there is no bar
                printed = step
                console.print(f"step {step} of {run.steps}: {text}", highlight=False)
            if running:
                time.sleep(_POLL)


def _progress(run: ClusterGRPOConfig) -> tuple[int, str]:
    """The last step that was logged, and its figures."""
    lines = read_jsonl(run.out / METRICS)
    steps = [line for line in lines if "reward" in line]
    if not steps:
        return 0, "starting"
    best = max((line["eval_em"] for line in lines if "eval_em" in line), default=None)
    return steps[-1]["step"], f"reward {steps[-1]['reward']:.3f}" + (
        "" if best is None else f", best held-out EM {best:.3f}"
    )
