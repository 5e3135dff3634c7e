"""Packed logits, and their gradients, are those of a right-padded batch; packing keeps every sample once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from atommem_env.errors import SettingError
from train.losses import token_logprobs
from train.packing import PackedBatch, pack_samples, packed_logits, use_packed_attention
from train.samples import Sample, check_all_trained, collate

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True, initializer_range=0.2))


def qwen3() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=False, initializer_range=0.2))


def with_lora() -> Any:
    """A Llama with adapters in every linear layer; B is not zero, as after some updates."""
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    return model


def with_checkpointing() -> Qwen3ForCausalLM:
    model = qwen3().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def draw_samples(groups: int = 2, rollouts: int = 5, seed: int = 0) -> list[Sample]:
    """Two turns a rollout, the second with a sample of two replies; a group's turn begins with 20 to 29 shared tokens."""
    rng = np.random.default_rng(seed)

    def draw(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(1, 40, rng.integers(low, high)).tolist())

    samples = []
    for group in range(groups):
        beginnings = [draw(20, 30) for _ in range(2)]
        for rollout in range(rollouts):
            for turn, beginning in enumerate(beginnings):
                ids, trained = beginning, []
                for _ in range(1 + turn):
                    ids += draw(1, 12)
                    trained.append((len(ids), len(ids) + int(rng.integers(1, 6))))
                    ids += draw(trained[-1][1] - trained[-1][0], trained[-1][1] - trained[-1][0] + 1)
                logprobs = tuple(rng.normal(size=sum(last - first for first, last in trained)).tolist())
                turns = (0,) if turn == 0 else (1, 2)
                samples.append(Sample(ids, tuple(trained), logprobs, float(rng.normal()), group, rollout, turns))
    return samples


