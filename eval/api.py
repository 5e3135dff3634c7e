"""Evaluation from Python: `atommem_env.evaluate(policy, env, episodes=…)`, the equivalent of `atommem eval`.

import atommem_env

def policy(observation):
    return "<final_answer>unknown</final_answer>"

result = atommem_env.evaluate(policy, "AtomMem-Synthetic", episodes=100)
print(result.em, result.ci95)
print(result.compare(atommem_env.evaluate("oracle", "AtomMem-Synthetic", episodes=100)))
result.save("runs/mine")
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import gymnasium as gym
import pyarrow as pa
from rich.console import Console

from agents.chat_policy import ChatModel
from atommem_env.env import AtomMemEnv
from atommem_env.errors import SettingError
from atommem_env.make import make_env
from atommem_env.paths import remove_with, temporary_folder
from atommem_env.plugins import name_of
from atommem_env.types import Task, TaskSource
from eval.command_line import default_fields
from eval.compare import compare, read_run
from eval.options import EnvConfig, EvalConfig, PlayConfig
from eval.played_as import read_card
from eval.players import LocalPlayer, Parts, PolicyLike
from eval.run import evaluate as evaluate_config
from eval.run import evaluate_async as evaluate_config_async
from eval.run_folder import read_json, read_records, require_empty_dir, require_trusted

EnvLike = str | gym.Env[Any, Any] | Task | Sequence[Task] | TaskSource
_Config = TypeVar("_Config", bound=PlayConfig)
# Fields of a configuration that are options of the environment.
_ENV_FIELDS = {field.name for field in dataclasses.fields(EnvConfig)} - {
    "layout",
    "temperature",
    "max_new_tokens",
    "in_flight",
}


class Result:
    """The result of an evaluation, read from its run folder on access.

    Args:
        folder: of a finished run, written by `atommem eval --out` or `save`.

    Raises:
        SettingError: there is no finished run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "summary.json"
        if not path.is_file():
            raise SettingError(
                f"{self.folder} has no finished run: expected summary.json in it; resume the run with "
                "`atommem eval --resume`, or name another folder."
            )
        self.summary: dict[str, Any] = read_json(path)

    @property
    def em(self) -> float | None:
        """Exact match: the share of questions answered correctly."""
        em: float | None = self.summary["em"]
        return em

    @property
    def ci95(self) -> tuple[float, float] | None:
        """The 95 % interval of `em`, by resampling whole tasks."""
        interval = self.summary["em_ci95"]
        return None if interval is None else (interval[0], interval[1])

    @property
    def episodes(self) -> list[dict[str, Any]]:
        """A record for each episode, see `eval.metrics.episode_record`."""
        return read_records(self.folder / "episodes.jsonl")

    def table(self) -> pa.Table:
        """The episodes as an Arrow table, one row each; `.to_pandas()` converts it into a data frame."""
        return pa.Table.from_pylist(self.episodes)

    def save(self, folder: str | Path) -> Path:
        """Copies the run folder, memory included, to a new or empty folder, for `atommem compare`, `report` and `trace`.

        Raises:
            SettingError: the folder is not empty.
        """
        require_empty_dir(Path(folder))
        return Path(shutil.copytree(self.folder, folder, dirs_exist_ok=True))

    def compare(self, other: Result) -> dict[str, Any]:
        """Compares `other` with this run on the same episodes, see `eval.compare.compare`; differences are `other` − this.

        Raises:
            SettingError: the runs have different episodes.
        """
        return compare(read_run(self.folder), read_run(other.folder))

    def __repr__(self) -> str:
        em = "no graded question"
        if self.em is not None and self.ci95 is not None:
            low, high = self.ci95
            em = f"EM {100 * self.em:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        return f"Result({self.summary['label']} on {self.summary['environment']}: {em}, {self.summary['episodes']} episodes)"


