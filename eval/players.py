"""Who plays the episodes of an evaluation: this process, or workers of Ray's (`eval.workers`)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import gymnasium as gym

from agents.chat_policy import ChatModel, Sampling
from agents.policy import Act, Policy
from agents.prompting import Method
from agents.registry import load_policy
from agents.rollout import Driver, EpisodeSpec, run_blocking
from atommem_env.env import SETTING_NAMES, AtomMemEnv
from atommem_env.errors import SettingError
from atommem_env.prompts import Layout
from atommem_env.store.memory_store import MemoryStore
from atommem_env.tokens import get_tokenizer
from atommem_env.types import EpisodeSettings, Rollout
from eval.metrics import SCHEMA_VERSION, episode_cost, episode_record
from eval.options import EvalConfig, PlayConfig
from eval.played_as import environment_record
from eval.run_folder import Record

Env = gym.Env[Any, Any]
AnyPolicy = str | Policy | Act | Method | ChatModel
Finished = Callable[[Record, Record], None]
"""Is told of each episode, in the order in which they end: its record, and its cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Objects in the place of what a configuration names."""

    policy: AnyPolicy | None = None
    model: str | ChatModel | None = None  # what a method of prompting asks
    layout: Layout | None = None
    env: Env | None = None  # its own store stays as it is


class Opened(NamedTuple):
    """A run that a player is ready to play."""

    resolved_config: Record  # what `config.json` says; tells the run from every other
    privileged: bool  # of the policy
    tasks: int  # how many there are


class Player(Protocol):
    """Plays one run at a time."""

    def open(self, config: EvalConfig) -> AbstractContextManager[Opened]:
        """A run, ready to be played until the context ends; nothing is written.

        Raises:
            AtomMemError: the environment or the policy cannot be had as asked.
        """
        ...

    def play(
        self, specs: Mapping[int, EpisodeSpec], in_flight: int, finished: Finished, replied: Callable[[int], None]
    ) -> None:
        """Plays episodes of the open run, at most `in_flight` at a time.

        Args:
            specs: by number in the run.
            replied: is called with a number of further replies, for a progress bar.

        Raises:
            Exception: whatever policy, embedder or store raised first; the other episodes are stopped.
        """
        ...


class LocalPlayer:
    """This process.

    Args:
        parts: objects in the place of what the configuration names.
    """

    def __init__(self, parts: Parts | None = None) -> None:
        self._parts = parts or Parts()

    @contextmanager
    def open(self, config: EvalConfig) -> Iterator[Opened]:
        """See `Player`."""
        self._driver, self._policy, opened = prepare_evaluation(config, self._parts)
        with closing(self._driver.store):
            yield opened

    def play(
        self, specs: Mapping[int, EpisodeSpec], in_flight: int, finished: Finished, replied: Callable[[int], None]
    ) -> None:
        """See `Player`."""
        run_blocking(self.play_async(specs, in_flight, finished, replied))

    async def play_async(
        self, specs: Mapping[int, EpisodeSpec], in_flight: int, finished: Finished, replied: Callable[[int], None]
    ) -> None:
        """`play` in the caller's event loop."""
        numbers, began = list(specs), dict[int, float]()
        tokenizer = get_tokenizer(self._driver.settings.tokenizer)

        def begun(position: int) -> None:
            began[position] = time.perf_counter()

        def ended(position: int, rollout: Rollout) -> None:
            seconds = time.perf_counter() - began[position]
            number = numbers[position]
            finished(episode_record(number, rollout, tokenizer), episode_cost(number, rollout, seconds))

        await self._driver.stream(
            list(specs.values()),
            self._policy,
            in_flight=in_flight,
            begun=begun,
            finished=ended,
            replied=lambda: replied(1),
        )


def prepare_evaluation(config: EvalConfig, parts: Parts | None = None) -> tuple[Driver, Policy, Opened]:
    """`prepare`, and what a player says of the run."""
    driver, policy, resolved_config = prepare(config, parts or Parts())
    resolved_config["label"] = config.label or policy.name
    return driver, policy, Opened(resolved_config, policy.privileged, len(driver.source))


def prepare(config: PlayConfig, parts: Parts) -> tuple[Driver, Policy, Record]:
    """What plays, the policy, and what tells the run from every other, as `config.json` says it; nothing is written.

    Raises:
        AtomMemError: the environment or the policy cannot be had as asked.
    """
    if config.episodes < 1:
        raise SettingError(f"episodes must be at least 1, got {config.episodes}.")
    folder = config.out / "memory"
    if parts.env is None:
        options = config.env_options()
        driver = Driver.of(env := config.make_env(**{"store": str(folder)} | options))
    else:
        driver = Driver.of(parts.env)
        env = parts.env.unwrapped  # type: ignore[assignment]  # or `Driver.of` would have said so
        options = _options_of(env)
        driver = dataclasses.replace(driver, store=MemoryStore(folder, env.store.durability))
    sampling = Sampling(config.temperature, config.max_new_tokens, config.thinking)
    layout = parts.layout or config.layout
    policy = load_policy(
        config.policy if parts.policy is None else parts.policy, env.settings, sampling, layout, model=parts.model
    )
    resolved_config = {
        **environment_record(config.env_id, env, options, layout),
        "policy": policy.name,
        "episodes": config.episodes,
        "seed": config.seed,
        "sampling": dataclasses.asdict(sampling),
        "schema_version": SCHEMA_VERSION,
    }
    return driver, policy, resolved_config


def _options_of(env: AtomMemEnv) -> dict[str, Any]:
    """What `gym.make` would have to be given beside the id and the source's options, as plain data."""
    registered = gym.spec(env.spec.id).kwargs if env.spec else {}
    defaults = EpisodeSettings(**{name: value for name, value in registered.items() if name in SETTING_NAMES}).record()
    changed = {name: value for name, value in env.settings.record().items() if value != defaults[name]}
    return {"embedder": env.embedder_name, "durability": env.store.durability, **changed}
