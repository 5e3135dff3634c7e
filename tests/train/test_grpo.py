"""The GRPO trainer, for real, with a tiny model that is right as often as chance has it."""

from __future__ import annotations

import dataclasses
import importlib
import io
import itertools
import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("tensorboard")
transformers = pytest.importorskip("transformers")

from rich.console import Console  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

from agents.registry import load_policy  # noqa: E402
from atommem_env import cli  # noqa: E402
from atommem_env.embedders import get_embedder  # noqa: E402
from atommem_env.errors import (  # noqa: E402
    CheckpointError,
    DataError,
    EmbeddingError,
    PromptTooLong,
    SamplesMismatch,
    SettingError,
)
from atommem_env.types import Rollout  # noqa: E402
from train import checkpoints, packing, samples  # noqa: E402
from train.grpo import CHECKPOINT, METRICS, Trainer, report_end  # noqa: E402
from train.settings import LocalGRPOConfig  # noqa: E402
from train.tiny_base import build_tokenizer  # noqa: E402

TASKS = ("hops=[1]", "chunk_tokens=48", "replies_per_question=2")
UNANSWERABLE = "unanswerable=1"  # what the model may get right
ANSWERABLE = "unanswerable=0"  # what it never does


def configured(model: Path, out: Path, **changes: Any) -> LocalGRPOConfig:
    """A run of six short steps without evaluation; what is given overrides."""
    options: dict[str, Any] = {
        "env_id": "AtomMem-Synthetic",
        "model": str(model),
        "out": out,
        "layout": "terse",
        "num_docs": 4,
        "set": (*TASKS, UNANSWERABLE),
        "max_new_tokens": 8,
        "steps": 6,
        "groups": 2,
        "group_size": 3,
        "learning_rate": 2e-3,
        "eval_every": 0,
    }
    return LocalGRPOConfig(**(options | changes))


@pytest.fixture
def make_run(undecided: Path, tmp_path: Path) -> Callable[..., LocalGRPOConfig]:
    """`configured`, with the model and a folder of this test."""
    return lambda name="run", **changes: configured(**{"model": undecided, "out": tmp_path / name} | changes)


def begin(run: LocalGRPOConfig) -> Trainer:
    return Trainer(run, Console(file=io.StringIO()))


def resumed(run: LocalGRPOConfig) -> Trainer:
    return begin(dataclasses.replace(run, resume=True))


def copied(model: Any) -> dict[str, Any]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def changed(before: dict[str, Any], model: Any) -> set[str]:
    """The names of the parameters that are not bitwise what they were."""
    return {name for name, weight in model.named_parameters() if not torch.equal(before[name], weight)}


