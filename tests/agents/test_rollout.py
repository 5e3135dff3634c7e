"""The driver, and one episode through `reset` and `step`."""

from __future__ import annotations

import asyncio
import itertools
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import gymnasium as gym
import pytest
from playing import SPECS, make_driver

from agents import load_policy, play_episode, play_episode_async
from agents.registry import POLICIES
from agents.rollout import Driver, EpisodeSpec, episode_specs
from atommem_env.embedders import get_embedder
from atommem_env.env import AtomMemEnv
from atommem_env.errors import (
    DataError,
    EmbeddingError,
    MissingDependency,
    PolicyError,
    PromptTooLong,
    SettingError,
)
from atommem_env.types import EpisodeSettings, Observation, Reply, Rollout, StopReason


def test_every_policy_gives_the_same_rollouts_for_the_same_specs_however_many_are_in_flight() -> None:
    for policy in [name for name in POLICIES if name != "smollm2"]:
        driver = make_driver(questions=2)
        results = [
            asyncio.run(driver.run(SPECS[:5], load_policy(policy, driver.settings), in_flight=in_flight))
            for in_flight in (1, 5)
        ]
        assert results[0] == results[1], policy


def test_the_driver_and_the_environment_play_the_same_episode() -> None:
    env = gym.make("AtomMem-Synthetic", split="test", durability="off", num_docs=20)
    inner = env.unwrapped
    assert isinstance(inner, AtomMemEnv)
    policy = load_policy("oracle", inner.settings)
    _, info = env.reset(seed=4)
    played = play_episode(env, policy, seed=4)
    spec = EpisodeSpec(info["task_index"], info["task_seed"], played.seed)
    assert asyncio.run(Driver.of(env).run([spec], policy)) == [played]


def test_plain_and_asynchronous_functions_are_policies() -> None:
    async def slow(observation: Observation) -> Reply:
        await asyncio.sleep(0)
        return Reply("<read_memory>x</read_memory>", prompt_ids=(1, 2), completion_ids=(3,), logprobs=(-0.5,))

    env = gym.make("AtomMem-Synthetic", durability="off")
    rollout = play_episode(env, slow, seed=0)
    assert rollout.turns[0].reply.prompt_ids == (1, 2)
    assert play_episode(env, lambda observation: "", seed=0).reward == 0.0


def test_an_episode_can_be_played_from_within_a_notebooks_event_loop() -> None:
    async def cell() -> Rollout:
        return play_episode(gym.make("AtomMem-Synthetic", durability="off"), lambda observation: "", seed=0)

    assert asyncio.run(cell()).reward == 0.0


def halved(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """Pays half, and a tenth for each reply."""
    return gym.wrappers.TransformReward(env, lambda reward: float(reward) / 2 + 0.1)


def test_the_reward_of_a_rollout_is_the_sum_of_what_the_wrapped_environment_paid() -> None:
    env = gym.make("AtomMem-Synthetic", durability="off", num_docs=20)
    policy = load_policy("oracle", EpisodeSettings())
    plain = play_episode(env, policy, seed=4)
    assert plain.reward == 1.0
    wrapped = play_episode(halved(env), policy, seed=4)
    assert wrapped.reward == pytest.approx(0.5 + 0.1 * len(plain.turns))
    assert replace(wrapped, reward=1.0) == plain


def test_a_policy_is_shown_what_the_wrapped_environment_shows() -> None:
    env = gym.make("AtomMem-Synthetic", durability="off", num_docs=20)
    loud = gym.wrappers.TransformObservation(env, lambda seen: {**seen, "chunk": seen["chunk"].upper()}, None)
    seen: list[str] = []
    rollout = play_episode(loud, lambda observation: seen.append(observation["chunk"]) or "", seed=4)
    assert [turn.observation["chunk"] for turn in rollout.turns] == seen
    assert seen[0] == seen[0].upper() != ""


def test_an_episode_that_a_wrapper_ends_early_is_a_rollout_too() -> None:
    env = gym.wrappers.TimeLimit(gym.make("AtomMem-Synthetic", durability="off", num_docs=20), 2)
    rollout = play_episode(env, lambda observation: "", seed=4)
    assert (len(rollout.turns), rollout.reward, rollout.stop_reason) == (2, 0.0, StopReason.STEP_BUDGET)
    assert rollout.questions == ()


def test_an_asynchronous_policy_runs_in_the_loop_of_its_caller() -> None:
    async def cell() -> tuple[set[Any], Any]:
        loops = set()

        async def policy(observation: Observation) -> str:
            loops.add(asyncio.get_running_loop())
            return ""

        env = gym.make("AtomMem-Synthetic", durability="off", num_docs=20)
        rollout = await play_episode_async(env, policy, seed=4)
        assert rollout == play_episode(env, lambda observation: "", seed=4)
        return loops, asyncio.get_running_loop()

    loops, own = asyncio.run(cell())
    assert loops == {own}


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (halved, "TransformReward"),
        (lambda env: gym.wrappers.TransformObservation(env, lambda seen: seen, None), "TransformObservation"),
        (lambda env: gym.wrappers.TimeLimit(env, 5), "TimeLimit"),
        (lambda env: gym.wrappers.OrderEnforcing(halved(env)), "TransformReward"),
        (gym.wrappers.RecordEpisodeStatistics, "RecordEpisodeStatistics"),
    ],
)
def test_a_driver_rejects_the_wrappers_that_it_would_ignore(wrap: Any, name: str) -> None:
    env = gym.make("AtomMem-Synthetic", durability="off")
    assert Driver.of(env).source is env.unwrapped.source  # type: ignore[attr-defined]
    with pytest.raises(
        SettingError, match=rf"^{name} would be ignored, .* reward=… .*agents\.play_episode\(env, policy\)"
    ):
        Driver.of(wrap(env))


