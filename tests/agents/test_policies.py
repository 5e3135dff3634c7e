import asyncio
import itertools
import shutil
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from agents import as_policy, load_policy, play_episode, prompting
from agents.baselines import oracle
from agents.chat_policy import ChatPolicy, Sampling
from agents.models.find import find_model
from agents.registry import POLICIES
from agents.rollout import Driver, EpisodeSpec
from atommem_env.embedders import get_embedder
from atommem_env.env import AtomMemEnv
from atommem_env.errors import (
    DataError,
    EmbeddingError,
    MissingDependency,
    ModelNotFound,
    PluginError,
    PolicyError,
    PromptTooLong,
    SettingError,
)
from atommem_env.types import EpisodeSettings, Fault, Message, Observation, Reply, Rollout

SPECS = [EpisodeSpec(index, index + 100, index + 200) for index in range(24)]


def driver(**options: Any) -> Driver:
    return Driver.of(gym.make("AtomMem-Synthetic", **{"split": "test", "durability": "off", "num_docs": 20, **options}))


def mean_reward(rollouts: list[Rollout]) -> float:
    return float(np.mean([rollout.reward for rollout in rollouts]))


def run(policy: str, specs: list[EpisodeSpec] = SPECS, **options: Any) -> list[Rollout]:
    drive = driver(**options)
    return asyncio.run(drive.run(specs, load_policy(policy, drive.settings)))


def test_the_oracle_reaches_the_top() -> None:
    assert mean_reward(run("oracle")) == 1.0
    assert mean_reward(run("oracle", questions=3, num_docs=40)) == 1.0


@pytest.mark.parametrize(
    "broken",
    [{"operations": ["create"]}, {"operations": ["read"]}, {"retrieval": "random", "top_k": 1, "scratchpad": False}],
)
def test_the_oracle_fails_where_memory_is_broken(broken: dict[str, Any]) -> None:
    source = driver(**broken).source
    possible = [spec for spec in SPECS if len(source.task(spec.index, spec.task_seed).questions[0].evidence) > 1]
    assert len(possible) > 5
    assert mean_reward(run("oracle", possible, **broken)) == 0.0


def test_the_oracle_gathers_more_evidence_than_one_search_shows() -> None:
    assert mean_reward(run("oracle", top_k=1, replies_per_question=8)) == 1.0


def test_silence_earns_nothing() -> None:
    assert mean_reward(run("silent")) == 0.0


def test_a_constant_earns_its_share_of_the_golds_and_no_more() -> None:
    source = driver().source
    golds = [source.task(spec.index, spec.task_seed).questions[0].answers for spec in SPECS]
    share = np.mean(["unknown" in answers for answers in golds])
    assert mean_reward(run("constant=unknown")) == pytest.approx(share)


@pytest.mark.parametrize("policy", ["random", "spam"])
def test_noise_earns_no_more_than_abstaining_always(policy: str) -> None:
    assert mean_reward(run(policy)) <= mean_reward(run("constant=unknown")) + 0.05


def test_spam_floods_and_is_told() -> None:
    rollout = run("spam", SPECS[:1])[0]
    seen = {result.fault for turn in rollout.turns for result in turn.results}
    assert {Fault.SUPERSEDED, Fault.OUT_OF_PHASE} <= seen


def test_append_all_stores_everything() -> None:
    for rollout in run("perfect-rag", SPECS[:6]):
        assert all(outcome.stored == outcome.evidence for outcome in rollout.questions)


def test_position_policies_keep_ten_documents() -> None:
    task = driver().source.task(0, 0)
    for keep in (oracle.keep_leaked_positions, oracle.keep_random_positions):
        kept = list(keep(task, 3))
        titles = {(document.title, document.text) for document in task.documents}
        assert {(passage.title, passage.text) for passage in kept} <= titles
    assert len(list(oracle.keep_random_positions(task, 3))) == 10
    assert list(oracle.keep_random_positions(task, 3)) != list(oracle.keep_random_positions(task, 4))