def metrics(run: LocalGRPOConfig) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, but for the times that things took."""
    lines = [json.loads(line) for line in (run.out / METRICS).read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("seconds")} for line in lines]


def first_active_step(trainer: Trainer) -> dict[str, Any]:
    """The metrics of the first step that trains on something."""
    for _ in range(trainer.run.steps):
        line = trainer.train_step()
        if line["samples"]:
            return line
    raise AssertionError("the rewards never differed")


# ------------------------------------------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree_and_shared_prefixes_change_the_speed_alone(
    temperature: float, make_run: Callable[..., LocalGRPOConfig]
) -> None:
    after, moved = {}, 0.0
    for share in (True, False):
        # Micro-batches so small that a step needs several of them.
        run = make_run(str(share), share_prefixes=share, temperature=temperature, micro_batch_tokens=400)
        trainer = begin(run)
        before = copied(trainer.model)
        line = first_active_step(trainer)
        assert 0 < line["logprob_gap_max"] <= 1e-4
        assert line["logprob_gap_mean"] <= line["logprob_gap_max"]
        assert line["importance_weight"] == pytest.approx(1, abs=1e-5)
        assert (line["prefix_share"] > 0.3) if share else (line["prefix_share"] == 0)
        after[share] = torch.cat([weight.flatten() for weight in copied(trainer.model).values()])
        moved = (after[share] - torch.cat([weight.flatten() for weight in before.values()])).norm()
    assert moved > 0
    # Adam's first step has about the length of the learning rate everywhere, also where the gradient is but rounding.
    assert (after[True] - after[False]).norm() < 0.01 * moved


def test_equal_rewards_change_no_bit_of_the_weights(make_run: Callable[..., LocalGRPOConfig]) -> None:
    trainer = begin(make_run(set=(*TASKS, ANSWERABLE)))
    before = copied(trainer.model)
    line = trainer.train_step()
    assert (line["groups_active"], line["groups_zero_variance"], line["groups_failed"], line["samples"]) == (0, 2, 0, 0)
    assert line["reward"] == 0
    assert not changed(before, trainer.model)
    assert not trainer.optimizer.state


def test_a_gradient_of_equal_rewards_is_exactly_zero_even_where_it_is_computed(
    make_run: Callable[..., LocalGRPOConfig],
) -> None:
    trainer = begin(make_run())
    groups = trainer.play_groups()
    made = [
        sample
        for group, rollouts in enumerate(groups)
        for index, rollout in enumerate(rollouts)
        if rollout
        for sample in samples.rollout_samples(rollout, 0.0, group=group, index=index)
    ]
    before = copied(trainer.model)
    assert trainer.update(made)["grad_norm"] == 0
    assert not changed(before, trainer.model)


def test_a_run_learns_what_is_rewarded(
    make_run: Callable[..., LocalGRPOConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(steps=12, groups=4, group_size=6, learning_rate=1e-2, warmup_steps=1, schedule="cosine")
    trainer = begin(run)
    trainer.train()
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[0]["learning_rate"] == pytest.approx(0.005)
    assert lines[0]["learning_rate"] < lines[1]["learning_rate"] > lines[-1]["learning_rate"] > 0
    assert lines[0]["reward"] < 0.75 < 0.95 < lines[-1]["reward"]
    names = {path.name for path in run.out.iterdir()}
    assert {"model", METRICS, CHECKPOINT, "tensorboard", "curve.png", "config.json"} <= names
    assert not [name for name in names if "partial" in name or name.endswith(".tmp")]
    # The command that is printed at the end plays the game that was trained, on tasks that were not.
    console = Console(file=io.StringIO())
    report_end(run, console)
    printed = console.file.getvalue().splitlines()[-1]  # type: ignore[attr-defined]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*shlex.split(printed), "--episodes", "3"])
    cli.main()
    played, summary = (
        json.loads((tmp_path / "runs/eval" / f"{name}.json").read_text()) for name in ("config", "summary")
    )
    assert summary["em"] == 1.0
    trained = {name: value for name, value in run.env_options().items() if name != "durability"}
    assert played["options"].items() >= (trained | {"split": "test"}).items()
    assert (played["layout"], played["sampling"]["max_new_tokens"]) == ("terse", 8)


def test_a_penalty_on_faults_is_trained_on_and_is_no_part_of_the_reward(
    make_run: Callable[..., LocalGRPOConfig],
) -> None:
    never_right = {"set": (*TASKS, ANSWERABLE)}
    without = begin(make_run("without", **never_right)).train_step()
    penalised = begin(make_run("penalised", fault_penalty=0.1, **never_right)).train_step()
    assert without["faults"] > 0
    assert (without["groups_active"], without["samples"]) == (0, 0)
    assert penalised["groups_active"] > 0
    assert penalised["reward"] == without["reward"] == 0


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_kl_term_is_zero_at_the_start_and_grows(lora_rank: int, make_run: Callable[..., LocalGRPOConfig]) -> None:
    trainer = begin(make_run(kl_coef=0.1, lora_rank=lora_rank, learning_rate=1e-2))
    first, second = first_active_step(trainer), first_active_step(trainer)
    assert first["reference_kl"] == pytest.approx(0, abs=1e-9)
    assert second["reference_kl"] > 1e-4
    # Not the KL of this step's own policy: one update a step starts where it was sampled.
    assert second["approx_kl"] == 0


def test_lora_trains_the_adapters_alone_and_leaves_a_plain_model(make_run: Callable[..., LocalGRPOConfig]) -> None:
    run = make_run(lora_rank=2, learning_rate=1e-2)
    trainer = begin(run)
    before = copied(trainer.model)
    first_active_step(trainer)
    moved = changed(before, trainer.model)
    assert moved
    assert all("lora_" in name for name in moved)
    trainer._log({**trainer.train_step()})
    trainer.export()
    plain, info = transformers.AutoModelForCausalLM.from_pretrained(run.out / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(40)[None]
    with torch.no_grad():
        merged, adapted = plain(ids).logits, trainer.model.eval()(ids).logits
        with trainer.model.disable_adapter():
            assert (trainer.model(ids).logits - adapted).abs().max() > 1e-3
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=0)
    assert load_policy(str(run.out / "model"), trainer.driver.settings, layout="terse").name == "run"


def test_in_bfloat16_the_sampler_follows_float32_weights(make_run: Callable[..., LocalGRPOConfig]) -> None:
    run = make_run(dtype="bfloat16")
    trainer = begin(run)
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
    assert {weight.dtype for weight in trainer.sampled.parameters()} == {torch.bfloat16}
    before = copied(trainer.sampled)
    line = first_active_step(trainer)
    assert line["logprob_gap_max"] < 0.2
    assert changed(before, trainer.sampled)
    rounded = {name: weight.to(torch.bfloat16) for name, weight in copied(trainer.model).items()}
    assert not changed(rounded, trainer.sampled)
    # Rotary frequencies rounded to bfloat16 would turn late tokens by whole radians.
    for ours, theirs in zip(trainer.model.buffers(), trainer.sampled.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    trainer.save()
    assert not changed(copied(trainer.sampled), resumed(run).sampled)


# ---------------------------------------------------------------------------------------------------------------- failures


class Flaky:
    """The hashing embedder, which fails at the calls that `fails` names."""

    def __init__(self, fails: Callable[[int], bool], error: type[Exception] = EmbeddingError) -> None:
        self.real = get_embedder("hashing")
        self.name, self.dimension = "flaky", self.real.dimension
        self.fails, self.error = fails, error
        self.calls = self.failures = 0

    def embed(self, texts: Any, kind: Any) -> Any:
        self.calls += 1
        if self.fails(self.calls):
            self.failures += 1
            raise self.error("the server is gone")
        return self.real.embed(texts, kind)


def begin_with(embedder: Flaky, run: LocalGRPOConfig) -> Trainer:
    trainer = begin(run)
    trainer.driver = dataclasses.replace(trainer.driver, embedder=embedder)
    return trainer


def trained_on(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The samples that each later step makes, as they are filled in."""
    steps: list[list[Any]] = []
    real = trainer.update

    def update(made: Any) -> dict[str, float]:
        steps.append(list(made))
        return real(made)

    monkeypatch.setattr(trainer, "update", update)
    return steps


