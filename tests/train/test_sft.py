"""Supervised fine-tuning, for real, of a tiny model made here."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

from agents.models.chat_tokenizer import ChatTokenizer  # noqa: E402
from agents.models.transformers_model import TransformersModel  # noqa: E402
from atommem_env import cli  # noqa: E402
from atommem_env.errors import DataError, PromptTooLong, SettingError  # noqa: E402
from eval.played_as import eval_command  # noqa: E402
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
    with pytest.raises(SettingError, match="multiple"):
        train(replace(run, batch_size=3, micro_batch_size=2))
    with pytest.raises(PromptTooLong, match="max_tokens is 20"):
        train(replace(run, max_tokens=20))
    with pytest.raises(DataError, match="atommem collect"):
        train(replace(run, samples=tmp_path / "nothing"))


def test_samples_that_do_not_say_how_they_were_collected_leave_a_model_without_a_card(tmp_path: Path) -> None:
    (tmp_path / "sft" / "model").mkdir(parents=True)
    for text in (None, '{"mine": 1}'):
        if text:
            (tmp_path / "config.json").write_text(text)
        write_samples_card(tmp_path, tmp_path / "sft", command="atommem sft")
        assert eval_command(tmp_path / "sft" / "model").startswith("atommem eval ENV_ID --policy ")
