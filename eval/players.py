"""Players of an evaluation's episodes: this process, or Ray workers (`eval.workers`)."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import gymnasium as gym

from agents.chat_policy import ChatModel, ChatPolicy, Sampling
from agents.event_loop import run_blocking
from agents.policy import Act, FunctionPolicy, Policy
from agents.prompting import Method, PromptedPolicy
from agents.registry import load_policy
from agents.rollout import Driver, EpisodeSpec
from atommem_env.dialects import get_dialect
from atommem_env.env import SETTING_NAMES, AtomMemEnv
from atommem_env.errors import ReplyRefused, SettingError
from atommem_env.prompts import Layout, get_layout
from atommem_env.rewards import get_reward
from atommem_env.store.memory_store import MemoryStore
from atommem_env.tasks.digests import files_of
from atommem_env.tokens import get_tokenizer
from atommem_env.types import EpisodeSettings, Rollout
from eval.metrics import SCHEMA_VERSION, episode_cost, episode_record
from eval.options import EvalConfig, PlayConfig
from eval.played_as import environment_record
from eval.provenance import fingerprints
from eval.run_folder import Record

_log = logging.getLogger(__name__)
Env = gym.Env[Any, Any]
PolicyLike = str | Policy | Act | Method | ChatModel
OnFinished = Callable[[Record, Record], None]
"""Called with each episode's record and cost, in the order in which the episodes end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Objects that replace what a configuration names."""

    policy: PolicyLike | None = None
    model: str | ChatModel | None = None  # for a prompting method
    layout: Layout | None = None
    env: Env | None = None  # its own store is not used


class PreparedRun(NamedTuple):
    """A run that a player is ready to play."""

    resolved_config: Record  # the contents of `config.json`, which identify the run
    privileged: bool  # whether the policy is given the golds
    tasks: int  # of the task source


class Player(Protocol):
    """Plays one run at a time."""

    def open(self, config: EvalConfig) -> AbstractContextManager[PreparedRun]:
        """Prepares a run, which can be played until the context ends; writes nothing.

        Raises:
            AtomMemError: the environment or the policy cannot be made.
        """
        ...

    def play(
        self, specs: Mapping[int, EpisodeSpec], in_flight: int, finished: OnFinished, replied: Callable[[int], None]
    ) -> None:
        """Plays episodes of the open run, at most `in_flight` at a time.

        Args:
            specs: by number in the run.
            replied: called with a number of further replies, for a progress bar.

        Raises:
            Exception: the first one of the policy, the embedder or the store; the other episodes are stopped.
        """
        ...


class LocalPlayer:
    """Plays in this process.

    Args:
        parts: objects that replace what the configuration names.
    """

    def __init__(self, parts: Parts | None = None) -> None:
        self._parts = parts or Parts()

    @contextmanager
    def open(self, config: EvalConfig) -> Iterator[PreparedRun]:
        """See `Player`."""
        self._driver, self._policy, prepared = prepare_evaluation(config, self._parts)
        with closing(self._driver.store):
            yield prepared

    def play(
        self, specs: Mapping[int, EpisodeSpec], in_flight: int, finished: OnFinished, replied: Callable[[int], None]
    ) -> None:
        """See `Player`."""
        run_blocking(self.play_async(specs, in_flight, finished, replied))

    async def play_async(
        self, specs: Mapping[int, EpisodeSpec], in_flight: int, finished: OnFinished, replied: Callable[[int], None]
    ) -> None:
        """`play` in the caller's event loop."""
        numbers, started = list(specs), dict[int, float]()
        tokenizer = get_tokenizer(self._driver.settings.tokenizer)

        def begun(position: int) -> None:
            started[position] = time.perf_counter()

        def ended(position: int, rollout: Rollout) -> None:
            seconds = time.perf_counter() - started[position]
            number = numbers[position]
            finished(episode_record(number, rollout, tokenizer), episode_cost(number, rollout, seconds))

        def refused(position: int, error: ReplyRefused) -> None:
            _log.warning("Episode %d stays unscored: %s", numbers[position], error)

        await self._driver.stream(
            list(specs.values()),
            self._policy,
            in_flight=in_flight,
            begun=begun,
            finished=ended,
            replied=lambda: replied(1),
            refused=refused,
        )


def prepare_evaluation(config: EvalConfig, parts: Parts | None = None) -> tuple[Driver, Policy, PreparedRun]:
    """`prepare` for an evaluation, with its label."""
    driver, policy, resolved_config = prepare(config, parts or Parts())
    resolved_config["label"] = config.label or policy.name
    return driver, policy, PreparedRun(resolved_config, policy.privileged, len(driver.source))


def prepare(config: PlayConfig, parts: Parts) -> tuple[Driver, Policy, Record]:
    """The driver, the policy and the resolved configuration (the contents of `config.json`) of a run; writes nothing.

    Raises:
        AtomMemError: the environment or the policy cannot be made.
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
        options = _env_options(env)
        driver = dataclasses.replace(driver, store=MemoryStore(folder, env.store.durability))
    driver = dataclasses.replace(driver, reply_timeout=config.reply_timeout)
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
        "data": files_of(env.source),
        "fingerprints": fingerprints(
            _parts_of(policy)
            | {
                "source": env.source,
                "embedder": getattr(env.embedder, "inner", env.embedder),
                "dialect": get_dialect(env.settings.dialect),
                "reward": get_reward(env.settings.reward),
                "layout": get_layout(layout),
            }
        ),
        "schema_version": SCHEMA_VERSION,
    }
    return driver, policy, resolved_config


def _parts_of(policy: Policy) -> dict[str, object]:
    """What a policy is made of, by name."""
    match policy:
        case ChatPolicy():
            return {"model": policy.model}
        case PromptedPolicy():
            return {"method": policy.method, "model": policy.model}
        case FunctionPolicy():
            return {"policy": policy.act}
    return {"policy": policy}


def _env_options(env: AtomMemEnv) -> dict[str, Any]:
    """The arguments of `gym.make` that make this environment, without the id and the source's options, as plain data."""
    registered = gym.spec(env.spec.id).kwargs if env.spec else {}
    defaults = EpisodeSettings(**{name: value for name, value in registered.items() if name in SETTING_NAMES}).record()
    changed = {name: value for name, value in env.settings.record().items() if value != defaults[name]}
    return {"embedder": env.embedder_name, "durability": env.store.durability, **changed}
