import copy
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import atommem_env
from atommem_env.env import AtomMemEnv
from atommem_env.episode import Episode
from atommem_env.errors import EmbeddingError, SettingError, StoreError
from atommem_env.spaces import Text

SMALL: dict[str, Any] = {"num_docs": 12, "chunk_tokens": 60}
REPLIES = [
    "<create_memory>one thing</create_memory><read_memory>thing</read_memory>",
    "nothing to say",
    "<create_memory>another thing</create_memory><update_memory>m1: two things</update_memory><delete_memory>m9</delete_memory>",
    "<update_scratchpad>a note</update_scratchpad><final_answer>early</final_answer>",
    "<read_memory>note</read_memory>",
]


def replies(length: int = 60) -> list[str]:
    """Operations for a while, then answers to whatever is asked."""
    return (REPLIES + ["<final_answer>unknown</final_answer>"] * length)[:length]


def make(**options: Any) -> gym.Env[Any, Any]:
    return gym.make("AtomMem-Synthetic", **SMALL, **options)


def play(env: gym.Env[Any, Any], seed: int = 5) -> list[Any]:
    """Everything that reset and steps return, in order."""
    seen: list[Any] = [env.reset(seed=seed)]
    for reply in replies():
        seen.append(env.step(reply))
        if seen[-1][2] or seen[-1][3]:
            break
    return seen


def inner(env: gym.Env[Any, Any]) -> AtomMemEnv:
    assert isinstance(env.unwrapped, AtomMemEnv)
    return env.unwrapped


@pytest.mark.parametrize("env_id", ["AtomMem-Synthetic", "AtomMem/Synthetic-v0"])
def test_gymnasiums_checker_has_nothing_to_say(env_id: str) -> None:
    check_without_a_warning(gym.make(env_id, **SMALL))


@pytest.mark.parametrize("name", ["HotpotQA", "2WikiMultiHopQA", "MuSiQue"])
@pytest.mark.parametrize("form", ["AtomMem-{}", "AtomMem/{}-v0"])
def test_gymnasiums_checker_has_nothing_to_say_on_real_questions(name: str, form: str, shared_data: Path) -> None:
    data = shared_data / f"{name.lower()}_dev.jsonl.gz"
    check_without_a_warning(gym.make(form.format(name), data=str(data), num_docs=50))


def check_without_a_warning(env: gym.Env[Any, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
        env.close()


def test_both_forms_of_every_id_are_registered_without_a_warning() -> None:
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "import gymnasium as gym, atommem_env\n"
        "for name in atommem_env.ENVIRONMENTS: print(gym.spec(f'AtomMem-{name}').id, gym.spec(f'AtomMem/{name}-v0').id)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(out.stdout.split()) == 2 * len(atommem_env.ENVIRONMENTS)
    assert not out.stderr


def test_importing_is_quick_and_brings_neither_torch_nor_lancedb() -> None:
    code = (
        "import sys, time; start = time.process_time(); import atommem_env; print(time.process_time() - start)\n"
        "assert not {'torch', 'lancedb', 'rich', 'tyro'} & set(sys.modules), sys.modules"
    )
    ran = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(each.stdout) for each in ran) < 0.5  # seconds of the processor, gymnasium and numpy included


def test_the_same_seed_gives_the_same_episode_and_another_seed_another() -> None:
    env = make()
    first, second, third = play(env, 5), play(env, 5), play(env, 6)
    env.close()
    assert first == second
    assert first != third


def test_the_checked_and_wrapped_environment_gives_the_same_as_the_episode() -> None:
    env = make()
    seen = play(env)
    task_index, task_seed = seen[0][1]["task_index"], seen[0][1]["task_seed"]
    unwrapped = inner(env)
    assert unwrapped.episode is not None
    episode = Episode(unwrapped.source.task(task_index, task_seed), unwrapped.settings, unwrapped.episode.seed)
    observations = [episode.observe()]
    for reply in replies()[: len(seen) - 1]:
        requests = episode.submit(reply)
        observations.append(
            episode.resolve(
                unwrapped.embedder.embed([r.text for r in requests], "document") if requests else []
            ).observation
        )
    env.close()
    assert [item[0] for item in seen] == observations


def test_another_process_with_another_hash_seed_sees_the_same_bytes() -> None:
    code = (
        "import gymnasium as gym, atommem_env, json, sys\n"
        "env = gym.make('AtomMem-Synthetic', durability='off', **json.loads(sys.argv[1]))\n"
        "seen = [env.reset(seed=5)]\n"
        "for reply in json.loads(sys.argv[2]):\n"
        "    seen.append(env.step(reply))\n"
        "    if seen[-1][2] or seen[-1][3]: break\n"
        "print(json.dumps(seen))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, json.dumps(SMALL), json.dumps(replies())],
            capture_output=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PATH": "", "HOME": str(Path.home())},
        ).stdout
        for seed in ("0", "1", "77")
    }
    assert len(outputs) == 1
    assert outputs.pop().decode().strip() == json.dumps(play(make(durability="off")))


