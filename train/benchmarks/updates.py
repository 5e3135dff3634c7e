"""How long the forward and backward pass of an update takes: right-padded, packed, and with shared prefixes.

    python -m train.benchmarks.updates
    python -m train.benchmarks.updates --model FOLDER --out updates.json

The four forms compute the same loss of the same samples, in turn, in one process; a ratio is the median over the rounds of
what the right-padded form took by what this one took in the same round. All compute the output layer at trained positions only.

    padded    samples in the order they came, padded on the right to the longest of their micro-batch
    sorted    the same, sorted by length first
    packed    `train.packing` without sharing: no padding
    shared    `train.packing` with the prefixes that the samples of a group share computed once

The shapes: `long` and `short` are one turn of one group of 16 of which 70 % is shared, `update` a whole GRPO update of a tiny
model. The default model is one: Qwen3 of 4 layers, width 128, random weights. Times depend on the machine; ratios less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from eval.benchmarks import write_figures
from train.losses import grpo_loss, token_logprobs
from train.packing import pack_samples, packed_logits, use_packed_attention
from train.samples import Sample, collate


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Samples of `groups` problems, `rollouts` of each, `turns` of each rollout; ranges are drawn from evenly, ends included."""

    name: str
    groups: int = 1
    rollouts: int = 16
    turns: int = 1
    shared: int  # tokens that a group's prompts of the same turn begin with alike
    own: tuple[int, int]  # tokens of a prompt after these
    reply: tuple[int, int]  # tokens of a completion
    max_tokens: int  # of a micro-batch


SHAPES = (
    Shape(name="long", shared=700, own=(220, 280), reply=(30, 70), max_tokens=32_768),
    Shape(name="short", shared=140, own=(35, 55), reply=(10, 20), max_tokens=32_768),
    *(
        Shape(name=f"update {size}", groups=8, turns=6, shared=60, own=(20, 60), reply=(10, 30), max_tokens=size * 1024)
        for size in (4, 8, 16)
    ),
)


