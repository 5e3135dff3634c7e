"""The driver: plays episodes, many at a time, with embeddings batched over all that wait for one."""

from __future__ import annotations

import asyncio
import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np

import atommem_env  # noqa: F401  (registers the environments)
from agents.batching import Batcher
from agents.event_loop import run_blocking
from agents.policy import Act, Policy, as_policy, begin_episode, reply_to
from atommem_env.embedders import Embedder, embed
from atommem_env.env import AtomMemEnv
from atommem_env.episode import Episode
from atommem_env.errors import DataError, EngineDied, MissingDependency, PromptTooLong, ReplyRefused, SettingError
from atommem_env.store.memory_store import MemoryStore
from atommem_env.store.recorder import Recorder
from atommem_env.store.session import EpisodeSession
from atommem_env.tasks.digests import task_digest
from atommem_env.types import EmbeddingRequest, EpisodeSettings, Rollout, StopReason, TaskSource, Turn, Vector

_log = logging.getLogger(__name__)
_PAUSE = 0.5  # seconds before an episode is played again, doubled each time
# What `gym.make` itself adds; these check how an environment is used, and change nothing.
_IDLE_WRAPPERS = (gym.wrappers.OrderEnforcing, gym.wrappers.PassiveEnvChecker)
NON_RETRYABLE_ERRORS = (SettingError, DataError, PromptTooLong, MissingDependency, EngineDied)


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """Identifies an episode: the same spec is the same episode everywhere."""

    index: int  # of the task in its source
    task_seed: int  # draws and orders the documents
    seed: int  # of the episode and of the policy