def test_vector_environments_see_what_single_ones_see(tmp_path: Path) -> None:
    singles = []
    for seed in (5, 6):
        env = make(store=tmp_path / "single")
        singles.append(play(env, seed))
        env.close()
    length = min(map(len, singles))
    for vector in (
        gym.vector.SyncVectorEnv([lambda: make(store=tmp_path / "sync")] * 2),
        gym.make_vec(
            "AtomMem-Synthetic",
            num_envs=2,
            vectorization_mode="async",
            vector_kwargs={"shared_memory": False, "context": "spawn"},
            store=str(tmp_path / "async"),
            **SMALL,
        ),
    ):
        observation, _ = vector.reset(seed=[5, 6])
        observations = [observation]
        rewards = []
        for reply in replies()[: length - 1]:
            observation, reward, *_ = vector.step((reply, reply))
            observations.append(observation)
            rewards.append(reward)
        vector.close()
        for number, single in enumerate(singles):
            for step in range(length):
                for key, value in single[step][0].items():
                    assert observations[step][key][number] == value, (type(vector), step, key)
            assert [reward[number] for reward in rewards] == [item[1] for item in single[1:length]]


def test_a_spec_survives_json_and_an_environment_survives_pickle() -> None:
    env = make(operations=("create", "read"), durability="off")
    assert env.spec is not None
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert play(again) == play(env) == play(pickle.loads(pickle.dumps(env))) == play(copy.deepcopy(env))


def test_common_wrappers_work() -> None:
    env: Any = make(durability="off")
    env = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.TimeLimit(gym.wrappers.OrderEnforcing(env), 50))
    env = gym.wrappers.TransformObservation(env, lambda seen: seen["chunk"], Text())
    observation, _ = env.reset(seed=0)
    assert isinstance(observation, str)
    env = gym.wrappers.Autoreset(make(durability="off"))
    env.reset(seed=0)
    for reply in replies():
        env.step(reply)


def test_a_task_is_named_by_its_index_and_naming_it_does_not_disturb_later_draws() -> None:
    env = make(durability="off")
    _, named = env.reset(seed=1, options={"index": 7, "seed": 3})
    assert (named["task_index"], named["task_seed"]) == (7, 3)
    _, after_named = env.reset()
    env.reset(seed=1)
    _, after_drawn = env.reset()
    assert after_named == after_drawn
    with pytest.raises(SettingError, match="from 0 to"):
        env.reset(options={"index": -1})
    with pytest.raises(SettingError, match="position"):
        env.reset(options={"position": 1})


def test_golds_are_told_only_at_the_end() -> None:
    env = make(durability="off")
    seen = play(env)
    outcome_keys = {"golds", "supporting_facts", "predictions"}
    assert all(not outcome_keys & set(item[-1]) for item in seen[:-1])
    assert outcome_keys <= set(seen[-1][-1])