def test_a_driver_rejects_a_subclass_whose_steps_it_would_ignore() -> None:
    class Generous(AtomMemEnv):
        def step(self, action: str) -> Any:
            observation, _, *rest = super().step(action)
            return observation, 1.0, *rest

    env = Generous("synthetic", durability="off", num_docs=20)
    with pytest.raises(SettingError, match=r"^Generous would be ignored"):
        Driver.of(env)
    rollout = play_episode(env, lambda observation: "", seed=4)
    assert rollout.reward == len(rollout.turns)


def test_an_environment_of_another_kind_is_rejected() -> None:
    env = gym.make("CartPole-v1")
    for call in (Driver.of, lambda env: play_episode(env, lambda observation: "")):
        with pytest.raises(SettingError, match="Expected an AtomMem environment, got CartPoleEnv"):
            call(env)


class Changing:
    """Empties each observation, and all that it was ever given, before it replies."""

    name, privileged = "changing", False

    def begin(self, seed: int, task: Any) -> Any:
        given: list[Any] = []

        def act(observation: Any) -> str:
            reply = f"<create_memory>{observation['chunk'][:20]}</create_memory>"
            given.append(observation)
            for one in given:
                one.clear()
            return reply

        return act


def test_what_a_policy_does_to_an_observation_does_not_change_what_is_recorded() -> None:
    def plain(observation: Observation) -> str:
        return f"<create_memory>{observation['chunk'][:20]}</create_memory>"

    driver = make_driver()
    assert asyncio.run(driver.run(SPECS[:3], Changing())) == asyncio.run(driver.run(SPECS[:3], plain))
    env = gym.make("AtomMem-Synthetic", durability="off", num_docs=20)
    assert play_episode(env, Changing(), seed=4) == play_episode(env, plain, seed=4)


def test_an_observation_that_a_wrapper_changes_later_stays_as_the_policy_saw_it() -> None:
    class Reusing(gym.ObservationWrapper[Any, Any, Any]):
        shown: dict[str, Any] = {}  # noqa: RUF012

        def observation(self, observation: Any) -> Any:
            self.shown.update(observation)
            return self.shown

    env = gym.make("AtomMem-Synthetic", durability="off", num_docs=20)
    assert play_episode(Reusing(env), Changing(), seed=4) == play_episode(env, Changing(), seed=4)


class Exiting:
    name, privileged = "exiting", False

    def __init__(self, where: str) -> None:
        self.where = where

    def begin(self, seed: int, task: Any) -> Any:
        if self.where == "begin":
            sys.exit(0)

        async def wait(observation: Observation) -> str:
            await asyncio.sleep(0)
            return act(observation)

        def act(observation: Observation) -> str:
            if observation["step"] == 2:
                sys.exit(0)
            return ""

        return wait if self.where == "async" else act


