"""What is asked of an evaluation, and of every command that plays: the environment, the policy, the episodes."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import gymnasium as gym
import tyro
from gymnasium.envs.registration import EnvSpec

from agents.chat_policy import GREEDY
from atommem_env.env import AtomMemEnv
from atommem_env.errors import SettingError
from atommem_env.plugins import load_module, suggest
from atommem_env.tasks import Source, source_options


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvConfig:
    """The environment, and how a language model plays it. Options left out are the environment's own."""

    env_id: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ENV_ID")]
    """Environment: AtomMem-Synthetic, AtomMem-HotpotQA, AtomMem-2WikiMultiHopQA, AtomMem-MuSiQue, AtomMem-Files, AtomMem-Custom
    (with --source), or module:ID of one that your module registers."""
    split: str | None = None
    """Split of the dataset."""
    data: Path | None = None
    """Questions file in the dataset's official form, instead of what was imported; for AtomMem-Files, your questions."""
    corpus: Path | None = None
    """Paragraphs file ({"title", "text"} a line) that haystacks are filled from."""
    num_docs: int | None = None
    """Documents in each context."""
    questions: int | Literal["sampled"] | None = None
    """Questions in each task; sampled: one with probability 1/2, two to ten with 1/18 each."""
    files: tuple[Path, ...] = ()
    """What AtomMem-Files reads: files, or folders of them."""
    source: str | None = None
    """Tasks of your own, for AtomMem-Custom: module:attribute of a task source, of what makes one, or of a list of tasks."""
    dialect: str | None = None
    """How operations are written: tags, public_code, tool_calls, or module:attribute."""
    reward: str | None = None
    """What an episode is worth: exact_match, f1, or module:attribute of a function of its summary."""
    embedder: str | None = None
    """hashing, minilm, st:MODEL (of sentence-transformers), openai:MODEL: a service that speaks the OpenAI API, at
    OPENAI_EMBEDDING_BASE_URL or else OPENAI_BASE_URL; or module:attribute."""
    durability: str | None = None
    """off; or keep every entry in the folder's memory/, at the end of each episode (episode) or after each reply (step)."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Any other argument of the environment, for example top_k=12 or operations=["create","read"]."""
    layout: str = "shared_prefix"
    """How a language model is shown an observation: shared_prefix, terse for small models, public_code:PATH, or
    module:attribute."""
    temperature: float = GREEDY.temperature
    """Of a language model; 0 is greedy."""
    max_new_tokens: int = GREEDY.max_new_tokens
    """Of each reply of a language model; a longer one is cut."""
    in_flight: int = 64
    """Episodes played at the same time; changes the speed only."""

    def env_options(self, source: Source | None = None) -> dict[str, Any]:
        """The keyword arguments of `gym.make` that were given; a split that is a command's default, where there are splits.

        Args:
            source: an object in the place of `self.source`.
        """
        names = (
            "split",
            "data",
            "corpus",
            "num_docs",
            "questions",
            "source",
            "dialect",
            "reward",
            "embedder",
            "durability",
        )
        options = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        options |= {name: str(options[name].resolve()) for name in ("data", "corpus") if name in options}
        if self.files:
            options["files"] = [str(path.resolve()) for path in self.files]
        for pair in self.set:
            name, equals, value = pair.partition("=")
            if not equals:
                raise SettingError(f"--set takes NAME=VALUE, got {pair!r}.")
            options[name] = _value(value)
        default = next(field.default for field in fields(self) if field.name == "split")
        if "split" in options and self.split == default and not has_splits(self.env_id, options.get("source", source)):
            del options["split"]
        return options

    def make_env(self, **options: Any) -> AtomMemEnv:
        """The environment; `options` take the place of those of the same name."""
        return make_env(self.env_id, **self.env_options() | options)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayConfig(EnvConfig):
    """Which episodes a policy plays, and where what comes of them is kept."""

    policy: str = "oracle"
    """Policy: a name from `atommem policies`, or module:attribute."""
    out: Path
    """Folder of the run."""
    episodes: int = 50
    """How many episodes."""
    seed: int = 0
    """Draws the tasks, their documents and whatever a policy draws."""
    thinking: bool = False
    """Whether a language model that can think before it replies does; max_new_tokens holds what it thinks as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig(PlayConfig):
    """What an evaluation is. Options left out are the environment's own."""

    out: Path = Path("runs/eval")
    """Folder of the run."""
    label: str | None = None
    """What tables call this run, instead of the policy's name."""
    environment: tyro.conf.Suppress[str | None] = None
    """What tables call its environment; recipes say so."""
    workers: int = 0
    """Processes of Ray's that play, --in-flight episodes each, on the Ray that runs (RAY_ADDRESS) or else on one of this
    machine, with an equal share of its GPUs each; 0: this process plays. All machines must see the working folder, --out and
    the data."""
    resume: bool = False
    """Go on with an interrupted run in the same folder: only what is missing is played."""


def make_env(env_id: str, **options: Any) -> AtomMemEnv:
    """An environment by `gym.make`, without the wrappers.

    Args:
        env_id: of one that is registered, or `module:ID` of one that a module of the working folder registers.

    Raises:
        SettingError: there is no such environment, it is not one of ours, or an option cannot work.
    """
    made = gym.make(find_spec(env_id), **options).unwrapped
    if not isinstance(made, AtomMemEnv):
        raise SettingError(f"{env_id} must be an environment of AtomMem, got {type(made).__name__}.")
    return made


def has_splits(env_id: str, source: Source | None) -> bool:
    """Whether the task source of an environment has an option `split`; `source` takes the place of the registered one."""
    source = find_spec(env_id).kwargs.get("source") if source is None else source
    return source is not None and "split" in source_options(source)


def find_spec(env_id: str) -> EnvSpec:
    """What Gymnasium registered under an id, or under `module:ID` once the module is imported.

    Raises:
        SettingError: there is no such environment.
        PluginError: there is no such module.
    """
    module, colon, name = env_id.rpartition(":")
    if colon:
        load_module(module)
    try:
        return gym.spec(name)
    except gym.error.Error as error:
        ours = sorted(known for known in gym.registry if known.startswith("AtomMem-"))
        raise SettingError(
            f"There is no environment {env_id!r}{suggest(name, gym.registry) or '.'} There are {', '.join(ours)}, and module:ID "
            "of one that your module registers."
        ) from error


def _value(text: str) -> Any:
    """A JSON value where it is one, else the text itself.

    >>> _value("12"), _value("public_code")
    (12, 'public_code')
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