def test_after_one_episode_with_default_settings_a_plain_lancedb_client_lists_its_entries() -> None:
    env = make()
    play(env)
    assert inner(env).episode is not None
    survivors = [entry.text for entry in inner(env).episode.memory.entries()]  # type: ignore[union-attr]
    code = (
        "import lancedb, json; table = lancedb.connect({!r}).open_table('entries')\n"
        "print(json.dumps([row['text'] for row in table.to_arrow().to_pylist()]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code.format(str(inner(env).store.folder))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(json.loads(out.stdout)) == sorted(survivors)
    assert survivors


def test_a_fork_takes_its_own_course_and_is_not_stored(tmp_path: Path) -> None:
    env = make(store=tmp_path, durability="step")
    with pytest.raises(gym.error.ResetNeeded):
        inner(env).fork()
    env.reset(seed=3)
    env.step("<create_memory>kept</create_memory>")
    twin = inner(env).fork()
    one, other = (
        [each.step(reply) for reply in (f"<create_memory>{name}</create_memory>", "<read_memory>kept</read_memory>")]
        for each, name in ((inner(env), "left"), (twin, "right"))
    )
    assert [step[0]["chunk"] for step in one] == [step[0]["chunk"] for step in other]
    assert ("left" in one[1][0]["retrieved"], "right" in other[1][0]["retrieved"]) == (True, True)
    (episode,) = inner(env).store.episodes()
    assert [reply for reply in inner(env).store.replies(episode.episode_id) if "right" in reply] == []
    assert env.reset()[1] == twin.reset()[1]  # the next episode is the same for both
    twin.close()
    env.step("")  # the store of the other is open
    env.close()


def test_an_unnamed_store_is_temporary_and_a_named_one_is_kept(own_data_folder: Path, tmp_path: Path) -> None:
    env, named = make(), make(store=tmp_path / "kept")
    for one in (env, named):
        play(one)
    folder = inner(env).store.folder
    assert any(folder.iterdir())
    env.close()
    named.close()
    assert not folder.exists()
    assert (tmp_path / "kept" / "entries.lance").is_dir()
    assert not (own_data_folder / "memory").exists()


@pytest.mark.parametrize("end", ["", "env.close()", "raise SystemExit(3)"])
def test_an_unnamed_store_goes_with_the_process(end: str) -> None:
    code = (
        "import os, gymnasium as gym, atommem_env\n"
        "env = gym.make('AtomMem-Synthetic', durability='step')\n"
        "env.reset(seed=0)\n"
        "env.step('<create_memory>x</create_memory>')\n"
        "folder = env.unwrapped.store.folder\n"
        "assert any(folder.iterdir())\n"
        "print(folder, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code + end], capture_output=True, text=True)
    assert done.returncode == (3 if "3" in end else 0), done.stderr
    assert not Path(done.stdout.strip()).exists()


def test_an_interrupted_episode_goes_on_in_another_process_without_its_embedder(tmp_path: Path) -> None:
    whole = make(store=tmp_path / "whole")
    expected = play(whole)
    whole.close()
    env = make(store=tmp_path / "half")
    env.reset(seed=5)
    for reply in replies()[:3]:
        env.step(reply)
    episode_id = inner(env).episode_id
    env.close()

    class Broken:
        name, dimension = "broken", 256

        def embed(self, texts: Any, kind: Any) -> Any:
            raise AssertionError("the stored vectors must suffice")

    again = make(store=tmp_path / "half", embedder=Broken())
    observation, info = again.reset(options={"resume": episode_id})
    assert observation == expected[3][0]
    assert info == expected[0][1]
    again.unwrapped.embedder = inner(whole).embedder
    for number, reply in enumerate(replies()[3 : len(expected) - 1], start=4):
        assert again.step(reply) == expected[number]
    again.close()
    store = inner(again).store
    assert [record.status for record in store.episodes()] == ["answered"]
    assert store.replies(episode_id) == replies()[: len(expected) - 1]
    with pytest.raises(SettingError, match="over"):
        again.reset(options={"resume": episode_id})


def test_an_interrupted_episode_is_not_resumed_with_other_settings(tmp_path: Path) -> None:
    env = make(store=tmp_path)
    env.reset(seed=5)
    env.step("")
    episode_id = inner(env).episode_id
    env.close()
    other = make(store=tmp_path, top_k=2)
    with pytest.raises(SettingError, match="top_k"):
        other.reset(options={"resume": episode_id})


def test_an_embedder_that_fails_is_an_error_and_the_step_can_be_taken_again() -> None:
    class Flaky:
        name, dimension = "flaky", 4
        broken = True

        def embed(self, texts: Any, kind: Any) -> Any:
            if self.broken:
                raise EmbeddingError("no answer")
            return np.ones((len(texts), 4), dtype=np.float32)

    flaky = Flaky()
    env = make(embedder=flaky, durability="off")
    env.reset(seed=5)
    with pytest.raises(EmbeddingError):
        env.step(REPLIES[0])
    flaky.broken = False
    observation, _, _, _, info = env.step(REPLIES[0])
    assert observation["step"] == 1
    assert info["entries"] == 1


def test_another_embedders_store_is_refused_when_the_environment_is_made(tmp_path: Path) -> None:
    class Narrow:
        name, dimension = "narrow", 4

        def embed(self, texts: Any, kind: Any) -> Any:
            raise AssertionError("it must not come to that")

    env = make(store=tmp_path)
    play(env)
    env.close()
    with pytest.raises(StoreError, match=r"256-dimensional vectors, got 4.*another folder"):
        make(store=tmp_path, embedder=Narrow())
    make(store=tmp_path, embedder=Narrow(), durability="off").close()


def test_rendering(capsys: pytest.CaptureFixture[str]) -> None:
    env = make(render_mode="ansi", durability="off")
    env.reset(seed=0)
    assert "chunk: " in str(env.render())
    make(render_mode="human", durability="off").reset(seed=0)
    assert "chunk: " in capsys.readouterr().out
    with pytest.raises(SettingError, match="rgb_array"):
        AtomMemEnv("synthetic", render_mode="rgb_array")


def test_stepping_before_reset_is_gymnasiums_own_error() -> None:
    with pytest.raises(gym.error.ResetNeeded):
        AtomMemEnv("synthetic").step("")


def test_a_misspelt_option_is_refused_with_those_that_exist() -> None:
    with pytest.raises(SettingError, match=r"numdocs.*num_docs"):
        AtomMemEnv("synthetic", numdocs=3)
    with pytest.raises(SettingError, match="hotpotqa"):
        AtomMemEnv("hotpot")


def test_a_task_source_of_ones_own_takes_the_datasets_place() -> None:
    source = inner(make()).source
    env = AtomMemEnv(source, durability="off", chunk_tokens=60)
    assert env.reset(seed=5)[0] == make(durability="off").reset(seed=5)[0]


def test_every_environment_is_listed() -> None:
    assert set(atommem_env.ENVIRONMENTS) == {"HotpotQA", "2WikiMultiHopQA", "MuSiQue", "Synthetic", "Files", "Custom"}