def test_every_policy_gives_the_same_rollouts_for_the_same_specs_however_many_are_in_flight() -> None:
    for policy in [name for name in POLICIES if name != "smollm2"]:
        drive = driver(questions=2)
        results = [
            asyncio.run(drive.run(SPECS[:5], load_policy(policy, drive.settings), in_flight=in_flight))
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


def test_what_is_no_policy_is_refused() -> None:
    with pytest.raises(PolicyError, match="function observation"):
        as_policy(3)  # type: ignore[arg-type]
    env = gym.make("AtomMem-Synthetic", durability="off")
    with pytest.raises(PolicyError, match="int"):
        play_episode(env, lambda observation: 3)  # type: ignore[arg-type,return-value]
    settings = driver().settings
    with pytest.raises(PolicyError, match="No policy is called 'oracel'; did you mean 'oracle'\\? There are oracle, "):
        load_policy("oracel", settings)
    with pytest.raises(PolicyError, match="; did you mean 'memagent'"):
        load_policy("memagnet@tiny", settings)
    with pytest.raises(PluginError, match="no module 'no_such_module' in the working folder"):
        load_policy("no_such_module:policy", settings)


def test_a_policy_of_ones_own_is_found_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_policy.py").write_text("def policy(observation): return 'mine'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    settings = driver().settings
    policy = load_policy("my_own_policy:policy", settings)
    assert policy.name == "my_own_policy:policy", "the function's name alone would be that of other policies too"
    assert policy.begin(0, None)(driver().source and {}) == "mine"  # type: ignore[arg-type]
    (tmp_path / "my_broken_policy.py").write_text("import no_such_package")
    with pytest.raises(PluginError, match=r"ModuleNotFoundError.*no_such_package.*my_broken_policy.py, line 1\)"):
        load_policy("my_broken_policy:policy", settings)
    (tmp_path / "my_own_method.py").write_text("def method(settings, ask): return lambda observation: ''")
    with pytest.raises(PolicyError, match="my_own_method:method@smollm2"):
        load_policy("my_own_method:method", settings)
    with pytest.raises(PolicyError, match="takes no model"):
        load_policy("my_own_policy:policy@tiny", settings)
    with pytest.raises(PluginError, match="has no 'other'"):
        load_policy("my_own_policy:other", settings)


def test_a_method_of_ones_own_has_any_model_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    lines = prompting.__doc__.partition("    def notes")[2] if prompting.__doc__ else ""
    imports = "from agents.prompting import render_reply\nfrom atommem_env.types import Operation, OperationKind\n"
    (tmp_path / "notes.py").write_text(imports + textwrap.dedent("    def notes" + lines))
    (tmp_path / "no_method.py").write_text("notes = 3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    drive = driver(num_docs=10, chunk_tokens=200)
    policy = load_policy("notes:notes@tiny", drive.settings, Sampling(max_new_tokens=6))
    assert policy.name == "notes:notes@tiny"
    rollout = asyncio.run(drive.run(SPECS[:1], policy))[0]
    assert all(turn.reply.usage and turn.reply.usage.calls == 1 for turn in rollout.turns)
    assert any(turn.observation["scratchpad"] for turn in rollout.turns)
    with pytest.raises(PolicyError, match="function \\(settings, ask\\)"):
        load_policy("no_method:notes@tiny", drive.settings)


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        ("rag", PolicyError, "rag needs a model: rag@smollm2"),
        ("rag@", PolicyError, "rag needs a model"),
        ("oracle@tiny", PolicyError, "oracle takes no model"),
        ("raf@tiny", PolicyError, "No policy is called 'raf@tiny'.*memagent"),
        ("rag@nothing-of-that-name", ModelNotFound, "nothing-of-that-name"),
        ("folder/of/no-model", ModelNotFound, "folder/of/no-model"),
    ],
)
def test_a_name_that_is_none_is_refused_with_what_there_is(name: str, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        load_policy(name, EpisodeSettings())


def test_an_at_sign_parts_a_method_from_its_model_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    folder = tmp_path / "me@home"
    shutil.copytree(find_model("tiny"), folder)
    settings = EpisodeSettings()
    assert load_policy(str(folder), settings).name == "me@home"
    assert load_policy(f"rag@{folder}", settings).name == "rag@me@home"
    assert load_policy("perfect-rag", settings).privileged
    assert not load_policy(f"append-all@{folder}", settings).privileged
    assert load_policy("constant=a@b", settings).name == "constant=a@b"


def test_an_infrastructure_failure_stops_the_run_and_is_never_a_reward_of_zero() -> None:
    class Broken:
        name, dimension = "broken", 8

        def embed(self, texts: Any, kind: Any) -> Any:
            raise EmbeddingError("the server is gone")

    drive = replace(driver(), embedder=Broken())
    told: list[int] = []
    with pytest.raises(EmbeddingError, match="gone") as failure:
        asyncio.run(
            drive.run(
                SPECS, load_policy("perfect-rag", drive.settings), finished=lambda number, rollout: told.append(number)
            )
        )
    assert "in episode" in failure.value.__notes__[0]
    assert told == []


class Frail:
    """The oracle, whose episodes with a seed in `fails` raise in their second reply so many times."""

    name, privileged = "frail", True

    def __init__(self, drive: Driver, fails: dict[int, int], error: type[Exception] = ConnectionError) -> None:
        self.oracle = load_policy("oracle", drive.settings)
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


def test_for_training_a_failed_episode_is_played_anew_and_one_that_fails_each_time_is_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    drive, specs = driver(), SPECS[:6]
    whole = asyncio.run(drive.run_with_retries(specs, Frail(drive, {})))
    assert whole == asyncio.run(drive.run(specs, Frail(drive, {})))
    assert not caplog.records
    policy = Frail(drive, {specs[1].seed: 1, specs[2].seed: 2, specs[4].seed: 3})
    told: list[int] = []
    replies = itertools.count()
    rollouts = asyncio.run(
        drive.run_with_retries(
            specs, policy, retries=2, finished=lambda place, rollout: told.append(place), replied=lambda: next(replies)
        )
    )
    assert rollouts == [*whole[:4], None, whole[5]]
    assert sorted(told) == [0, 1, 2, 3, 5]
    assert [policy.begun[spec.seed] for spec in specs] == [1, 2, 3, 1, 3, 1]
    assert len(caplog.records) == 1 + 2 + 3
    assert all("server is gone" in record.message for record in caplog.records)
    assert sum(f"seed={specs[4].seed}" in record.message for record in caplog.records) == 3


@pytest.mark.parametrize("error", [SettingError, DataError, PromptTooLong, MissingDependency])
def test_what_playing_anew_cannot_mend_is_raised_at_once(error: type[Exception]) -> None:
    drive = driver()
    policy = Frail(drive, {SPECS[3].seed: 1}, error)
    with pytest.raises(error, match="gone") as failure:
        asyncio.run(drive.run_with_retries(SPECS[:6], policy, retries=5))
    assert f"seed={SPECS[3].seed}" in failure.value.__notes__[0]
    assert policy.begun[SPECS[3].seed] == 1


def test_fault_8_a_model_is_shown_the_system_text_apart_from_the_observation_and_every_episode_is_played() -> None:
    seen: list[list[Message]] = []

    class Model:
        name = "echo"

        async def complete(self, messages: Any, **sampling: Any) -> Reply:
            seen.append(messages)
            return Reply("<final_answer>unknown</final_answer>")

    drive = driver()
    rollouts = asyncio.run(drive.run(SPECS, ChatPolicy(Model(), drive.settings)))
    assert len(rollouts) == len(SPECS)
    assert len(seen) == sum(len(rollout.turns) for rollout in rollouts)
    for messages in seen:
        assert [message["role"] for message in messages] == ["system", "user"]
        assert "<create_memory>" in messages[0]["content"]
        assert "<create_memory>" not in messages[1]["content"]


def test_fault_11_episodes_that_wait_share_one_embedding_call_and_a_slow_one_holds_nobody_up() -> None:
    calls: list[int] = []
    hashing = get_embedder("hashing")

    class Counting:
        name, dimension = "counting", hashing.dimension

        def embed(self, texts: Any, kind: Any) -> Any:
            calls.append(len(texts))
            return hashing.embed(texts, kind)

    drive = replace(driver(), embedder=Counting())
    ended: list[int] = []
    slow = SPECS[0].seed

    class Policy:
        name, privileged = "one is slow", False

        def begin(self, seed: int, task: Any) -> Any:
            async def act(observation: Observation) -> str:
                await asyncio.sleep(0.02 * (seed == slow))
                return f"<create_memory>{seed} {observation['step']}</create_memory><final_answer>x</final_answer>"

            return act

    rollouts = asyncio.run(drive.run(SPECS, Policy(), finished=lambda number, rollout: ended.append(number)))
    assert sum(calls) == sum(len(rollout.turns) for rollout in rollouts)
    assert len(calls) < sum(calls) / 3
    assert ended[-1] == 0
