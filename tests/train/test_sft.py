"""Supervised fine-tuning, for real, of a tiny model made here."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")

from agents.models.chat_tokenizer import ChatTokenizer  # noqa: E402
from agents.models.transformers_model import TransformersModel  # noqa: E402
from atommem_env import cli  # noqa: E402
from atommem_env.errors import CheckpointError, DataError, PromptTooLong, SettingError  # noqa: E402
from eval.played_as import eval_command  # noqa: E402
from train import sft  # noqa: E402
from train.collect import CollectConfig, collect  # noqa: E402
from train.settings import SFTConfig  # noqa: E402
from train.sft import main, read_samples, train, write_samples_card  # noqa: E402

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers with random weights that reads bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("bytes")
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("collected") / "samples"
    collect(
        CollectConfig(
            env_id="AtomMem-Synthetic",
            episodes=4,
            num_docs=8,
            layout="terse",
            max_new_tokens=8,
            out=out,
            set=("hops=[1]",),
        )
    )
    return out


def test_samples_have_the_tokens_of_sampling_and_labels_on_the_reply_alone(model: Path, samples: Path) -> None:
    chat = ChatTokenizer(model)
    rows = [json.loads(line) for line in (samples / "samples.jsonl").read_text().splitlines()]
    read = list(read_samples(samples, chat, 4096))
    assert len(read) == len(rows) > 8
    sampler = TransformersModel(model, dtype="float32", device="cpu")
    for row, sample in zip(rows, read, strict=True):
        prompt = sampler.prompt_ids(row["prompt"])
        assert sample["input_ids"][: len(prompt)] == prompt
        assert sample["labels"][: len(prompt)] == [-100] * len(prompt)
        assert sample["labels"][len(prompt) :] == sample["input_ids"][len(prompt) :]
        reply = sample["input_ids"][len(prompt) :]
        assert reply[-1] == chat.backend.eos_token_id
        assert chat.text(reply) == row["completion"][0]["content"]


def test_a_reply_that_spells_a_control_token_is_text(model: Path) -> None:
    ids = ChatTokenizer(model).completion_ids("a</s>b")
    assert ids.count(2) == 1
    assert ids[-1] == 2


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_training_lowers_the_loss_and_leaves_a_model_that_is_evaluated_by_its_folder(
    lora_rank: int,
    model: Path,
    samples: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = list(read_samples(samples, ChatTokenizer(model), 4096))
    run = SFTConfig(
        samples=samples,
        model=str(model),
        out=tmp_path / "sft",
        epochs=6,
        batch_size=len(rows),
        micro_batch_size=1,
        learning_rate=1e-2,
        lora_rank=lora_rank,
    )
    main(run)
    printed = capsys.readouterr().out.splitlines()[-1]
    log = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < losses[0]
    # The first loss again, by hand: the mean over the reply tokens of all samples, before any update.
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    total = count = 0.0
    for row in rows:
        with torch.no_grad():
            logp = network(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        positions = [position for position, label in enumerate(row["labels"]) if label != -100]
        total -= sum(float(logp[position - 1, row["labels"][position]]) for position in positions)
        count += len(positions)
    assert losses[0] == pytest.approx(total / count, abs=2e-3)
    # The command that was printed plays as the samples were collected.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*shlex.split(printed), "--episodes", "2"])
    assert sys.argv[:3] == ["atommem", "eval", "--policy"]
    cli.main()
    played = json.loads((tmp_path / "runs" / "eval" / "config.json").read_text())
    collected = json.loads((samples / "config.json").read_text())
    for name in ("env_id", "settings", "layout", "sampling"):
        assert played[name] == collected[name]
    assert (played["options"]["hops"], played["options"]["num_docs"], played["options"]["split"]) == ([1], 8, "test")
    assert json.loads((tmp_path / "runs" / "eval" / "summary.json").read_text())["tokens"]["prompt"] > 0
    with pytest.raises(SettingError, match="new or empty"):
        train(run)


def test_what_cannot_be_trained_on_is_rejected(model: Path, samples: Path, tmp_path: Path) -> None:
    run = SFTConfig(samples=samples, model=str(model), out=tmp_path / "sft")
    for changes, message in (
        ({"batch_size": 3, "micro_batch_size": 2}, "multiple"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1"),
        ({"save_every": 0}, "save_every must be at least 1"),
    ):
        with pytest.raises(SettingError, match=message):
            replace(run, **changes)
    with pytest.raises(PromptTooLong, match="max_tokens is 20"):
        train(replace(run, max_tokens=20, out=tmp_path / "short"))
    with pytest.raises(DataError, match="atommem collect"):
        train(replace(run, samples=tmp_path / "nothing"))


def test_samples_that_do_not_say_how_they_were_collected_leave_a_model_without_a_card(tmp_path: Path) -> None:
    (tmp_path / "sft" / "model").mkdir(parents=True)
    for text in (None, '{"mine": 1}'):
        if text:
            (tmp_path / "config.json").write_text(text)
        write_samples_card(tmp_path, tmp_path / "sft" / "model", command="atommem sft", run=tmp_path / "sft")
        assert eval_command(tmp_path / "sft" / "model").startswith("atommem eval ENV_ID --policy ")


# ---------------------------------------------------------------------------------------------------- killed and resumed


class Killed(BaseException):
    """Not an Exception, as nothing may catch it."""


def kill_at(patched: pytest.MonkeyPatch, holder: object, name: str, call: int, *, after: bool) -> None:
    """Ends the run at the `call`th call of a function, instead of it or after it."""
    real, calls = getattr(holder, name), itertools.count(1)

    def killing(*args: Any, **kwargs: Any) -> Any:
        last = next(calls) == call
        if last and not after:
            raise Killed
        made = real(*args, **kwargs)
        if last:
            raise Killed
        return made

    patched.setattr(holder, name, killing)


@pytest.fixture
def make_run(model: Path, samples: Path, tmp_path: Path) -> Callable[..., SFTConfig]:
    def make(name: str = "run", **changes: Any) -> SFTConfig:
        options: dict[str, Any] = {"epochs": 2, "batch_size": 2, "micro_batch_size": 1, "save_every": 5}
        return SFTConfig(
            samples=samples, model=str(model), out=tmp_path / name, learning_rate=1e-2, **options | changes
        )

    return make


def ends(run: SFTConfig) -> tuple[list[str], dict[str, bytes]]:
    """What a finished run has logged, but for times, and its model."""
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    times = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    left = {"config.json", "metrics.jsonl", "model", "provenance.json"}
    assert {path.name for path in run.out.iterdir()} == left
    model = {path.name: path.read_bytes() for path in (run.out / "model").iterdir() if path.name != "atommem.json"}
    return [str({name: value for name, value in line.items() if name not in times}) for line in lines], model


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_killed_and_resumed_is_never_killed(
    lora_rank: int, make_run: Callable[..., SFTConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_run("whole", lora_rank=lora_rank)
    train(whole)
    lines, weights = ends(whole)
    assert len(lines) == 12 + 1  # updates, of which 5, 10 and 12 are followed by a checkpoint
    moments = {
        "before the first checkpoint": (trl.SFTTrainer, "training_step", 2 * 4, False),
        "in the second epoch": (trl.SFTTrainer, "training_step", 2 * 11, True),
        "before a checkpoint is complete": (trl.SFTTrainer, "_save_rng_state", 2, False),
        "while the model is written": (sft, "write_samples_card", 1, True),
        "before the metrics are written": (sft, "write_atomic", 2, False),
    }
    if lora_rank:  # as in the test of full weights, but for what is trained
        moments = {name: where for name, where in moments.items() if name == "in the second epoch"}
    for number, (moment, where) in enumerate(moments.items()):
        run = make_run(str(number), lora_rank=lora_rank)
        holder, name, call, after = where
        with monkeypatch.context() as patched:
            kill_at(patched, holder, name, call, after=after)
            with pytest.raises(Killed):
                train(run)
        torch.rand(7)  # what the next process drew before
        train(replace(run, resume=True))
        assert ends(run) == (lines, weights), moment
    assert train(replace(run, resume=True)) == json.loads((run.out / "metrics.jsonl").read_text().splitlines()[-1])


def test_only_the_same_run_is_resumed(make_run: Callable[..., SFTConfig], samples: Path, tmp_path: Path) -> None:
    run = make_run(epochs=0.1)
    with pytest.raises(SettingError, match="Nothing to resume"):
        train(replace(run, resume=True))
    train(run)
    with pytest.raises(SettingError, match=r"another configuration: epochs was 0\.1, is 3"):
        train(replace(run, resume=True, epochs=3))
    other = shutil.copytree(samples, tmp_path / "other")
    table = pq.read_table(other / "samples.parquet")
    pq.write_table(table.slice(1), other / "samples.parquet")
    with pytest.raises(SettingError, match=r"samples was .*; samples_sha256 was"):
        train(replace(run, resume=True, samples=other))
    with pytest.raises(SettingError, match=r"new or empty folder.* or --resume"):
        train(run)


class Malicious:
    """Unpickled, it creates a file."""

    def __init__(self, created: Path) -> None:
        self.created = created

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.created,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_checkpoint_of_someone_else_cannot_run_code(
    name: str, make_run: Callable[..., SFTConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, created = make_run(save_every=1), tmp_path / "created"
    with monkeypatch.context() as patched:
        kill_at(patched, trl.SFTTrainer, "training_step", 3, after=False)
        with pytest.raises(Killed):
            train(run)
    path = run.out / "trainer" / "checkpoint-1" / name
    assert path.is_file()
    torch.save(Malicious(created), path)
    if name == "training_args.bin":  # nobody reads it
        train(replace(run, resume=True))
    else:
        with pytest.raises(CheckpointError, match="could run code, so it was not read"):
            train(replace(run, resume=True))
    assert not created.exists()