def padded(model: Any, samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """[N, V] logits and [N] their targets, of the samples in this order."""
    batch = collate([[sample] for sample in samples])
    mask = torch.from_numpy(batch.loss_mask_B_T)
    output = model(
        input_ids=torch.from_numpy(batch.token_ids_B_T), attention_mask=torch.from_numpy(batch.attention_mask_B_T)
    )
    return output.logits[mask], torch.from_numpy(batch.targets_B_T)[mask]


def gradients(model: Any, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    token_logprobs(logits, targets).square().sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def in_order(batches: list[PackedBatch], samples: list[Sample]) -> list[Sample]:
    """The samples in the order of the micro-batches."""
    named = {sample.key: sample for sample in samples}
    return [named[key] for batch in batches for key in batch.keys]


@pytest.mark.parametrize("share_prefixes", [False, True], ids=["packed", "shared"])
@pytest.mark.parametrize("make", [llama, qwen3, with_lora, with_checkpointing])
def test_logits_and_gradients_are_those_of_a_padded_batch(make: Any, share_prefixes: bool) -> None:
    model, samples = make(), draw_samples()
    batches = pack_samples(samples, 230, share_prefixes=share_prefixes)
    assert len(batches) > 1
    assert (
        sum(batch.tokens for batch in batches) < 0.8 * sum(batch.sample_tokens for batch in batches)
    ) == share_prefixes
    expected, targets = padded(model, in_order(batches, samples))  # before the attention is exchanged
    wanted = gradients(model, expected, targets)

    use_packed_attention(model)
    logits = torch.cat([packed_logits(model, batch) for batch in batches])
    assert float((logits - expected).detach().abs().max()) <= 1e-5
    assert torch.equal(torch.from_numpy(np.concatenate([batch.targets_N for batch in batches])), targets)
    got = gradients(model, logits, targets)
    assert got.keys() == wanted.keys()
    assert all(float((got[name] - wanted[name]).norm()) <= 1e-4 * float(wanted[name].norm()) for name in wanted)


def test_what_one_sample_says_does_not_reach_another() -> None:
    model, samples = qwen3(), draw_samples(groups=1)
    use_packed_attention(model)
    batch = pack_samples(samples, 1000)[0]
    logits = packed_logits(model, batch)
    segment = next(segment for segment in batch.segments if segment.key == (0, 2, 0))
    batch.token_ids_T[segment.start : segment.end] += 1
    mine = (batch.rows_N >= segment.start) & (batch.rows_N < segment.end)
    changed = (packed_logits(model, batch) != logits).any(-1).numpy()
    assert (changed == mine).all()


def test_sampling_with_a_cache_is_as_before() -> None:
    plain, packed = llama(), llama()
    prompts = torch.tensor([[0, 0, 5, 6, 7], [4, 5, 6, 7, 8]])
    mask = (prompts != 0).long()
    use_packed_attention(packed)
    batch = pack_samples(draw_samples(), 2000)[0]
    for model in (plain, packed):  # the same update of both
        packed_again = llama()
        use_packed_attention(packed_again)
        gradient = gradients(packed_again, packed_logits(packed_again, batch), torch.from_numpy(batch.targets_N))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight -= 0.01 * gradient[name]
    packed_logits(packed, batch)  # leaves nothing behind
    outputs = []
    for model in (plain, packed):
        cache = DynamicCache()
        first = model(input_ids=prompts, attention_mask=mask, past_key_values=cache)
        following = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        second = model(input_ids=prompts[:, -1:], attention_mask=following, past_key_values=cache)
        drawn = model.generate(prompts, attention_mask=mask, max_new_tokens=8, do_sample=False)
        outputs.append((first.logits[:, -1], second.logits, drawn))
    assert all(torch.equal(left, right) for left, right in zip(*outputs, strict=True))


UNSUPPORTED: dict[str, Any] = {
    "sliding_window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
    "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(vocab_size=40, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_a_model_whose_tokens_meet_elsewhere_is_rejected(reason: str) -> None:
    model: PreTrainedModel = UNSUPPORTED[reason]()
    with pytest.raises(SettingError, match=f"{reason}.*Llama and Qwen3"):
        use_packed_attention(model)


def test_a_model_that_was_not_prepared_is_rejected() -> None:
    with pytest.raises(SettingError, match=r"0 did. Call use_packed_attention\(model\) first"):
        packed_logits(llama(), pack_samples(draw_samples(), 1000)[0])


@st.composite
def sample_lists(draw: st.DrawFn) -> list[Sample]:
    """Samples whose beginnings branch: each copies some tokens of an earlier one, with few words so that more agree by chance."""
    samples: list[Sample] = []
    for rollout in range(draw(st.integers(0, 10))):
        prompt: tuple[int, ...] = ()
        if samples:
            earlier = draw(st.sampled_from(samples)).token_ids
            prompt = earlier[: draw(st.integers(0, len(earlier)))]
        prompt += tuple(draw(st.lists(st.integers(0, 1), min_size=1, max_size=30)))
        reply = tuple(draw(st.lists(st.integers(0, 1), min_size=1, max_size=5)))
        place = (len(prompt), len(prompt) + len(reply))
        logprobs = tuple(-number / 8 for number in range(len(reply)))
        samples.append(Sample(prompt + reply, (place,), logprobs, rollout / 4, draw(st.integers(0, 1)), rollout, (0,)))
    return samples


@settings(deadline=None)
@given(sample_lists(), st.integers(0, 100), st.booleans())
def test_every_sample_is_packed_whole_and_once(samples: list[Sample], room: int, share_prefixes: bool) -> None:
    longest = max((len(sample.token_ids) for sample in samples), default=1)
    batches = pack_samples(samples, longest + room, share_prefixes=share_prefixes)
    check_all_trained(samples, [key for batch in batches for key in batch.keys])
    named = {sample.key: sample for sample in samples}
    for batch in batches:
        assert len(batch.token_ids_T) == batch.tokens <= longest + room
        assert batch.sample_tokens == sum(len(named[key].token_ids) for key in batch.keys)
        assert [segment.start for segment in batch.segments] == [0, *(segment.end for segment in batch.segments[:-1])]
        trained = 0
        for segment in batch.segments:
            places = [*range(*segment.prefix), *range(segment.start, segment.end)]
            assert batch.position_ids_T[places].tolist() == list(range(len(places)))
            if not segment.key:
                continue
            sample = named[segment.key]
            assert batch.token_ids_T[places].tolist() == list(sample.token_ids)
            here = slice(trained, trained + sample.trained_tokens)
            first, last = sample.trained[0]
            assert batch.rows_N[here].tolist() == places[first - 1 : last - 1]
            assert segment.start <= batch.rows_N[here].min()
            assert batch.targets_N[here].tolist() == list(sample.token_ids[first:last])
            assert batch.logprobs_N[here].tolist() == list(sample.logprobs)
            assert (batch.advantages_N[here] == sample.advantage).all()
            trained += sample.trained_tokens
        assert trained == len(batch.rows_N) == len(batch.targets_N) == len(batch.logprobs_N) == len(batch.advantages_N)
    again = pack_samples(samples, longest + room, share_prefixes=share_prefixes)
    assert [batch.keys for batch in again] == [batch.keys for batch in batches]


def plain(ids: list[int], group: int, rollout: int) -> Sample:
    """A sample whose last token is trained."""
    return Sample(tuple(ids), ((len(ids) - 1, len(ids)),), (0.0,), 0.0, group, rollout, (0,))


def test_samples_are_cut_into_clusters_where_most_tokens_are_saved() -> None:
    question, chunk = [1] * 20, [2] * 30
    group = [plain([*question, *chunk, 10 + rollout, 3], 0, rollout) for rollout in range(3)]
    group += [plain([*question, 5, 5, 5, 20 + rollout, 3], 0, rollout) for rollout in range(3, 5)]
    other = [plain([*question, *chunk, 6, 3], 1, rollout) for rollout in range(2)]
    batch = pack_samples(other + group, 1000)[0]
    # 50 tokens three times and 23 twice save 2 × 50 + 23; all five together, or the six with a chunk, are not as good or not
    # of one group. Two samples that are the same still compute the token before the trained one each.
    prefixes = sorted(segment.end - segment.start for segment in batch.segments if not segment.key)
    assert prefixes == [23, 50, 50]
    assert batch.sample_tokens - batch.tokens == 2 * 50 + 23 + 50


def test_too_short_a_prefix_is_not_shared() -> None:
    samples = [plain([*[1] * 15, 5 + rollout, 3, 4], 0, rollout) for rollout in range(4)]
    assert all(segment.key for segment in pack_samples(samples, 1000)[0].segments)


def test_a_cluster_too_large_for_a_micro_batch_is_cut_into_several_that_share() -> None:
    samples = [plain([*[1] * 30, *[5 + rollout] * 9, 3], 0, rollout) for rollout in range(7)]
    batches = pack_samples(samples, 60)  # 30 + 3 × 10 fit
    assert sorted(len(batch.keys) for batch in batches) == [1, 3, 3]
    assert sorted(batch.tokens for batch in batches) == [40, 60, 60]


def test_without_sharing_micro_batches_are_filled_by_first_fit_decreasing() -> None:
    samples = [plain([7] * length, 0, number) for number, length in enumerate([3, 5, 2, 4])]
    batches = pack_samples(samples, 7, share_prefixes=False)
    assert [[key[1] for key in batch.keys] for batch in batches] == [[1, 2], [3, 0]]
    assert pack_samples([], 7) == []
    with pytest.raises(SettingError, match="longest sample's 5 tokens, got 4"):
        pack_samples(samples, 4)