@dataclass(frozen=True, slots=True)
class Driver:
    """Everything that the episodes of a run share."""

    env_id: str  # what the store calls the environment
    source: TaskSource
    settings: EpisodeSettings
    embedder: Embedder
    store: MemoryStore
    # Whether embedding leaves the event loop free, as it should with a remote service. It is off because a local model has its
    # own thread: a race of two would change which texts share a batch, and so last bits.
    embed_in_thread: bool = False
    reply_timeout: float | None = (
        None  # seconds for each reply of a policy, see `agents.policy.reply_to`; None: no limit
    )
    _batcher: Batcher[tuple[EmbeddingRequest, ...], list[Vector]] = field(init=False, repr=False, compare=False)
    _committer: Batcher[Recorder, None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.reply_timeout is not None and not 0 < self.reply_timeout < math.inf:
            raise SettingError(f"reply_timeout must be a number of seconds above 0, got {self.reply_timeout!r}.")
        object.__setattr__(self, "_batcher", Batcher(self._embed, max_batch=256, thread=self.embed_in_thread))
        # For the same reason a commit has its own thread only where embedding has one.
        object.__setattr__(self, "_committer", Batcher(self._commit, max_batch=512, thread=self.embed_in_thread))

    @classmethod
    def of(cls, env: gym.Env[Any, Any], *, embed_in_thread: bool = False) -> Driver:
        """The parts of an AtomMem environment, so that a run has the settings of `gym.make`.

        Raises:
            SettingError: it is none; or a wrapper, or a subclass, has a `reset` or `step` of its own, which would be ignored.
        """
        inner = _unwrapped(env)
        layer = env
        while isinstance(layer, gym.Wrapper) and type(layer) in _IDLE_WRAPPERS:
            layer = layer.env
        own = type(layer)
        if layer is not inner or (own.reset, own.step) != (AtomMemEnv.reset, AtomMemEnv.step):
            raise SettingError(
                f"{own.__name__} would be ignored, since a run of many episodes calls neither reset nor "
                "step: give gym.make your own reward as reward=… or a step limit as max_steps=…, or play with "
                "agents.play_episode(env, policy), which honours wrappers."
            )
        return cls(inner.env_id, inner.source, inner.settings, inner.embedder, inner.store, embed_in_thread)

    async def run(
        self,
        specs: Sequence[EpisodeSpec],
        policy: Policy | Act,
        *,
        in_flight: int = 64,
        begun: Callable[[int], None] = lambda position: None,
        finished: Callable[[int, Rollout], None] = lambda position, rollout: None,
        replied: Callable[[], None] = lambda: None,
    ) -> list[Rollout]:
        """Plays all episodes, at most `in_flight` at a time.

        Args:
            begun: called with the position in `specs` when an episode begins.
            finished: called with the position in `specs` and the rollout, in the order in which episodes end.
            replied: called after each reply of any episode; for a progress bar.

        Returns:
            The rollouts, in the order of `specs`.

        Raises:
            Exception: whatever policy, embedder or store raised first; the other episodes are stopped. A failure is never
                scored, and calls of `finished` before it are valid.
        """
        rollouts = await self._each(specs, policy, in_flight, finished, replied, retries=None, begun=begun)
        return [rollout for rollout in rollouts if rollout is not None]  # all of them: a failure was raised

    async def stream(
        self,
        specs: Sequence[EpisodeSpec],
        policy: Policy | Act,
        *,
        in_flight: int = 64,
        begun: Callable[[int], None] = lambda position: None,
        finished: Callable[[int, Rollout], None],
        replied: Callable[[], None] = lambda: None,
        refused: Callable[[int, ReplyRefused], None] | None = None,
    ) -> None:
        """`run` that keeps no rollout: memory is that of the episodes in flight, however many there are.

        Args:
            refused: called with the position and the error where a service will never answer one of an episode's prompts: the
                others are played all the same. None: that is a failure as any other.
        """
        await self._each(
            specs, policy, in_flight, finished, replied, retries=None, begun=begun, refused=refused, keep=False
        )

    async def run_with_retries(
        self,
        specs: Sequence[EpisodeSpec],
        policy: Policy | Act,
        *,
        in_flight: int = 64,
        retries: int = 1,
        finished: Callable[[int, Rollout], None] = lambda position, rollout: None,
        replied: Callable[[], None] = lambda: None,
    ) -> list[Rollout | None]:
        """`run` for training, where one lost episode must not end hours of work.

        Args:
            retries: how often an episode that fails is played again, from its start.

        Returns:
            The rollouts, in the order of `specs`; None is one that failed each time, which was logged as a warning.

        Raises:
            AtomMemError: what playing again cannot fix: settings, data, prompts that are too long.
        """
        return await self._each(specs, policy, in_flight, finished, replied, retries)

    async def _each(
        self,
        specs: Sequence[EpisodeSpec],
        policy: Policy | Act,
        in_flight: int,
        finished: Callable[[int, Rollout], None],
        replied: Callable[[], None],
        retries: int | None,
        begun: Callable[[int], None] = lambda position: None,
        refused: Callable[[int, ReplyRefused], None] | None = None,
        keep: bool = True,
    ) -> list[Rollout | None]:
        """Plays all; `retries` None raises the first failure, and without `keep` each is None in the end."""
        policy = as_policy(policy)
        gate = asyncio.Semaphore(in_flight)

        async def one(position: int, spec: EpisodeSpec) -> Rollout | None:
            async with gate:
                begun(position)
                played: Rollout | Exception
                try:
                    if retries is None:
                        played = await self.play(spec, policy, replied=replied)
                    else:
                        played = await self.play_with_retries(spec, policy, retries=retries, replied=replied)
                    if isinstance(played, Exception):
                        return None
                    finished(position, played)
                except Exception as error:
                    if isinstance(error, ReplyRefused) and refused:
                        refused(position, error)
                        return None
                    for task in tasks:  # before another of them asks the policy, which may block as long again
                        if task is not asyncio.current_task():
                            task.cancel()
                    raise
                return played if keep else None

        tasks = [asyncio.ensure_future(one(position, spec)) for position, spec in enumerate(specs)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def play_with_retries(
        self, spec: EpisodeSpec, policy: Policy, *, retries: int, replied: Callable[[], None] = lambda: None
    ) -> Rollout | Exception:
        """One episode of `run_with_retries`, for a caller with its own event loop; after the last failure its error."""
        lost: Exception | None = None
        for attempt in range(retries + 1):
            if attempt:
                await asyncio.sleep(_PAUSE * 2 ** (attempt - 1))  # an outage may pass
            try:
                return await self.play(spec, policy, replied=replied)
            except NON_RETRYABLE_ERRORS:
                raise
            except Exception as error:
                _log.warning("Attempt %d at %s failed: %r", attempt + 1, spec, error)
                lost = error
        assert lost is not None
        return lost

    async def play(self, spec: EpisodeSpec, policy: Policy, *, replied: Callable[[], None] = lambda: None) -> Rollout:
        """One episode of `run`; what is embedded shares its batches with all other episodes of this driver."""
        session = EpisodeSession.begin(
            self.store,
            self.source,
            self.settings,
            env_id=self.env_id,
            index=spec.index,
            task_seed=spec.task_seed,
            episode_seed=spec.seed,
        )
        episode = session.episode
        turns: list[Turn] = []
        with _noting(episode, policy, spec):
            act = begin_episode(policy, spec.seed, episode.task)
            while episode.stop_reason is None:
                observation = episode.observe()
                reply = await reply_to(act, observation, self.reply_timeout)
                requests = episode.submit(reply.text)
                result = session.resolve(reply.text, await self._batcher(requests) if requests else [])
                if session.recorder.due:
                    await self._committer(session.recorder)
                turns.append(Turn(observation, reply, result.results))
                replied()
        return _rollout(episode, turns, episode.reward)

    def _embed(self, waiting: list[tuple[EmbeddingRequest, ...]]) -> list[list[Vector]]:
        """The vectors of each waiting episode, by one batch for all of them."""
        vectors = iter(embed(self.embedder, [request for requests in waiting for request in requests]))
        return [[next(vectors) for _ in requests] for requests in waiting]

    def _commit(self, waiting: list[Recorder]) -> list[None]:
        """What is due of all waiting episodes, as one group."""
        self.store.write(waiting)
        return [None] * len(waiting)


def play_episode(
    env: gym.Env[Any, Any],
    policy: Policy | Act,
    *,
    seed: int | None = None,
    options: dict[str, Any] | None = None,
) -> Rollout:
    """`play_episode_async` for code that is no coroutine; from within an event loop, as in a notebook, the policy has another.

    >>> import gymnasium as gym, atommem_env
    >>> env = gym.make("AtomMem-Synthetic", durability="off")
    >>> play_episode(env, lambda observation: "", seed=0).reward
    0.0
    """
    return run_blocking(play_episode_async(env, policy, seed=seed, options=options))


async def play_episode_async(
    env: gym.Env[Any, Any],
    policy: Policy | Act,
    *,
    seed: int | None = None,
    options: dict[str, Any] | None = None,
) -> Rollout:
    """Plays one episode of an AtomMem environment through `reset` and `step`, with all that its wrappers make of it.

    The policy runs in the caller's event loop, so that it may use a client which belongs to that loop. A step of the
    environment blocks the loop.

    Args:
        seed: of `reset`, as are `options`.

    Returns:
        The rollout. Its observations are those that the policy was shown, its reward is the sum of the rewards that `step`
        returned; an episode that a wrapper ended early has the stop reason "step_budget" and the outcomes it came to.

    Raises:
        SettingError: `env` is no AtomMem environment.
        PolicyError: `policy` is none, or gave something else than a reply.
    """
    policy = as_policy(policy)
    inner = _unwrapped(env)
    observation, _ = env.reset(seed=seed, options=options)
    assert inner.episode is not None
    episode = inner.episode
    turns: list[Turn] = []
    reward, ended = 0.0, False
    with _noting(episode, policy, f"with seed {seed}, options {options}"):
        act = begin_episode(policy, episode.seed, episode.task)
        while not ended:
            seen = copy.deepcopy(observation)  # a wrapper may show, and change, the same object at every step
            reply = await reply_to(act, observation)
            observation, step_reward, terminated, truncated, _ = env.step(reply.text)
            turns.append(Turn(seen, reply, inner.results))
            reward += float(step_reward)
            ended = terminated or truncated
    return _rollout(episode, turns, reward)


@contextmanager
def _noting(episode: Episode, policy: Policy, spec: EpisodeSpec | str) -> Iterator[None]:
    """Adds to an error where it happened."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in episode {spec} of {episode.task.id}, reply {episode.steps + 1}, policy {policy.name}")
        raise


def _unwrapped(env: gym.Env[Any, Any]) -> AtomMemEnv:
    inner = env.unwrapped
    if not isinstance(inner, AtomMemEnv):
        raise SettingError(f"Expected an AtomMem environment, got {type(inner).__name__}.")
    return inner


def _rollout(episode: Episode, turns: list[Turn], reward: float) -> Rollout:
    return Rollout(
        task_id=episode.task.id,
        seed=episode.seed,
        turns=tuple(turns),
        reward=reward,
        stop_reason=episode.stop_reason or StopReason.STEP_BUDGET,
        questions=episode.outcomes,
        task_digest=task_digest(episode.task),
    )


def episode_specs(length: int, episodes: int, seed: int) -> list[EpisodeSpec]:
    """Which episodes an evaluation plays: tasks in a random order without repetition, and again once all were played.

    Fewer episodes of the same seed are the first of these.

    >>> [spec.index for spec in episode_specs(3, 5, seed=0)]
    [2, 0, 1, 2, 0]
    """
    rng = np.random.default_rng([seed, 0])
    if length <= 100_000:
        order = rng.permutation(length).tolist()
    else:  # an endless source: drawn, each once
        drawn: dict[int, None] = {}
        while len(drawn) < min(episodes, length):
            drawn |= dict.fromkeys(rng.integers(length, size=2 * episodes + 100).tolist())
        order = list(drawn)
    seeds = np.random.default_rng([seed, 1]).integers(2**31, size=(episodes, 2)).tolist()
    return [EpisodeSpec(order[i % len(order)], *seeds[i]) for i in range(episodes)]
