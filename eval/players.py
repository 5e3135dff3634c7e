"""Who plays the episodes of an evaluation: this process, or workers of Ray's (`eval.workers`)."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any, NamedTuple, Protocol

import gymnasium as gym

from agents.chat_policy import Sampling
from agents.policy import Act, Policy
from agents.registry import load_policy
from agents.rollout import Driver, EpisodeSpec, run_blocking
from atommem_env.errors import SettingError
from atommem_env.plugins import name_of
from atommem_env.store.memory_store import MemoryStore
from atommem_env.tokens import get_tokenizer
from atommem_env.types import Rollout
from eval.metrics import SCHEMA_VERSION, episode_cost, episode_record
from eval.options import EvalConfig, PlayConfig
from eval.run_folder import Record

Env = gym.Env[Any, Any]
Finished = Callable[[Record, Record], None]
"""Is told of each episode, in the order in which they end: its record, and its cost."""


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
        policy: an object in the place of the one that the configuration names.
        env: an environment in the place of the one that the configuration describes; its own store stays as it is.
    """

    def __init__(self, policy: Policy | Act | None = None, env: Env | None = None) -> None:
        self._given = policy, env

    @contextmanager
    def open(self, config: EvalConfig) -> Iterator[Opened]:
        """See `Player`."""
        self._driver, self._policy, opened = prepare_evaluation(config, *self._given)
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

        await self._driver.run(
            list(specs.values()),
            self._policy,
            in_flight=in_flight,
            begun=begun,
            finished=ended,
            replied=lambda: replied(1),
        )


def prepare_evaluation(
    config: EvalConfig, policy: Policy | Act | None = None, env: Env | None = None
) -> tuple[Driver, Policy, Opened]:
    """`prepare`, and what a player says of the run."""
    driver, player, resolved_config = prepare(config, policy, env)
    resolved_config["label"] = config.label or player.name
    return driver, player, Opened(resolved_config, player.privileged, len(driver.source))


def prepare(
    config: PlayConfig, policy: Policy | Act | None = None, env: Env | None = None
) -> tuple[Driver, Policy, Record]:
    """What plays, the policy, and what tells the run from every other, as `config.json` says it; nothing is written.

    Args:
        policy, env: objects in the place of those that the configuration names.

    Raises:
        AtomMemError: the environment or the policy cannot be had as asked.
    """
    if config.episodes < 1:
        raise SettingError(f"episodes must be at least 1, got {config.episodes}.")
    options = config.env_options()
    folder = config.out / "memory"
    if env is None:
        made = config.make_env(**{"store": str(folder)} | options)
        driver = Driver.of(made)
    else:
        driver = Driver.of(env)
        made = env.unwrapped  # type: ignore[assignment]  # or `Driver.of` would have said so
        driver = dataclasses.replace(
            driver, store=MemoryStore(folder, options.get("durability", made.store.durability))
        )
        options["embedder"] = made.embedder_name
    sampling = Sampling(config.temperature, config.max_new_tokens, config.thinking)
    player = load_policy(config.policy if policy is None else policy, made.settings, sampling, config.layout)
    resolved_config = {
        "env_id": config.env_id,
        "policy": player.name,
        "episodes": config.episodes,
        "seed": config.seed,
        "options": {
            **made.source_options,
            **options,
        },  # defaults too, so that the run stays what it is when one changes
        "layout": name_of(config.layout),
        "sampling": dataclasses.asdict(sampling),
        "settings": made.settings.record(),
        "schema_version": SCHEMA_VERSION,
    }
    return driver, player, json.loads(json.dumps(resolved_config, default=name_of))