@pytest.mark.parametrize("timeout", [None, 60.0])
@pytest.mark.parametrize(("where", "reply"), [("begin", 1), ("function", 3), ("async", 3)])
def test_a_policy_that_leaves_python_is_an_error_and_no_success(where: str, reply: int, timeout: float | None) -> None:
    driver = replace(make_driver(), reply_timeout=timeout)
    for play in (
        lambda: asyncio.run(driver.run(SPECS[:1], Exiting(where))),
        lambda: play_episode(gym.make("AtomMem-Synthetic", durability="off", num_docs=20), Exiting(where), seed=4),
    ):
        with pytest.raises(PolicyError, match=r"The policy called sys\.exit\(0\) instead of replying") as failure:
            play()
        assert re.search(rf"in episode .* of synthetic.*, reply {reply}, policy exiting", failure.value.__notes__[0])


def test_a_policy_that_cancels_itself_is_an_error_and_its_caller_may_cancel_it() -> None:
    async def policy(observation: Observation) -> str:
        raise asyncio.CancelledError

    for timeout in (None, 60.0):
        with pytest.raises(PolicyError, match="what it waited for was cancelled"):
            asyncio.run(replace(make_driver(), reply_timeout=timeout).run(SPECS[:2], policy))

    async def cancelled(timeout: float | None) -> None:
        async def late(observation: Observation) -> str:
            await asyncio.sleep(60)
            return ""

        run = asyncio.ensure_future(replace(make_driver(), reply_timeout=timeout).run(SPECS[:2], late))
        await asyncio.sleep(0.05)
        run.cancel()
        await run

    for timeout in (None, 60.0):
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(cancelled(timeout))


def blocking(observation: Observation) -> str:
    if observation["step"] == 1:
        time.sleep(1)
    return ""


async def sleeping(observation: Observation) -> str:
    if observation["step"] == 1:
        await asyncio.sleep(600)
    return ""


def returning_a_coroutine(observation: Observation) -> Any:
    return sleeping(observation)


@pytest.mark.parametrize("policy", [blocking, sleeping, returning_a_coroutine])
def test_a_policy_that_does_not_reply_in_time_ends_the_run_with_an_error(policy: Any) -> None:
    driver = replace(make_driver(), reply_timeout=0.2)
    with pytest.raises(PolicyError, match=r"^The policy gave no reply within 0\.2 s \(reply_timeout\)") as failure:
        asyncio.run(driver.run(SPECS[:3], policy))
    assert re.search(rf"reply 2, policy {policy.__name__}$", failure.value.__notes__[0])


def test_an_error_ends_the_run_before_another_episode_asks_the_policy() -> None:
    asked: list[int] = []

    def failing(observation: Observation) -> str:
        asked.append(observation["step"])
        if observation["step"] == 1:
            raise ZeroDivisionError
        return "<create_memory>x</create_memory>"  # all six wait for its vector

    with pytest.raises(ZeroDivisionError):
        asyncio.run(make_driver().run(SPECS[:6], failing))
    assert asked == [0] * 6 + [1]


def test_a_time_limit_that_is_not_reached_changes_nothing() -> None:
    async def asynchronous(observation: Observation) -> str:
        await asyncio.sleep(0)
        return words(observation)

    def words(observation: Observation) -> str:
        return f"<create_memory>{observation['chunk'][:20]}</create_memory>"

    def failing(observation: Observation) -> str:
        raise TimeoutError("of its own")

    driver = make_driver()
    limited = replace(driver, reply_timeout=60.0)
    plain = asyncio.run(driver.run(SPECS[:3], words))
    for policy in (words, asynchronous, lambda observation: asynchronous(observation)):
        assert asyncio.run(limited.run(SPECS[:3], policy)) == plain
    for each in (driver, limited):
        with pytest.raises(TimeoutError, match="of its own"):
            asyncio.run(each.run(SPECS[:1], failing))


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf")])
def test_a_time_limit_that_cannot_be_is_rejected(seconds: float) -> None:
    with pytest.raises(SettingError, match="reply_timeout must be a number of seconds above 0"):
        replace(make_driver(), reply_timeout=seconds)


def test_a_reply_that_is_none_is_rejected() -> None:
    env = gym.make("AtomMem-Synthetic", durability="off")
    with pytest.raises(PolicyError, match="must reply with a str or a Reply, got int"):
        play_episode(env, lambda observation: 3)  # type: ignore[arg-type,return-value]


def test_an_infrastructure_failure_stops_the_run_and_is_never_a_reward_of_zero() -> None:
    class Broken:
        name, dimension = "broken", 8

        def embed(self, texts: Any, kind: Any) -> Any:
            raise EmbeddingError("the server is gone")

    driver = replace(make_driver(), embedder=Broken())
    reported: list[int] = []
    with pytest.raises(EmbeddingError, match="gone") as failure:
        asyncio.run(
            driver.run(
                SPECS,
                load_policy("perfect-rag", driver.settings),
                finished=lambda number, rollout: reported.append(number),
            )
        )
    assert "in episode" in failure.value.__notes__[0]
    assert reported == []


