"""Evaluation by processes of Ray's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from atommem_env.errors import JobFailed
from atommem_env.store.memory_store import MemoryStore
from eval.options import EvalConfig
from eval.recipe import play_recipe, read_recipe
from eval.run import evaluate
from eval.run_folder import read_jsonl
from eval.workers import Workers

POLICIES = """
import asyncio, os, signal
from pathlib import Path

class Refused(Exception):
    pass

def policy(observation):
    return f"<create_memory>{observation['chunk'][:50]}</create_memory><final_answer>{observation['question']}</final_answer>"

def once(observation):  # the first process that comes here is killed, the others are not
    if observation["step"] == 2:
        try:
            Path("killed").touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return policy(observation)

def always(observation):
    if observation["question"] == Path("victim").read_text():
        os.kill(os.getpid(), signal.SIGKILL)
    return policy(observation)

def refusing(observation):
    raise Refused("no more of this")

playing = most = 0

async def telling(observation):
    global playing, most
    playing, most = playing + 1, max(most, playing + 1)
    await asyncio.sleep(0.1)
    playing -= 1
    told = most, os.environ["CUDA_VISIBLE_DEVICES"], os.environ["ATOMMEM_TOLD"], os.environ["OPENAI_API_KEY"]
    return f"<final_answer>{told}</final_answer>"
"""


@pytest.fixture(scope="module", autouse=True)
def a_ray_that_believes_in_four_gpus() -> Iterator[None]:
    ray.init(num_cpus=4, num_gpus=4, include_dashboard=False, object_store_memory=10**8)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Two, for many runs; their working folder has the module `ray_playing`."""
    folder, before = tmp_path_factory.mktemp("working"), Path.cwd()
    (folder / "ray_playing.py").write_text(POLICIES)
    os.environ.update({"ATOMMEM_TOLD": "this", "OPENAI_API_KEY": "secret"})
    os.chdir(folder)
    with Workers(2) as started:
        yield started
    os.chdir(before)
    for name in ("ATOMMEM_TOLD", "OPENAI_API_KEY"):
        del os.environ[name]


def config(out: Path, policy: str = "ray_playing:policy", **changes: Any) -> EvalConfig:
    options = {"episodes": 8, "num_docs": 12, "questions": 2, "set": ("chunk_tokens=96",), "durability": "off"}
    return EvalConfig(env_id="AtomMem-Synthetic", policy=policy, out=out, **{**options, **changes})


def written(out: Path) -> bytes:
    return (out / "episodes.jsonl").read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "oracle", "durability": "episode"},
        {"policy": "random", "in_flight": 1},
    ],
)
def test_workers_write_what_one_process_writes(options: dict[str, Any], workers: Workers, tmp_path: Path) -> None:
    alone = evaluate(config(tmp_path / "alone", **options))
    together = evaluate(config(tmp_path / "together", **options), player=workers)
    assert written(tmp_path / "together") == written(tmp_path / "alone")
    assert (tmp_path / "together/config.json").read_bytes() == (tmp_path / "alone/config.json").read_bytes()
    for clock in ("seconds", "steps_per_second"):
        del alone[clock], together[clock]
    assert together == alone
    costs = read_jsonl(tmp_path / "together" / "costs.jsonl")
    assert [cost["episode"] for cost in costs] == list(range(8))
    assert all(0 < cost["seconds"] <= cost["elapsed"] for cost in costs)
    if options.get("durability"):
        kept = [MemoryStore(tmp_path / name / "memory").episodes() for name in ("alone", "together")]
        tasks = [sorted((one.task_id, one.episode_seed, one.status, one.reward) for one in store) for store in kept]
        assert tasks[0] == tasks[1]
        assert len(tasks[0]) == 8


def test_a_worker_has_its_share_of_gpus_the_commands_variables_and_episodes_in_flight(
    workers: Workers, tmp_path: Path
) -> None:
    evaluate(config(tmp_path, "ray_playing:telling", episodes=16, in_flight=3, questions=1), player=workers)
    told = {record["questions"][0]["prediction"] for record in read_jsonl(tmp_path / "episodes.jsonl")}
    assert told == {str((3, gpus, "this", "secret")) for gpus in ("0,1", "2,3")}


def test_an_error_of_a_policy_is_the_same_error_with_its_note_and_the_workers_go_on(
    workers: Workers, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match="no more of this") as raised:
        evaluate(config(tmp_path / "a", "ray_playing:refusing"), player=workers)
    from ray_playing import Refused

    assert type(raised.value) is Refused
    assert "policy ray_playing:refusing" in raised.value.__notes__[0]
    assert written(tmp_path / "a") == b""
    assert evaluate(config(tmp_path / "b"), player=workers)["episodes"] == 8


def test_the_episodes_of_a_worker_that_is_killed_are_played_by_another(workers: Workers, tmp_path: Path) -> None:
    evaluate(config(tmp_path / "b", "ray_playing:once", durability="episode"), player=workers)
    assert Path("killed").exists()
    evaluate(config(tmp_path / "a", "ray_playing:once"), player=workers)  # nobody is killed again
    assert written(tmp_path / "b") == written(tmp_path / "a")
    assert len(MemoryStore(tmp_path / "b" / "memory").episodes()) == 8


def test_an_episode_that_kills_every_worker_ends_the_run_and_resume_goes_on(workers: Workers, tmp_path: Path) -> None:
    Path("victim").write_text("no such question")
    evaluate(config(tmp_path / "a", "ray_playing:always"), player=workers)
    question = read_jsonl(tmp_path / "a" / "episodes.jsonl")[3]["questions"][0]["prediction"]
    Path("victim").write_text(question)
    with pytest.raises(JobFailed, match="resume the run with --resume") as raised:
        evaluate(config(tmp_path / "b", "ray_playing:always", in_flight=1), player=workers)
    assert raised.value.__notes__ == ["at episode 3, as one before it"]
    kept = {record["episode"] for record in read_jsonl(tmp_path / "b" / "episodes.jsonl")}
    assert 3 not in kept
    assert len(kept) >= 6, "all others but one that the second worker may have been playing"
    Path("victim").write_text("no such question")
    evaluate(config(tmp_path / "b", "ray_playing:always", resume=True), player=workers)
    assert written(tmp_path / "b") == written(tmp_path / "a")


def test_a_recipe_is_played_by_the_same_workers(workers: Workers, tmp_path: Path) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        'episodes = 4\n[env]\nnum_docs = 12\n[[environments]]\nenv_id = "AtomMem-Synthetic"\n'
        '[[policies]]\npolicy = "oracle"\n[[policies]]\npolicy = "ray_playing:refusing"\n'
        '[[policies]]\npolicy = "ray_playing:policy"\n'
    )
    runs = read_recipe(recipe, tmp_path / "runs")
    failures = play_recipe(runs, workers=workers)
    assert [(run.policy, "no more of this" in told) for run, told in failures.items()] == [
        ("ray_playing:refusing", True)
    ]
    assert [run.done for run in runs] == [True, False, True]