def test_a_failure_is_played_again_and_leaves_no_trace(make_run: Callable[..., LocalGRPOConfig]) -> None:
    embedder = Flaky(lambda call: call in (1, 4, 9))
    whole, repaired = begin(make_run("whole", in_flight=1)), begin_with(embedder, make_run("repaired", in_flight=1))
    assert repaired.play_groups() == whole.play_groups()
    assert embedder.failures == 3


def test_samples_made_are_samples_trained_with_failures_injected(
    make_run: Callable[..., LocalGRPOConfig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    draws = random.Random(1)
    embedder = Flaky(lambda call: draws.random() < 0.35)
    trainer = begin_with(embedder, make_run(groups=6, in_flight=3))
    played: list[list[list[Rollout | None]]] = []
    real = trainer.play_groups
    monkeypatch.setattr(trainer, "play_groups", lambda: played.append(real()) or played[-1])
    made = trained_on(trainer, monkeypatch)
    lines = [trainer.train_step() for _ in range(4)]
    assert embedder.failures > 0
    assert "the server is gone" in caplog.text
    assert sum(line["groups_failed"] for line in lines) > 0
    assert sum(line["groups_active"] for line in lines) > 0
    for line, groups, step in zip(lines, played, made, strict=True):
        complete = [number for number, group in enumerate(groups) if None not in group]
        active = [number for number in complete if len({rollout.reward for rollout in groups[number] if rollout}) > 1]
        assert line["groups_failed"] == 6 - len(complete)
        assert line["groups_active"] == len(active)
        assert line["groups_zero_variance"] == len(complete) - len(active)
        # Each turn of each rollout of an active group once, and nothing else.
        turns = [
            turn.reply.prompt_ids + turn.reply.completion_ids
            for number in active
            for rollout in groups[number]
            if rollout
            for turn in rollout.turns
        ]
        assert sorted(sample.token_ids for sample in step) == sorted(turns)
        assert line["samples"] == len(turns)
        rewards = [rollout.reward for group in groups for rollout in group if rollout]
        assert line["reward"] == pytest.approx(sum(rewards) / len(rewards))  # a lost rollout is no reward of 0


def test_a_batch_that_loses_a_sample_is_noticed(
    make_run: Callable[..., LocalGRPOConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = packing.pack_samples
    monkeypatch.setattr(packing, "pack_samples", lambda made, *args, **kwargs: real(made[1:], *args, **kwargs))
    trainer = begin(make_run())
    before = copied(trainer.model)
    with pytest.raises(SamplesMismatch, match="1 left out"):
        first_active_step(trainer)
    assert not changed(before, trainer.model)


def test_when_all_is_lost_the_run_says_so(make_run: Callable[..., LocalGRPOConfig]) -> None:
    run = make_run(steps=2, save_every=1)
    trainer = begin_with(Flaky(lambda call: True), run)
    before = copied(trainer.model)
    with pytest.raises(SettingError, match="Every group of step 1 lost a rollout 3 times over"):
        trainer.train()
    assert not changed(before, trainer.model)
    assert not (run.out / METRICS).exists()
    # As the message says.
    resumed(run).train()
    assert [line["step"] for line in metrics(run)] == [1, 2]


@pytest.mark.parametrize("error", [SettingError, PromptTooLong])
def test_what_playing_again_cannot_fix_is_raised_at_once(
    error: type[Exception], make_run: Callable[..., LocalGRPOConfig]
) -> None:
    embedder = Flaky(lambda call: call > 1, error)
    with pytest.raises(error, match="gone") as caught:
        begin_with(embedder, make_run()).train_step()
    assert embedder.failures == 1
    assert "in episode" in caught.value.__notes__[0]


def test_a_prompt_beyond_the_window_is_raised_at_once(make_run: Callable[..., LocalGRPOConfig]) -> None:
    with pytest.raises(PromptTooLong, match="1024"):
        begin(make_run(max_new_tokens=1000)).train_step()


def test_a_reward_or_gradient_that_is_not_finite_changes_nothing(
    make_run: Callable[..., LocalGRPOConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = begin(make_run())
    before = copied(trainer.model)
    real = trainer.play_groups

    def without_sense() -> list[list[Rollout | None]]:
        groups = real()
        broken = groups[1][2]
        assert broken is not None
        groups[1][2] = dataclasses.replace(broken, reward=float("nan"))
        return groups

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "play_groups", without_sense)
        with pytest.raises(DataError, match="rollout 2 of group 1"):
            trainer.train_step()
    with monkeypatch.context() as patched:
        patched.setattr("train.losses.token_mean", lambda values, total: values.sum() / total * float("inf"))
        with pytest.raises(DataError, match=r"gradient of step .* is not finite"):
            first_active_step(trainer)
    assert not changed(before, trainer.model)


# ---------------------------------------------------------------------------------------------------- killed and resumed

RESUMABLE = {"steps": 5, "eval_every": 2, "eval_episodes": 3, "save_every": 2, "set": (*TASKS, "unanswerable=0.7")}


class Killed(BaseException):
    """Not an Exception, as nothing may catch it."""


@pytest.fixture(scope="module")
def never_killed(undecided: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalGRPOConfig:
    """A finished run."""
    run = configured(undecided, tmp_path_factory.mktemp("never_killed"), **RESUMABLE)
    begin(run).train()
    lines = metrics(run)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if "eval_em" in line] == [0, 2, 4, 5]
    assert sum(line.get("samples", 0) > 0 for line in lines) >= 3
    return run


def same_ends(run: LocalGRPOConfig, other: LocalGRPOConfig) -> bool:
    """Whether two runs have logged, saved and exported the same, bit for bit."""
    assert metrics(run) == metrics(other)
    one, two = (checkpoints.load(each.out / CHECKPOINT) for each in (run, other))
    assert one["step"] == two["step"]
    assert one["best"]["step"] == two["best"]["step"]
    assert one["best"]["em"] == two["best"]["em"]
    for name, weight in one["weights"].items():
        assert torch.equal(weight, two["weights"][name]), name
        assert torch.equal(one["best"]["weights"][name], two["best"]["weights"][name]), name
    for number, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, two["optimizer"]["state"][number][name]), name
    exported = "model/model.safetensors"
    return (run.out / exported).read_bytes() == (other.out / exported).read_bytes()


def kill_at(patched: pytest.MonkeyPatch, target: str, call: int, *, after: bool) -> None:
    """Ends the run at the `call`th call of `target` ("module:name" or "module:Class.name"), instead of it or after it."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    holder: Any = importlib.import_module(module)
    for owner in owners:
        holder = getattr(holder, owner)
    real, calls = getattr(holder, name), itertools.count(1)

    def killing(*args: Any, **kwargs: Any) -> Any:
        last = next(calls) == call
        if last and not after:
            raise Killed
        result = real(*args, **kwargs)
        if last:
            raise Killed
        return result

    patched.setattr(holder, name, killing)


MOMENTS = {
    "before anything was played": ("train.grpo:Trainer.evaluate", 1, False),
    "before the first checkpoint": ("train.grpo:Trainer.train_step", 2, False),
    "while episodes are played": ("agents.rollout:_rollout", 24, True),
    "between gradient and update": ("train.grpo:check_all_trained", 3, True),
    "after a line that no checkpoint covers": ("train.grpo:Trainer._log", 4, True),
    "before a checkpoint is complete": ("os:fsync", 2, False),
    "while the model is written": ("train.grpo:write_card", 1, True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_is_never_killed(
    moment: str,
    make_run: Callable[..., LocalGRPOConfig],
    never_killed: LocalGRPOConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run(**RESUMABLE)
    target, call, after = MOMENTS[moment]
    with monkeypatch.context() as patched:
        kill_at(patched, target, call, after=after)
        with pytest.raises(Killed):
            begin(run).train()
    with (run.out / METRICS).open("a") as file:
        file.write('{"step": 4, "rewa')  # and it was killed while it wrote this
    torch.rand(7)  # what the next process drew before
    assert resumed(run).train()["step"] == 5
    assert same_ends(run, never_killed)
    assert not list(run.out.glob(".*"))


def test_a_process_killed_in_the_middle_of_a_step_is_resumed(
    make_run: Callable[..., LocalGRPOConfig], never_killed: LocalGRPOConfig, tmp_path: Path
) -> None:
    run = make_run(**RESUMABLE)
    (tmp_path / "run.json").write_text(json.dumps(dataclasses.asdict(run), default=str))
    program = """
        import json, os, pathlib, signal, sys
        from train import grpo
        options = json.loads(pathlib.Path(sys.argv[1]).read_text())
        options |= {"out": pathlib.Path(options["out"]), "set": tuple(options["set"])}
        trainer, real = grpo.Trainer(grpo.LocalGRPOConfig(**options)), grpo.check_all_trained
        def check(*args):
            real(*args)
            if trainer.step == 3:  # of which the gradient is computed, and nothing saved
                os.kill(os.getpid(), signal.SIGKILL)
        grpo.check_all_trained = check
        trainer.train()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "run.json")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert [line["step"] for line in metrics(run)] == [0, 1, 2, 3]
    time.sleep(1)  # TensorBoard puts files in order by the second in which they were begun
    resumed(run).train()
    assert same_ends(run, never_killed)
    shown = EventAccumulator(str(run.out / "tensorboard")).Reload()
    assert [event.step for event in shown.Scalars("reward")] == [1, 2, 3, 4, 5]
    assert [event.step for event in shown.Scalars("eval_em")] == [0, 2, 4, 5]


@pytest.mark.parametrize("changes", [{"lora_rank": 2}, {"dtype": "bfloat16", "kl_coef": 0.1, "in_flight": 2}])
def test_other_kinds_of_runs_resume_as_well(
    changes: dict[str, Any], make_run: Callable[..., LocalGRPOConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halved = (
        make_run(name, **RESUMABLE | {"steps": 3, "save_every": 1, "eval_every": 3} | changes)
        for name in ("one", "two")
    )
    begin(whole).train()
    with monkeypatch.context() as patched:
        kill_at(patched, "train.grpo:Trainer.train_step", 2, after=True)
        with pytest.raises(Killed):
            begin(halved).train()
    resumed(halved).train()
    assert same_ends(halved, whole)


def test_a_finished_run_is_extended_as_if_it_had_been_longer_from_the_start(
    make_run: Callable[..., LocalGRPOConfig], never_killed: LocalGRPOConfig
) -> None:
    run = make_run(**RESUMABLE | {"steps": 4})
    begin(run).train()
    longer = dataclasses.replace(run, steps=5)
    assert resumed(longer).train()["step"] == 5
    assert same_ends(longer, never_killed)
    assert json.loads((run.out / "config.json").read_text())["steps"] == 5
    with pytest.raises(SettingError, match="another configuration: steps was 5, is 4"):
        resumed(run)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_whose_learning_rate_depends_on_its_length_is_not_extended(
    schedule: str, make_run: Callable[..., LocalGRPOConfig]
) -> None:
    run = make_run(steps=1, save_every=1, schedule=schedule)
    begin(run)
    with pytest.raises(SettingError, match=rf"--schedule {schedule} .* resume it with --steps 1\. Only .* constant"):
        resumed(dataclasses.replace(run, steps=2))


# --------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "group_size must be at least 2"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"groups": 0}, "groups must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"data": Path("train.json"), "eval_every": 5}, "--eval-every 0"),
        ({"eval_every": 5, "split": "dev"}, "split and eval_split are both 'dev'"),
        ({"eval_every": 5, "eval_episodes": 0}, "eval_episodes must be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0"),
        ({"clip_low": 0.0}, "clip_low must be above 0"),
        ({"fault_penalty": -0.1}, "fault_penalty must be at least 0"),
        ({"kl_coef": -1.0}, "kl_coef must be at least 0"),
        ({"importance_cap": 0.5}, "importance_cap must be None or at least 1"),
    ],
)
def test_settings_that_cannot_work_are_rejected_before_anything_is_loaded(
    changes: dict[str, Any], message: str, make_run: Callable[..., LocalGRPOConfig]
) -> None:
    with pytest.raises(SettingError, match=message):
        begin(make_run(**changes | {"model": "none"}))


def test_a_model_without_chat_template_is_rejected(
    undecided: Path, tmp_path: Path, make_run: Callable[..., LocalGRPOConfig]
) -> None:
    folder = shutil.copytree(undecided, tmp_path / "base")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    with pytest.raises(SettingError, match="no chat template"):
        begin(make_run(model=str(folder)))


def test_a_tokenizer_without_pad_token_will_do(
    undecided: Path, tmp_path: Path, make_run: Callable[..., LocalGRPOConfig]
) -> None:
    folder = shutil.copytree(undecided, tmp_path / "no_pad")
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    trainer, usual = begin(make_run(model=str(folder))), begin(make_run("usual"))
    assert trainer.chat.backend.pad_token is None
    assert trainer.model.config.pad_token_id is None
    assert first_active_step(trainer)["logprob_gap_max"] <= 1e-4
    first_active_step(usual)
    assert not changed(copied(usual.model), trainer.model)


def test_a_dataset_without_questions_is_rejected(tmp_path: Path, make_run: Callable[..., LocalGRPOConfig]) -> None:
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(DataError, match=r"empty\.json|no tasks"):
        begin(make_run(env_id="AtomMem-HotpotQA", data=tmp_path / "empty.json", set=()))


def test_only_the_same_run_is_resumed_and_no_folder_overwritten(
    make_run: Callable[..., LocalGRPOConfig], undecided: Path, tmp_path: Path
) -> None:
    run = make_run(steps=1, save_every=1)
    with pytest.raises(SettingError, match="Nothing to resume"):
        resumed(run)
    begin(run).train()
    before = {path: path.read_bytes() for path in run.out.rglob("*") if path.is_file()}
    with pytest.raises(SettingError, match="new or empty"):
        begin(run)
    with pytest.raises(SettingError, match=r"another configuration: groups was 2, is 3; learning_rate was 0\.002"):
        resumed(dataclasses.replace(run, groups=3, learning_rate=1e-4))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SettingError, match="new or empty"):
        begin(make_run("file"))
    assert {path: path.read_bytes() for path in run.out.rglob("*") if path.is_file()} == before


def test_a_run_of_an_earlier_version_is_resumed(make_run: Callable[..., LocalGRPOConfig]) -> None:
    run = make_run(steps=1, save_every=1)
    begin(run).train()
    path = run.out / "config.json"
    later = ("recipe", "source", "reward", "dialect")  # fields that it did not have
    values = {name: value for name, value in json.loads(path.read_text()).items() if name not in later}
    path.write_text(json.dumps(values))
    (run.out / "model" / "atommem.json").unlink()
    line = metrics(run)[0]
    line["groups_live"], line["groups_flat"] = line.pop("groups_active"), line.pop("groups_zero_variance")
    (run.out / METRICS).write_text(json.dumps(line) + "\n")
    assert resumed(dataclasses.replace(run, recipe="tiny")).train() == line
    assert (run.out / "model" / "atommem.json").is_file()


def test_a_full_disk_at_a_checkpoint_leaves_the_one_before_and_the_run_is_resumed(
    make_run: Callable[..., LocalGRPOConfig], never_killed: LocalGRPOConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")  # a limit on a file's size fails as a full disk does, in the write
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = make_run(**RESUMABLE)
    trainer = begin(run)
    real = trainer.train_step

    def step() -> dict[str, Any]:
        if trainer.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, usual[1]))
        return real()

    monkeypatch.setattr(trainer, "train_step", step)
    try:
        with pytest.raises(CheckpointError, match=r"could not be written.*The one before is intact"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert checkpoints.load(run.out / CHECKPOINT)["step"] == 2
    assert not list(run.out.glob(".*"))
    resumed(run).train()
    assert same_ends(run, never_killed)


def test_metrics_that_cannot_be_written_end_the_run_with_a_word(make_run: Callable[..., LocalGRPOConfig]) -> None:
    trainer = begin(make_run())
    (trainer.run.out / METRICS).mkdir()
    with pytest.raises(CheckpointError, match="metrics of step 1 could not be written"):
        trainer.train()


def test_too_little_disk_is_noticed_before_the_first_step(
    make_run: Callable[..., LocalGRPOConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(SettingError, match=r"0\.0 GB are free"):
        begin(make_run())