class Frail:
    """The oracle, whose episodes with a seed in `fails` raise in their second reply so many times."""

    name, privileged = "frail", True

    def __init__(self, driver: Driver, fails: dict[int, int], error: type[Exception] = ConnectionError) -> None:
        self.oracle = load_policy("oracle", driver.settings)
        self.fails, self.error = fails, error
        self.begun: Counter[int] = Counter()

    def begin(self, seed: int, task: Any) -> Any:
        self.begun[seed] += 1
        act, broken = self.oracle.begin(seed, task), self.begun[seed] <= self.fails.get(seed, 0)

        def reply(observation: Observation) -> Any:
            if broken and observation["step"] == 1:
                raise self.error("the server is gone")
            return act(observation)

        return reply


def test_for_training_a_failed_episode_is_played_again_and_one_that_fails_each_time_is_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    driver, specs = make_driver(), SPECS[:6]
    whole = asyncio.run(driver.run_with_retries(specs, Frail(driver, {})))
    assert whole == asyncio.run(driver.run(specs, Frail(driver, {})))
    assert not caplog.records
    policy = Frail(driver, {specs[1].seed: 1, specs[2].seed: 2, specs[4].seed: 3})
    reported: list[int] = []
    replies = itertools.count()
    rollouts = asyncio.run(
        driver.run_with_retries(
            specs,
            policy,
            retries=2,
            finished=lambda place, rollout: reported.append(place),
            replied=lambda: next(replies),
        )
    )
    assert rollouts == [*whole[:4], None, whole[5]]
    assert sorted(reported) == [0, 1, 2, 3, 5]
    assert [policy.begun[spec.seed] for spec in specs] == [1, 2, 3, 1, 3, 1]
    assert len(caplog.records) == 1 + 2 + 3
    assert all("server is gone" in record.message for record in caplog.records)
    assert sum(f"seed={specs[4].seed}" in record.message for record in caplog.records) == 3


@pytest.mark.parametrize("error", [SettingError, DataError, PromptTooLong, MissingDependency])
def test_what_playing_again_cannot_fix_is_raised_at_once(error: type[Exception]) -> None:
    driver = make_driver()
    policy = Frail(driver, {SPECS[3].seed: 1}, error)
    with pytest.raises(error, match="gone") as failure:
        asyncio.run(driver.run_with_retries(SPECS[:6], policy, retries=5))
    assert f"seed={SPECS[3].seed}" in failure.value.__notes__[0]
    assert policy.begun[SPECS[3].seed] == 1


def test_fault_11_episodes_that_wait_share_one_embedding_call_and_a_slow_one_holds_nobody_up() -> None:
    calls: list[int] = []
    hashing = get_embedder("hashing")

    class Counting:
        name, dimension = "counting", hashing.dimension

        def embed(self, texts: Any, kind: Any) -> Any:
            calls.append(len(texts))
            return hashing.embed(texts, kind)

    driver = replace(make_driver(), embedder=Counting())
    ended: list[int] = []
    slow = SPECS[0].seed

    class Policy:
        name, privileged = "one is slow", False

        def begin(self, seed: int, task: Any) -> Any:
            async def act(observation: Observation) -> str:
                await asyncio.sleep(0.02 * (seed == slow))
                return f"<create_memory>{seed} {observation['step']}</create_memory><final_answer>x</final_answer>"

            return act

    rollouts = asyncio.run(driver.run(SPECS, Policy(), finished=lambda number, rollout: ended.append(number)))
    assert sum(calls) == sum(len(rollout.turns) for rollout in rollouts)
    assert len(calls) < sum(calls) / 3
    assert ended[-1] == 0


@pytest.mark.parametrize(
    ("length", "fewer", "more"), [(3, 2, 8), (100_000, 7, 300), (10**6, 7, 300), (100_001, 60_000, 100_002)]
)
def test_a_longer_run_begins_with_the_episodes_of_a_shorter_one(length: int, fewer: int, more: int) -> None:
    shorter, longer = (episode_specs(length, episodes, seed=5) for episodes in (fewer, more))
    assert longer[:fewer] == shorter
    assert len({spec.index for spec in longer}) == min(length, more)