def tiny_model() -> Any:
    """A Qwen3 of 0.9 million random weights in float32, the same ones every time."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=384,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config)


def draw_samples(shape: Shape, vocabulary: int) -> list[Sample]:
    """Samples of a shape with random tokens, in the order that `train.samples.make_samples` gives."""
    rng = np.random.default_rng(0)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(rng.integers(1, vocabulary, length).tolist())

    samples = []
    for group in range(shape.groups):
        shared = [draw(shape.shared) for _ in range(shape.turns)]
        for rollout in range(shape.rollouts):
            advantage = float(rng.normal())
            for turn in range(shape.turns):
                prompt = shared[turn] + draw(int(rng.integers(*shape.own, endpoint=True)))
                reply = draw(int(rng.integers(*shape.reply, endpoint=True)))
                completion = (len(prompt), len(prompt) + len(reply))
                samples.append(
                    Sample(prompt + reply, (completion,), (-1.0,) * len(reply), advantage, group, rollout, (turn,))
                )
    return samples


def padded_update(model: Any, samples: list[Sample], max_tokens: int) -> None:
    """The baseline: adds the gradient of the samples, in batches padded on the right with at most `max_tokens` positions."""
    total = sum(sample.trained_tokens for sample in samples)
    batches: list[list[Sample]] = [[]]
    for sample in samples:
        width = max(len(one.token_ids) for one in [*batches[-1], sample])
        if width * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
        batches[-1].append(sample)
    for members in batches:
        batch = collate([[sample] for sample in members])
        mask = torch.from_numpy(batch.loss_mask_B_T)
        output = model(
            input_ids=torch.from_numpy(batch.token_ids_B_T).to(model.device),
            attention_mask=torch.from_numpy(batch.attention_mask_B_T).to(model.device),
            logits_to_keep=mask.to(model.device),
            use_cache=False,
        )
        arrays = (batch.targets_B_T, batch.logprobs_B_T, batch.advantages_B_T)
        _backward(output.logits, *(torch.from_numpy(array)[mask] for array in arrays), total=total)


def packed_update(model: Any, samples: list[Sample], max_tokens: int, *, share_prefixes: bool) -> None:
    """Adds the gradient of the samples, packed."""
    total = sum(sample.trained_tokens for sample in samples)
    for batch in pack_samples(samples, max_tokens, share_prefixes=share_prefixes):
        arrays = (batch.targets_N, batch.logprobs_N, batch.advantages_N)
        _backward(packed_logits(model, batch), *(torch.from_numpy(array) for array in arrays), total=total)


def _backward(logits_N_V: Tensor, targets_N: Tensor, sampler_N: Tensor, advantages_N: Tensor, *, total: int) -> None:
    targets_N, sampler_N, advantages_N = (array.to(logits_N_V.device) for array in (targets_N, sampler_N, advantages_N))
    logp_N = token_logprobs(logits_N_V, targets_N)
    grpo_loss(logp_N, logp_N.detach(), sampler_N, advantages_N, total_tokens=total)[0].backward()


def measure(model: Any, shape: Shape, rounds: int) -> dict[str, Any]:
    """Seconds, ratios to the right-padded form, and the largest relative difference from its gradient, for each form."""
    use_packed_attention(model)
    samples = draw_samples(shape, model.config.vocab_size)
    by_length = sorted(samples, key=lambda sample: len(sample.token_ids))
    forms: dict[str, Callable[[], None]] = {
        "padded": lambda: padded_update(model, samples, shape.max_tokens),
        "sorted": lambda: padded_update(model, by_length, shape.max_tokens),
        "packed": lambda: packed_update(model, samples, shape.max_tokens, share_prefixes=False),
        "shared": lambda: packed_update(model, samples, shape.max_tokens, share_prefixes=True),
    }
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    gradients: dict[str, Tensor] = {}
    for number in range(rounds + 1):
        for form, update in forms.items():
            model.zero_grad()
            _wait(model)
            start = time.perf_counter()
            update()
            _wait(model)
            if number:  # the first is to warm up, and for the gradients
                seconds[form].append(time.perf_counter() - start)
            else:
                gradients[form] = torch.cat([weight.grad.flatten() for weight in model.parameters()]).float().cpu()
    batches = pack_samples(samples, shape.max_tokens)
    largest = gradients["padded"].abs().max()
    return {
        **asdict(shape),
        "samples": len(samples),
        "sample_tokens": sum(batch.sample_tokens for batch in batches),
        "shared_tokens_computed": sum(batch.tokens for batch in batches),
        "seconds": {form: statistics.median(times) for form, times in seconds.items()},
        "ratio": {
            form: statistics.median(np.divide(seconds["padded"], times).tolist()) for form, times in seconds.items()
        },
        "gradient_difference": {
            form: float((gradient - gradients["padded"]).abs().max() / largest) for form, gradient in gradients.items()
        },
    }


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def main(
    *, model: Path | None = None, rounds: int = 5, shapes: tuple[str, ...] = ("long", "short"), out: Path | None = None
) -> None:
    """Print how long updates take.

    Args:
        model: Folder of a Hugging Face model, computed with in bfloat16; the tiny one with random weights where it is left out.
        rounds: How often each form is measured.
        shapes: Which of long, short, update 4, update 8, update 16 (the number: tokens of a micro-batch in thousands).
        out: File for the numbers, as JSON.
    """
    if model is None:
        computed, name = tiny_model(), "tiny"
    else:
        computed = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, local_files_only=True)
        name = model.name
    computed = computed.to("cuda" if torch.cuda.is_available() else "cpu")
    results = [measure(computed, shape, rounds) for shape in SHAPES if shape.name in shapes]
    table = Table(title=f"Forward and backward of one update, {name} on {computed.device.type}")
    for heading in ("shape", "form", "seconds", "times as fast", "gradient differs"):
        table.add_column(heading, justify="left" if heading in ("shape", "form") else "right")
    for result in results:
        for form, seconds in result["seconds"].items():
            ratio, difference = result["ratio"][form], result["gradient_difference"][form]
            table.add_row(result["name"], form, f"{seconds:.3f}", f"{ratio:.2f}", f"{difference:.1e}")
        table.add_section()
    Console().print(table)
    machine = {"model": name, "device": computed.device.type, "threads": torch.get_num_threads()}
    write_figures(out, {**machine, "rounds": rounds, "shapes": results})


if __name__ == "__main__":
    tyro.cli(main)
