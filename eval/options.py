"""The configuration of an evaluation, and of every command that plays: the environment, the policy, the episodes."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from agents.chat_policy import GREEDY
from atommem_env.env import AtomMemEnv
from atommem_env.errors import SettingError
from atommem_env.make import find_spec, make_env
from atommem_env.tasks import Source, source_options

# settings whose values are text, and so no JSON
_TEXTS = {"dialect", "durability", "embedder", "render_mode", "reward", "source", "store", "tokenizer"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvConfig:
    """The environment, and how a language model plays it. Options left out have the environment's defaults."""

    env_id: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ENV_ID")]
    """Environment: AtomMem-Synthetic, AtomMem-HotpotQA, AtomMem-2WikiMultiHopQA, AtomMem-MuSiQue, AtomMem-Files, AtomMem-Custom
    (with --source), or module:ID of one that your module registers."""
    split: str | None = None
    """Split of the dataset."""
    data: Path | None = None
    """Questions file in the dataset's official form, instead of an import; for AtomMem-Files, your questions."""
    corpus: Path | None = None
    """Paragraphs file (a line {"title", "text"} each) to fill haystacks from."""
    num_docs: int | None = None
    """Documents in each context."""
    questions: int | Literal["sampled"] | None = None
    """Questions in each task; sampled: one with probability 1/2, two to ten with 1/18 each."""
    files: tuple[Path, ...] = ()
    """Files, or folders of files, for AtomMem-Files to read."""
    source: str | None = None
    """Your own tasks, for AtomMem-Custom: module:attribute of a task source, of a function that returns one, or of a list of
    tasks."""
    dialect: str | None = None
    """How operations are written: tags, public_code, tool_calls, or module:attribute."""
    reward: str | None = None
    """Reward of an episode: exact_match, f1, or module:attribute of a function of its summary."""
    embedder: str | None = None
    """Embedder: hashing, minilm, st:MODEL (of sentence-transformers), openai:MODEL (an OpenAI-compatible service, at
    OPENAI_EMBEDDING_BASE_URL or else OPENAI_BASE_URL), or module:attribute."""
    durability: str | None = None
    """off; or store every entry in the folder's memory/, at the end of each episode (episode) or after each reply (step)."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Any setting of the environment, for example top_k=12 or operations=["create","read"]; `atommem settings ENV_ID` lists
    them."""
    layout: str = "shared_prefix"
    """Prompt layout of an observation for a language model: shared_prefix, terse for small models, public_code:PATH, or
    module:attribute."""
    temperature: float = GREEDY.temperature
    """Sampling temperature of a language model; 0 is greedy."""
    max_new_tokens: int = GREEDY.max_new_tokens
    """Token limit of each reply of a language model; a longer one is truncated."""
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
            options[name] = value if name in _TEXTS else _value(value)
        default = next(field.default for field in fields(self) if field.name == "split")
        if "split" in options and self.split == default and not has_splits(self.env_id, options.get("source", source)):
            del options["split"]
        return options

    def make_env(self, **options: Any) -> AtomMemEnv:
        """The environment; `options` replace those of the same name."""
        return make_env(self.env_id, **self.env_options() | options)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayConfig(EnvConfig):
    """Which episodes a policy plays, and where the results are written."""

    policy: str = "oracle"
    """Policy: a name from `atommem policies`, or module:attribute."""
    out: Path
    """Run folder."""
    episodes: int = 50
    """Number of episodes."""
    seed: int = 0
    """Seed of the tasks, their documents and the policy's random choices."""
    reply_timeout: float | None = None
    """Seconds within which the policy must reply each time, or the run ends with an error; no limit unless given."""
    thinking: bool = False
    """Let a language model think before it replies, if it can; max_new_tokens then includes the thinking."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig(PlayConfig):
    """Configuration of an evaluation. Options left out have the environment's defaults."""

    out: Path = Path("runs/eval")
    """Run folder."""
    label: str | None = None
    """Name of this run in tables, instead of the policy's name."""
    environment: tyro.conf.Suppress[str | None] = None
    """Name of its environment in tables; set by recipes."""
    dry_run: bool = False
    """Check the settings, and print how much there is to reply to and to read; play nothing, and load no model."""
    workers: int = 0
    """Number of Ray workers, each with --in-flight episodes and an equal share of the GPUs, on a running Ray cluster
    (RAY_ADDRESS) or else on this machine; 0: play in this process. All machines must have the working folder, --out and the
    data."""
    resume: bool = False
    """Resume an interrupted run in the same folder: only the missing episodes are played."""
    trust: bool = False
    """Import the modules that the run of --like, or the atommem.json of a model, names; they run code."""


def has_splits(env_id: str, source: Source | None) -> bool:
    """Whether the task source of an environment has an option `split`; `source` takes the place of the registered one."""
    source = find_spec(env_id).kwargs.get("source") if source is None else source
    return source is not None and "split" in source_options(source)


def _value(text: str) -> Any:
    """The JSON value of a text, or the text itself if it is not JSON.

    >>> _value("12"), _value("public_code")
    (12, 'public_code')
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
