"""Parts of one's own, each through every door: `gym.make`, `atommem eval`, and a training step."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import atommem_env
from atommem_env import Operation, OperationKind, cli
from atommem_env.errors import PluginError, SettingError
from eval.compare import read_run
from eval.report.report import find_runs, group

PARTS = '''
import gymnasium as gym
import numpy as np

from atommem_env import Score, Task
from atommem_env.dialects.tags import TagsDialect
from atommem_env.prompts import terse


class Shouting(TagsDialect):
    """Tags as ever, and entries in capitals."""

    name = "shouting"

    def show(self, entries):
        return super().show(entries).upper()


def layout(observation, settings):
    return [{"role": "user", "content": terse.messages(observation, settings)[-1]["content"]}]


def score(prediction, golds):
    """Right is what ends as a gold does."""
    return Score.exact(float(any(prediction.endswith(gold) for gold in golds)))


class Riddles:
    dataset = "riddles"

    def __init__(self, count=40):
        self.count = count

    def __len__(self):
        return self.count

    def task(self, index, seed):
        documents = [("Ada", f"Ada moved to place {index}."), ("Ben", "Ben stayed.")]
        return Task.of(documents, [("Where does Ada live?", f"{index}")], dataset="riddles", scoring=score)


class Lengths:
    """Embeds a text as its length and a constant."""

    name, dimension = "lengths", 2

    def embed(self, texts, kind):
        vectors = np.array([[1.0, len(text)] for text in texts], dtype=np.float32).reshape(-1, 2)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brief(summary):
    return 1 - summary.steps / (2 * summary.max_steps)


gym.register("Riddles-v0", entry_point="atommem_env.env:AtomMemEnv", kwargs={"source": Riddles, "chunk_tokens": 64})


def policy(observation):
    if observation["phase"] == "answer":
        return f"<final_answer>{observation['retrieved'].rstrip('.').split()[-1]}</final_answer>"
    question = observation["questions"]
    return f"<create_memory>{observation['chunk'].split(chr(10))[1]}</create_memory><read_memory>{question}</read_memory>"
'''
MODULE = "parts_of_ones_own"


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / f"{MODULE}.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.delitem(gym.registry, "Riddles-v0", raising=False)
    return tmp_path


def parts() -> Any:
    import importlib

    return importlib.import_module(MODULE)


def atommem(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["atommem", *words])
    cli.main()


# part → option of `gym.make` and of commands, attribute of the module; a layout is how a model is asked, no setting of ours
DOORS = {"dialect": "Shouting", "source": "Riddles", "embedder": "Lengths", "reward": "brief", "layout": "layout"}


def check(part: str, env: Any) -> None:
    """The part is in use."""
    observation, _ = env.reset(seed=0)
    observation, *_ = env.step("<create_memory>Ada</create_memory><read_memory>Ada</read_memory>")
    ended = False
    while not ended:
        retrieved = observation["retrieved"]
        observation, reward, terminated, truncated, info = env.step("<final_answer>place 7</final_answer>")
        ended = terminated or truncated
    if part == "dialect":
        assert retrieved == "M1: ADA"
    if part == "source":
        assert (env.unwrapped.source.dataset, info["em"]) == (
            "riddles",
            (float("place 7".endswith(info["golds"][0][0])),),
        )
    if part == "embedder":
        assert env.unwrapped.embedder.dimension == 2
    if part == "reward":
        assert 0 < reward < 1


@pytest.mark.parametrize("part", [part for part in DOORS if part != "layout"])
@pytest.mark.parametrize("given", ["target", "object"])
def test_through_gym_make(part: str, given: str) -> None:
    target = f"{MODULE}:{DOORS[part]}"
    found = getattr(parts(), DOORS[part])
    value = target if given == "target" else found() if isinstance(found, type) else found
    options = {"chunk_tokens": 64} if part == "source" else {"num_docs": 6}
    with gym.make("AtomMem-Custom" if part == "source" else "AtomMem-Synthetic", **{part: value}, **options) as env:
        check(part, env)
    envs = gym.make_vec("AtomMem-Synthetic" if part != "source" else "AtomMem-Custom", num_envs=2, **{part: value})
    envs.reset(seed=0)
    envs.step(("", ""))
    envs.close()


@pytest.mark.parametrize("part", DOORS)
def test_through_the_command_eval(part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    env_id = "AtomMem-Custom" if part == "source" else "AtomMem-Synthetic"
    policy = "tiny" if part == "layout" else f"{MODULE}:policy"
    option = (f"--{part}", f"{MODULE}:{DOORS[part]}")
    small = () if part == "source" else ("--num-docs", "6")
    atommem(monkeypatch, "eval", env_id, "--policy", policy, *option, *small, "--episodes", "3", "--out", "run")
    run = read_run(tmp_path / "run")
    assert option[1] in json.dumps(run.config)
    if part == "source":
        assert run.summary is not None
        assert run.summary["em"] == 1.0  # by the rule that it brings: "place 3" ends as "3" does
    if part == "reward":
        assert all(0 < record["reward"] < 1 for record in run.records)


@pytest.mark.parametrize("part", DOORS)
def test_through_a_training_step(part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    env_id = "AtomMem-Custom" if part == "source" else "AtomMem-Synthetic"
    option = (f"--{part}", f"{MODULE}:{DOORS[part]}")
    small = () if part == "source" else ("--num-docs", "6")
    size = ("--steps", "1", "--groups", "1", "--group-size", "2", "--eval-every", "0", "--max-new-tokens", "8")
    layout = () if part == "layout" else ("--layout", "terse")
    atommem(monkeypatch, "grpo", env_id, "--model", "tiny", *option, *small, *size, *layout, "--out", "run")
    (line,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert line["step"] == 1
    assert option[1] in (tmp_path / "run" / "config.json").read_text()
    if part == "reward":
        assert 0 < line["reward"] < 1


def test_an_environment_id_of_ones_own_goes_through_eval_report_and_grpo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    env_id = f"{MODULE}:Riddles-v0"
    for seed in ("0", "1"):
        out = f"runs/{seed}"
        atommem(monkeypatch, *f"eval {env_id} --policy {MODULE}:policy --episodes 4 --seed {seed} --out {out}".split())
    (table,) = group(find_runs([tmp_path / "runs"])[0])
    assert (len(table.rows), len(table.rows[0].runs), table.rows[0].numbers["em"]) == (1, 2, 1.0)
    atommem(monkeypatch, "report", "runs")
    assert "Riddles-v0" in (tmp_path / "runs" / "report" / "report.md").read_text()
    words = f"grpo {env_id} --model tiny --layout terse --steps 1 --groups 1 --group-size 2 --eval-every 0 --out grpo"
    atommem(monkeypatch, *words.split(), "--max-new-tokens", "8")
    assert (tmp_path / "grpo" / "model" / "config.json").is_file()


def test_a_scoring_rule_is_a_name_a_target_or_a_function() -> None:
    from atommem_env.scoring import score

    for rule in (parts().score, f"{MODULE}:score"):
        assert score("in Rome", ("Rome",), rule).em == 1.0
        task = atommem_env.Task.of(["Ada moved to Rome."], [("Where?", "Rome")], scoring=rule)
        result = atommem_env.evaluate(
            lambda observation: "<final_answer>in Rome</final_answer>", task, episodes=1, progress=False
        )
        assert result.em == 1.0
    assert score("in Rome", ("Rome",), "hotpotqa").em == 0.0
    with pytest.raises(SettingError, match=r"must return an atommem_env\.Score, got 1\.0"):
        score("in Rome", ("Rome",), lambda prediction, golds: 1.0)  # type: ignore[arg-type,return-value]
    with pytest.raises(SettingError, match="did you mean 'hotpotqa'"):
        score("in Rome", ("Rome",), "hotpot")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("dialect", f"{MODULE}:Shoutingg", "has no 'Shoutingg'; did you mean 'Shouting'"),
        ("dialect", "no_such_module:x", "There is no module 'no_such_module' in the working folder"),
        ("dialect", f"{MODULE}:brief", "A dialect is an object like atommem_env.types.Dialect"),
        ("dialect", "tag", "did you mean 'tags'"),
        ("reward", "exact_macth", "did you mean 'exact_match'"),
        ("reward", 3, "reward must be one of exact_match, f1"),
        ("reward", lambda summary: float("nan"), "must be a finite number, got nan"),
        ("embedder", "hashed", "did you mean 'hashing'"),
        ("embedder", f"{MODULE}:brief", "An embedder is an object like atommem_env.embedders.Embedder"),
        ("source", "hotpot", "did you mean 'hotpotqa'"),
        ("source", [], "at least one atommem_env.Task"),
        ("source", lambda: 3, "A task source is an object like atommem_env.types.TaskSource"),
        ("dataset", "synthetic", "dataset is called source now"),
    ],
)
def test_what_is_wrong_with_a_part_is_said_in_one_sentence(option: str, value: object, message: str) -> None:
    with pytest.raises((SettingError, PluginError), match=message) as raised:  # noqa: PT012 (a reward is asked at the end)
        env = gym.make("AtomMem-Synthetic", **{option: value})
        env.reset(seed=0)
        while not env.step("<final_answer>x</final_answer>")[2]:
            pass
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------------------- the front door


def test_the_front_door_opens_without_torch_and_knows_its_names() -> None:
    code = (
        "import sys, atommem_env\n"
        "assert not {'torch', 'lancedb', 'transformers', 'pyarrow'} & set(sys.modules), 'heavy'\n"
        "result = atommem_env.evaluate(lambda o: '<final_answer>x</final_answer>', episodes=2, num_docs=6, progress=False)\n"
        "assert 'torch' not in sys.modules\n"
        "names = [name for name in atommem_env.__all__ if getattr(atommem_env, name) is None]\n"
        "assert not names and set(atommem_env.__all__) <= set(dir(atommem_env))\n"
        "print(result)"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Result(<lambda> on AtomMem-Synthetic, 6 documents: EM 0.0 % [0.0, 0.0], 2 episodes)\n"
    with pytest.raises(AttributeError, match="no attribute 'evaluat'"):
        atommem_env.evaluat  # noqa: B018


def test_python_and_the_command_line_give_the_same_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = "eval AtomMem-Synthetic --policy oracle --num-docs 6 --set top_k=2 --episodes 4 --seed 3 --out command"
    atommem(monkeypatch, *words.split())
    result = atommem_env.evaluate(
        "oracle", "AtomMem-Synthetic", num_docs=6, top_k=2, episodes=4, seed=3, out="python", progress=False
    )
    for name in ("config.json", "episodes.jsonl"):
        assert (tmp_path / "command" / name).read_bytes() == (tmp_path / "python" / name).read_bytes()
    assert result.episodes == [*map(json.loads, (tmp_path / "python" / "episodes.jsonl").read_text().splitlines())]
    assert result.table().column("episode").to_pylist() == [0, 1, 2, 3]


def test_an_environment_object_is_played_as_it_was_made_and_left_alone(tmp_path: Path) -> None:
    env = gym.make("AtomMem-Synthetic", num_docs=6, top_k=2, reward=parts().brief)
    observation, _ = env.reset(seed=0)
    result = atommem_env.evaluate("oracle", env, episodes=3, progress=False)
    assert env.unwrapped.episode.observe() == observation  # type: ignore[attr-defined]
    assert env.unwrapped.store.episodes() == []  # type: ignore[attr-defined]
    env.close()
    assert all(0 < record["reward"] < 1 for record in result.episodes)
    config = read_run(result.folder).config
    assert (config["options"]["num_docs"], config["options"]["top_k"]) == (6, 2)
    assert config["settings"]["reward"] == f"{MODULE}:brief"
    with pytest.raises(SettingError, match=r"give top_k to gym\.make"):
        atommem_env.evaluate("oracle", env, episodes=3, top_k=3)
    saved = result.save(tmp_path / "saved")
    assert atommem_env.Result(saved).em == result.em
    assert any((saved / "memory").iterdir())
    folder = result.folder
    del result
    assert not folder.exists()


def test_results_are_compared() -> None:
    first, second = (
        atommem_env.evaluate(policy, num_docs=6, episodes=6, progress=False) for policy in ("silent", "oracle")
    )
    compared = first.compare(second)
    assert (compared["all"]["difference"], compared["runs"][1]["label"]) == (1.0, "oracle")
    assert second.ci95 == (1.0, 1.0)


def test_a_function_with_a_client_of_the_running_loop_is_evaluated_in_that_loop() -> None:
    async def notebook() -> tuple[atommem_env.Result, float]:
        loop = asyncio.get_running_loop()
        client: asyncio.Queue[str] = asyncio.Queue()  # bound to the loop in which it is first waited for

        async def serve() -> None:
            while True:
                await answers.put(f"<final_answer>{await client.get()}</final_answer>")

        answers: asyncio.Queue[str] = asyncio.Queue()
        server = loop.create_task(serve())

        async def policy(observation: atommem_env.Observation) -> str:
            assert asyncio.get_running_loop() is loop
            await client.put("unknown")
            return await answers.get()

        result = await atommem_env.evaluate_async(policy, num_docs=6, episodes=4, progress=False)
        env = gym.make("AtomMem-Synthetic", num_docs=6)
        rollout = await atommem_env.play_episode_async(env, policy, seed=0)
        env.close()
        # The blocking form works here as well, in a thread, with a policy that is bound to no loop.
        atommem_env.evaluate(lambda observation: "", num_docs=6, episodes=2, progress=False)
        server.cancel()
        return result, rollout.reward

    result, reward = asyncio.run(notebook())
    assert len(result.episodes) == 4
    assert reward in (0.0, 1.0)


def test_a_method_with_a_model_that_is_an_object() -> None:
    class Echo:
        name = "echo"

        async def complete(self, messages: Any, **options: Any) -> atommem_env.Reply:
            return atommem_env.Reply("Rome")

    def method(settings: Any, ask: Any) -> Any:
        async def act(observation: atommem_env.Observation) -> str:
            if observation["phase"] == "read":
                return ""
            reply = await ask([{"role": "user", "content": observation["question"]}])
            return atommem_env.render_reply(settings, Operation(OperationKind.ANSWER, reply.text))

        return act

    task = atommem_env.Task.of(["Ada moved to Rome."], [("Where does Ada live?", "Rome")])
    for policy in (method, "rag"):
        result = atommem_env.evaluate(policy, task, model=Echo(), episodes=1, progress=False)
        assert result.em == 1.0
        assert result.summary["policy"].endswith("@echo")


@pytest.mark.parametrize(
    ("documents", "questions", "message"),
    [
        ([3], [("a", "b")], "A document must be a text"),
        (["x"], [3], "A question must be"),
        ("who", [("a", "b")], "documents must be a list, got the text 'who'"),
        (["x"], "who?", "questions must be a list, got the text 'who"),
        (["x"], [("who?", 3)], "A question must be"),
    ],
)
def test_a_task_of_other_things_is_refused(documents: Any, questions: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        atommem_env.Task.of(documents, questions)


def test_a_task_of_plain_texts_has_an_id_of_its_texts() -> None:
    one, same, other = (
        atommem_env.Task.of(["x", ("Title", "y")], [("who?", ["a", "b"])]),
        atommem_env.Task.of(["x", ("Title", "y")], [("who?", ("a", "b"))]),
        atommem_env.Task.of(["x", ("Title", "y")], [("who?", "a")]),
    )
    assert one == same
    assert one.id != other.id
    assert [document.title for document in one.documents] == ["Document 1", "Title"]
    assert one.questions[0].answers == ("a", "b")


def test_collect_in_python_writes_what_the_command_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    atommem(
        monkeypatch,
        *[
            "collect",
            "AtomMem-Synthetic",
            "--policy",
            "oracle",
            "--num-docs",
            "6",
            "--episodes",
            "4",
            "--out",
            "command",
        ],
    )
    summary = atommem_env.collect("oracle", num_docs=6, episodes=4, out="python", progress=False)
    assert summary["samples"] > 0
    for name in ("config.json", "samples.jsonl"):
        assert (tmp_path / "command" / name).read_bytes() == (tmp_path / "python" / name).read_bytes()
    task = atommem_env.Task.of(["Ada moved to Rome."], [("Where does Ada live?", "Rome")])
    own = atommem_env.collect(
        lambda observation: "<final_answer>Rome</final_answer>",
        [task],
        episodes=2,
        layout=parts().layout,
        out=tmp_path / "own",
        progress=False,
    )
    assert own["kept"] == 2
    assert json.loads((tmp_path / "own" / "samples.jsonl").read_text().splitlines()[0])["prompt"][0]["role"] == "user"
