"""The sum of memory: by hand in a small case, exact where it is exact, and what it says when it is too large."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from atommem_env.errors import ModelNotFound, SettingError  # noqa: E402
from train import estimate as estimate_module  # noqa: E402
from train import shapes  # noqa: E402
from train.cluster.preflight import make_plan  # noqa: E402
from train.cluster.recipe import ClusterGRPOConfig  # noqa: E402
from train.cluster.recipe import read_recipe as read_cluster_recipe  # noqa: E402
from train.collect import SCHEMA  # noqa: E402
from train.estimate import (  # noqa: E402
    check_fits,
    check_memory,
    estimate,
    estimate_table,
    gpu_memory_needed,
    memory_needed,
)
from train.grpo import Trainer  # noqa: E402
from train.recipes import load_recipe, read_recipe  # noqa: E402
from train.settings import LocalGRPOConfig, SFTConfig  # noqa: E402
from train.sft import train  # noqa: E402
from train.shapes import ModelSize, TaskShape  # noqa: E402

GB = 10**9
SIZE = ModelSize(
    parameters=1000, linear_width=50, layers=2, hidden=8, intermediate=16, heads=2, kv_heads=1, head_dim=4,
    normalised_heads=False, vocabulary=10, window=500,
)  # fmt: skip
RUN = LocalGRPOConfig(
    env_id="AtomMem-Synthetic", num_docs=8, set=("chunk_tokens=64", "top_k=3"), max_new_tokens=16,
    groups=2, group_size=4, in_flight=100, eval_every=0, micro_batch_tokens=100,
)  # fmt: skip


def sizes(run: SFTConfig | LocalGRPOConfig, phase: str, size: ModelSize = SIZE, *, gpu: bool = False) -> dict[str, int]:
    return {item.what: item.size for item in memory_needed(run, size, gpu=gpu)[phase]}


def size_of(recipe: str) -> ModelSize:
    return ModelSize.of(transformers.AutoConfig.for_model(**read_recipe(recipe).model))


def test_a_small_case_by_hand() -> None:
    # A prompt has 64 tokens of text and 3 entries of 16; 8 rollouts play at once, and no more.
    assert sizes(RUN, "plays") == {
        "weights": 4000,
        "Adam's moments": 8000,
        "keys and values": 8 * (64 + 48 + 16) * 2 * (2 * 4) * 4 * 2,
        "next tokens' probabilities": 8 * 10 * 28,
    }
    # A group's turn is 64 + 4 × (48 + 16) = 320 tokens, of which 4 × 16 are replies: 20 of 100.
    assert sizes(RUN, "updates") == {
        "weights": 4000,
        "gradients": 4000,
        "Adam's moments": 8000,
        "activations": 100 * 2 * 4 * (6 * 8 + 5 * 8 + 4 * 16),
        "logits of the replies": 20 * 10 * 4 * 4,
    }


def test_every_setting_acts_where_it_should() -> None:
    plain = sizes(RUN, "updates")
    mixed = sizes(replace(RUN, dtype="bfloat16"), "updates")
    assert mixed["weights"] == 4000  # trained ones stay float32
    assert mixed["copy that plays"] == mixed["weights in bfloat16"] == 2000
    assert mixed["activations"] < plain["activations"]
    adapters = sizes(replace(RUN, dtype="bfloat16", lora_rank=3), "updates")
    assert (adapters["weights"], adapters["adapters"], adapters["gradients"]) == (2000, 600, 600)
    assert adapters["Adam's moments"] == 1200
    assert "copy that plays" not in adapters
    assert sizes(replace(RUN, kl_coef=0.1), "plays")["starting model"] == 4000
    assert "starting model" not in sizes(replace(RUN, kl_coef=0.1, lora_rank=3), "plays")  # adapters are switched off
    judged = replace(RUN, eval_every=1)
    assert sizes(judged, "plays")["best weights so far"] == 4000
    assert "best weights so far" not in sizes(judged, "plays", gpu=True)
    recomputed = sizes(replace(RUN, gradient_checkpointing=True), "updates", replace(SIZE, layers=20))
    assert 5 * recomputed["activations, recomputed"] < sizes(RUN, "updates", replace(SIZE, layers=20))["activations"]
    few = replace(RUN, in_flight=4)
    assert 2 * sizes(few, "plays")["keys and values"] == sizes(RUN, "plays")["keys and values"]
    narrow = replace(SIZE, window=64)  # half of 64 + 48 + 16
    assert 2 * sizes(RUN, "plays", narrow)["keys and values"] == sizes(RUN, "plays")["keys and values"]
    # A step of 2 groups × 5 turns × 320 tokens does not fill a larger micro-batch.
    full = sizes(replace(RUN, micro_batch_tokens=10**6), "updates")["activations"]
    assert full == plain["activations"] // 100 * (2 * 4 * 320)


def test_samples_are_counted_by_their_characters(tmp_path: Path) -> None:
    row = {"env_id": "", "task_id": "", "episode": 0, "turn": 0, "reward": 1.0}
    chats = [(["a" * 100, "é" * 300], "b" * 100), (["a" * 10], "b")]
    rows = [
        {
            **row,
            "prompt": [{"role": "user", "content": text} for text in prompt],
            "completion": [{"role": "assistant", "content": reply}],
        }
        for prompt, reply in chats
    ]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / "samples.parquet")
    run = SFTConfig(samples=tmp_path, batch_size=15, micro_batch_size=3)
    assert sizes(run, "trains") == {
        "weights": 4000,
        "gradients": 4000,
        "Adam's moments": 8000,
        "activations": 3 * (500 // 5) * 2 * 4 * (6 * 8 + 5 * 8 + 4 * 16),
    }
    assert sizes(replace(run, max_tokens=50), "trains")["activations"] == sizes(run, "trains")["activations"] // 2
    assert "activations, recomputed" in sizes(run, "trains", gpu=True)
    assert sizes(replace(run, samples=tmp_path / "none"), "trains")["activations"] == 0


def test_parameters_are_those_of_the_published_models() -> None:
    assert size_of("qwen3-0.6b").parameters == 596_049_920
    assert size_of("qwen3-8b-lora").parameters == 8_190_735_360


@pytest.mark.parametrize("rank", [1, 8])
def test_adapters_are_counted_as_peft_makes_them(rank: int) -> None:
    peft = pytest.importorskip("peft")
    config = transformers.Qwen3Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    size = ModelSize.of(config)
    model = transformers.Qwen3ForCausalLM(config)
    assert size.parameters == sum(weight.numel() for weight in model.parameters())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear"))
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert sizes(replace(RUN, lora_rank=rank), "plays", size)["adapters"] == 4 * trained


def test_activations_are_near_what_autograd_keeps() -> None:
    import torch

    config = transformers.Qwen3Config(
        vocab_size=50, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = model(torch.zeros(1, 512, dtype=torch.long), logits_to_keep=1)
    assert output.logits.requires_grad
    real = sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in weights)
    run = replace(RUN, micro_batch_tokens=512)
    estimate = sizes(run, "updates", ModelSize.of(config))["activations"]
    assert 0.8 * real <= estimate <= 1.1 * real


def test_the_rejection_has_the_sum_and_what_would_help() -> None:
    size = size_of("qwen3-8b-lora")
    run = load_recipe("qwen3-8b-lora", LocalGRPOConfig)
    with pytest.raises(SettingError) as rejected:
        check_fits(run, size, 24 * GB, gpu=True)
    message = str(rejected.value)
    assert "Qwen/Qwen3-8B needs about" in message
    assert "24.0 GB are free on the GPU" in message
    assert "16.4 GB  8,190,735,360 parameters × 2 bytes" in message
    assert "--in-flight than 24" in message
    phase = max(memory_needed(run, size, gpu=True).values(), key=lambda items: sum(item.size for item in items))
    assert f"{sum(item.size for item in phase) / GB:.1f} GB\n" in message
    assert all(item.what in message and item.how in message for item in phase)
    check_fits(run, size, 80 * GB, gpu=True)
    with pytest.raises(SettingError, match="no GPU") as rejected:
        check_fits(replace(run, in_flight=1, lora_rank=0, dtype="float32"), size, 24 * GB, gpu=False)
    assert all(remedy in str(rejected.value) for remedy in ("--lora-rank", "--dtype bfloat16", "--micro-batch-tokens"))
    assert "--gradient-checkpointing" not in str(rejected.value)  # it is on


@pytest.mark.parametrize(("recipe", "memory"), [("qwen3-0.6b", 24), ("qwen3-8b-lora", 80)])
def test_recipes_fit_where_they_say(recipe: str, memory: int) -> None:
    for made in (SFTConfig, LocalGRPOConfig):
        check_fits(load_recipe(recipe, made), size_of(recipe), int(0.95 * memory * GB), gpu=True)


def test_whoever_trains_is_asked_first(undecided: Path, tmp_path: Path) -> None:
    run = replace(RUN, model=str(undecided), out=tmp_path / "run")
    check_memory(run)  # a tiny model fits anywhere
    huge = transformers.AutoConfig.from_pretrained(undecided)
    huge.hidden_size, huge.intermediate_size = 2**20, 2**21
    huge.save_pretrained(tmp_path / "huge")  # no weights, no tokenizer: nothing else can be said of it
    for rejected in (
        lambda: Trainer(replace(run, model=str(tmp_path / "huge"))),
        lambda: train(SFTConfig(samples=tmp_path, model=str(tmp_path / "huge"), out=tmp_path / "run")),
    ):
        with pytest.raises(SettingError, match=r"huge needs about [\d.]+ GB"):
            rejected()
    assert not (tmp_path / "run").exists()
    with pytest.raises(ModelNotFound):
        check_memory(replace(run, model=str(tmp_path / "nowhere")))


def test_a_check_derives_size_and_turns_once(undecided: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spies = [Mock(wraps=estimate_module.model_size), Mock(wraps=shapes.environment_of)]
    monkeypatch.setattr(estimate_module, "model_size", spies[0])
    monkeypatch.setattr(shapes, "environment_of", spies[1])
    check_memory(replace(RUN, model=str(undecided)))
    assert [spy.call_count for spy in spies] == [1, 1]


# ------------------------------------------------------------------------------------------------------------- on a cluster

CLUSTER_SIZE = replace(SIZE, heads=12, kv_heads=4, window=20_000)
CLUSTER_RUN = ClusterGRPOConfig(env_id="AtomMem-HotpotQA", model="nowhere/small", max_new_tokens=512)


def test_memory_of_a_small_case_by_hand() -> None:
    def sizes(**changes: Any) -> dict[str, dict[str, int]]:
        run = replace(CLUSTER_RUN, micro_batch_tokens=100, gpu_memory_utilization=0.5, **changes)
        return {
            name: {item.what: item.size for item in items}
            for name, items in gpu_memory_needed(run, CLUSTER_SIZE, 80).items()
        }

    layer = 4 * 6 * 8 + 2 * (5 * 12 * 4 + 4 * 16)  # norms in float32; five of the queries' size, four of the MLP's
    assert sizes() == {
        "samples": {"engine": 40, "weights": 250},
        "updates": {
            "weights": 250,
            "gradients": 250,
            "float32 weights, moments": 1500,
            "weights gathered": 2000,
            "activations, recomputed": 100 * (2 * 8 * 2 + layer),
            "logits": 100 * 10 * 10,
        },
    }
    apart = sizes(colocate=False, engines=4, kl_coef=0.1, offload_optimizer=True, gradient_checkpointing=False)
    assert apart["samples"] == {"engine": 40}
    assert apart["updates"]["weights"] == apart["updates"]["starting model"] == 500  # four GPUs train
    assert "float32 weights, moments" not in apart["updates"]
    assert apart["updates"]["activations"] == 100 * 2 * layer
    whole = sizes(zero_stage=2, embedding_model="a", embedding_gpu_memory=0.1)
    assert (whole["updates"]["weights"], whole["updates"]["gradients"]) == (2000, 250)
    assert "weights gathered" not in whole["updates"]
    assert whole["samples"]["embedding service"] == whole["updates"]["embedding service"] == 8


def test_an_estimate_by_hand() -> None:
    size = replace(CLUSTER_SIZE, parameters=10**9)
    run = replace(CLUSTER_RUN, num_docs=100, set=("chunk_tokens=2800", "top_k=2"), groups=4, group_size=8)
    rows = {row.what: row for row in estimate(run, size, TaskShape.of(run), 80 * GB)}
    # 100 documents of 112 tokens are 4 chunks; own: 2 entries, query and scratchpad of 64 each.
    assert rows["tokens a rollout"].how.startswith("4 chunks × 3,640 + 5 turns × (")
    assert "+ 256 of memory + 64 of reply)" in rows["tokens a rollout"].how
    head = int(rows["tokens a rollout"].how.split("turns × (")[1].split(" ")[0])
    tokens = 4 * 3640 + 5 * (head + 256 + 64)
    assert rows["tokens trained a step"].how == f"4 groups × 8 rollouts × {tokens:,}"
    assert rows["KV cache a rollout"].how.startswith(f"{3640 + head + 256 + 64:,} tokens × {2 * 2 * 4 * 4 * 2} bytes")
    seconds = 10 * 10**9 * 32 * tokens / (8 * 0.35 * 989e12)
    assert float(rows["seconds of training"].figure) == pytest.approx(seconds, abs=0.5)
    fewer = {
        row.what: row for row in estimate(replace(run, gradient_checkpointing=False), size, TaskShape.of(run), 80 * GB)
    }
    assert fewer["seconds of training"].how.startswith("8 FLOPs")


def test_more_gpus_are_faster_and_async_hides_the_sampling() -> None:
    run, size = read_cluster_recipe("qwen3-8b-hotpotqa"), size_of("qwen3-8b-lora")

    def seconds(run: ClusterGRPOConfig) -> dict[str, float]:
        rows = estimate(run, size, TaskShape.of(run), 80 * GB)
        return {row.what: float(row.figure) for row in rows if row.what.startswith("seconds")}

    one, two = seconds(run), seconds(replace(run, nodes=2, engines=16))
    assert all(two[what] < one[what] for what in one)
    apart = seconds(replace(run, colocate=False, asynchronous=True, engines=2))
    assert apart["seconds a step"] == max(apart["seconds of sampling"], apart["seconds of training"])


def test_the_table_shows_every_row_or_says_why_it_cannot() -> None:
    def shown(run: ClusterGRPOConfig, gpu_memory: int | None = None) -> str:
        plan, file = make_plan(run), StringIO()
        Console(width=200, file=file).print(estimate_table(run, plan.size, plan.task, gpu_memory))
        return file.getvalue()

    run = read_cluster_recipe("qwen3-8b-hotpotqa")
    rows = estimate(run, size_of("qwen3-8b-lora"), TaskShape.of(run), 80 * GB)
    assert all(row.what in shown(run) and row.figure in shown(run) for row in rows)
    assert "of 141;" in shown(run, 141 * GB)
    assert "hf download nowhere/small" in shown(CLUSTER_RUN)