def evaluate(
    policy: PolicyLike,
    env: EnvLike | None = None,
    *,
    episodes: int = 50,
    seed: int = 0,
    out: str | Path | None = None,
    model: str | ChatModel | None = None,
    progress: bool = True,
    **options: Any,
) -> Result:
    """Plays `episodes` episodes of an environment, many at the same time, and returns the result.

    Args:
        policy: a name from `atommem policies`, `module:attribute`, a function from observation to reply, a `Policy`, a chat
            model as an AtomMem agent, or, with `model`, a prompting method.
        env: an id; an environment of `gym.make`, whose own store and episode are not touched; or your own tasks: one or more
            `Task`, or a `TaskSource`. By default the one that a trained model's folder names, else AtomMem-Synthetic.
        seed: of the tasks, their documents and the policy's random choices.
        out: run folder; by default a temporary one, removed with the result unless it is saved.
        model: for a prompting method: a name, or an object.
        progress: whether to draw a progress bar on stderr.
        options: of `atommem eval`, with underscores (`layout`, `temperature`, `max_new_tokens`, `label`, `in_flight`, …), and of
            the environment.

    Raises:
        SettingError: an option is invalid.
        AtomMemError: the environment, the policy or the model cannot be made.
        Exception: raised by the policy, the embedder or the store.
    """
    folder = temporary_folder("run") if out is None else Path(out)
    config, parts = configure(
        EvalConfig, policy, env, model, options | {"out": folder, "episodes": episodes, "seed": seed}
    )
    player = None if config.workers and parts == Parts() else LocalPlayer(parts)
    if config.workers and player:
        raise SettingError(
            "workers are other processes: give policy, model, layout and environment by name, not as objects."
        )
    evaluate_config(config, console_for(progress), player=player)
    return _result(folder, temporary=out is None)


async def evaluate_async(
    policy: PolicyLike,
    env: EnvLike | None = None,
    *,
    episodes: int = 50,
    seed: int = 0,
    out: str | Path | None = None,
    model: str | ChatModel | None = None,
    progress: bool = True,
    **options: Any,
) -> Result:
    """`evaluate` in the caller's event loop, for a policy whose client is bound to it."""
    folder = temporary_folder("run") if out is None else Path(out)
    config, parts = configure(
        EvalConfig, policy, env, model, options | {"out": folder, "episodes": episodes, "seed": seed}
    )
    if config.workers:
        raise SettingError("workers are other processes, without the caller's event loop; use evaluate.")
    await evaluate_config_async(config, LocalPlayer(parts), console_for(progress))
    return _result(folder, temporary=out is None)


def configure(
    kind: type[_Config], policy: PolicyLike, env: EnvLike | None, model: str | ChatModel | None, options: dict[str, Any]
) -> tuple[_Config, Parts]:
    """A command's configuration from Python arguments, and the objects that it cannot contain.

    Args:
        kind: class of the configuration.
        options: fields of `kind`, and options of the environment.

    Raises:
        SettingError: an option of the environment is given together with an environment object.
    """
    recorded: tuple[str, ...] = ()
    if issubclass(kind, EvalConfig) and isinstance(policy, str) and (card := read_card(policy)):
        require_trusted(card.values, card.path, trust=bool(options.get("trust")))
        if isinstance(env, str | None):
            fields = default_fields(None, card, env)
        else:
            fields = {"layout": card.layout, "max_new_tokens": card.max_new_tokens}
        env, recorded = fields.pop("env_id", env), fields.pop("set", ())
        options = fields | options
    env = "AtomMem-Synthetic" if env is None else env
    options = dict(options)
    layout = None if isinstance(options.get("layout", ""), str) else options.pop("layout")
    own = {field.name for field in dataclasses.fields(kind)}
    of_env = {name: options.pop(name) for name in list(options) if name not in own or name in _ENV_FIELDS}
    name = policy if isinstance(policy, str) else name_of(policy)
    made: gym.Env[Any, Any] | None = None
    if isinstance(env, gym.Env):
        made = env
        if of_env:
            raise SettingError(
                f"The environment exists already: give {', '.join(sorted(of_env))} to gym.make, or give its id as env."
            )
        inner = env.unwrapped
        env_id = inner.env_id if isinstance(inner, AtomMemEnv) else type(inner).__name__
        config = kind(env_id=env_id, policy=name, **options)
    else:
        if not isinstance(env, str):
            of_env["source"], env = env, "AtomMem-Custom"
        plain = {key: value for key, value in of_env.items() if _is_plain(value)}
        fields = {key: plain.pop(key) for key in list(plain) if key in own}
        pairs = tuple(f"{key}={json.dumps(value)}" for key, value in plain.items())
        config = kind(env_id=env, policy=name, set=(*recorded, *pairs), **fields, **options)
        objects = {key: value for key, value in of_env.items() if not _is_plain(value)}
        if objects:
            made = make_env(
                env, **{"store": str(config.out / "memory")} | config.env_options(objects.get("source")) | objects
            )
    given = None if isinstance(policy, str) else policy
    return config, Parts(policy=given, model=model, layout=layout, env=made)


def _is_plain(value: object) -> bool:
    """Whether the value can be given on the command line."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, str | int | float | Path)


def console_for(progress: bool) -> Console:
    return Console(stderr=True, quiet=not progress)


def _result(folder: Path, *, temporary: bool) -> Result:
    result = Result(folder)
    if temporary:
        remove_with(result, folder)
    return result
