"""The loss, against loops over plain floats, finite differences, and the batch split into pieces."""

from __future__ import annotations

import math
from itertools import pairwise, starmap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atommem_env.errors import SettingError
from atommem_env.types import Reply, Rollout, StopReason, Turn
from train.advantages import group_advantages
from train.losses import (
    LossConfig,
    clipped_policy_loss,
    grpo_loss,
    importance_weights,
    is_clipped,
    kl_k3,
    token_entropy,
    token_logprobs,
    token_mean,
)
from train.samples import Batch, Sample, collate, make_samples

NO_KL = LossConfig()
WITH_KL = LossConfig(kl_coef=0.1)
LOGPROBS = st.lists(st.floats(-12, 0), min_size=1, max_size=8)


def plain_loss(logp: float, old: float, sampler: float, advantage: float, reference: float, loss: LossConfig) -> float:
    """One token's loss, written as the papers' cases instead of as minimum and clamp."""
    ratio = math.exp(logp) / math.exp(old)
    if advantage > 0:
        gain = advantage * (ratio if ratio < 1 + loss.clip_high else 1 + loss.clip_high)
    else:
        gain = advantage * (ratio if ratio > 1 - loss.clip_low else 1 - loss.clip_low)
    weight = math.exp(old) / math.exp(sampler)
    if loss.importance_cap is None:
        weight = 1.0
    elif weight > loss.importance_cap:
        weight = loss.importance_cap
    other = math.exp(reference) / math.exp(logp)
    return -weight * gain + loss.kl_coef * (other - math.log(other) - 1)


@given(
    st.lists(st.tuples(*[st.floats(-6, 0)] * 4, st.floats(-2, 2)), min_size=1, max_size=8),
    st.floats(0.05, 0.5),
    st.floats(0.05, 0.9),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([None, 1.0, 2.0, 50.0]),
)
def test_the_loss_equals_a_loop_over_floats(
    rows: list[tuple[float, ...]], low: float, high: float, kl: float, cap: float | None
) -> None:
    setting = LossConfig(clip_low=low, clip_high=high, kl_coef=kl, importance_cap=cap)
    logp, old, sampler, reference, advantages = torch.tensor(rows, dtype=torch.float64).unbind(1)
    loss, _ = grpo_loss(
        logp, old, sampler, advantages, reference_N=reference, total_tokens=len(rows) + 3, settings=setting
    )
    expected = [plain_loss(p, o, s, a, r, setting) for p, o, s, r, a in rows]
    assert float(loss.detach()) == pytest.approx(math.fsum(expected) / (len(rows) + 3), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_and_entropy_equal_numpy_in_double(temperature: float, dtype: torch.dtype) -> None:
    logits = (6 * torch.randn(5, 11, generator=torch.Generator().manual_seed(0))).to(dtype)
    targets = torch.tensor([0, 3, 10, 5, 3])
    powers = np.exp(logits.double().numpy() / temperature)
    p = powers / powers.sum(axis=1, keepdims=True)
    got, entropy = token_logprobs(logits, targets, temperature), token_entropy(logits, temperature)
    assert got.dtype == entropy.dtype == torch.float32
    assert got.tolist() == pytest.approx([math.log(p[row, token]) for row, token in enumerate(targets)], abs=1e-5)
    assert entropy.tolist() == pytest.approx([-sum(x * math.log(x) for x in row) for row in p], abs=1e-5)


def test_a_token_that_is_ruled_out_leaves_entropy_and_gradient_finite() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    assert token_entropy(logits).tolist() == pytest.approx([math.log(2)])
    token_logprobs(logits, torch.tensor([0])).sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.5, -0.5, 0.0]]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_without_a_distribution_is_rejected(temperature: float) -> None:
    with pytest.raises(SettingError, match="temperature"):
        token_logprobs(torch.zeros(1, 2), torch.tensor([0]), temperature)


# Ratios in and beside every clip region (bounds 0.8 and 1.28), none on an edge, where there is no derivative.
RATIOS = [0.3, 0.79, 0.81, 1.0, 1.2, 1.27, 1.29, 3.0]


@pytest.mark.parametrize("advantage", [-1.5, 0.0, 0.5])
def test_gradients_of_the_clip_regions_equal_finite_differences(advantage: float) -> None:
    old = torch.linspace(-3, -0.5, len(RATIOS), dtype=torch.float64)
    logp = (old + torch.tensor(RATIOS, dtype=torch.float64).log()).requires_grad_()
    advantages = torch.full_like(old, advantage)

    def loss(logp_N: Tensor) -> Tensor:
        return clipped_policy_loss(logp_N, old, advantages)

    assert torch.autograd.gradcheck(loss, logp)
    (gradient,) = torch.autograd.grad(loss(logp).sum(), logp)
    open_ = [r < 1.28 if advantage > 0 else r > 0.8 for r in RATIOS]
    expected = [-advantage * ratio if free else 0.0 for ratio, free in zip(RATIOS, open_, strict=True)]
    assert gradient.tolist() == pytest.approx(expected)
    clipped = is_clipped(logp, old, advantages).tolist()
    assert clipped == [not free and advantage != 0 for free in open_]


def test_gradients_of_the_kl_term_equal_finite_differences() -> None:
    reference = torch.tensor([-3.0, -1.0, -0.2], dtype=torch.float64)
    logp = torch.tensor([-1.0, -1.5, -0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda logp_N: kl_k3(logp_N, reference), logp)


def test_without_clipping_the_gradient_is_that_of_the_policy_gradient() -> None:
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([0.5, -0.25])
    loss, metrics = grpo_loss(logp, logp.detach(), logp.detach(), advantages, total_tokens=2)
    assert torch.autograd.grad(loss, logp)[0].tolist() == [-0.25, 0.125]
    assert {name: float(value) for name, value in metrics.items()} == {
        "policy_loss": -0.125,
        "clip_fraction": 0.0,
        "approx_kl": 0.0,
        "importance_weight": 1.0,
        "sampler_kl": 0.0,
    }


def test_log_probabilities_far_apart_neither_overflow_nor_turn_a_zero_advantage_into_nan() -> None:
    logp = torch.tensor([0.0, 0.0, -200.0], requires_grad=True)
    old = torch.tensor([-200.0, -200.0, 0.0])
    loss, metrics = grpo_loss(
        logp, old, old - 150, torch.tensor([0.0, 1.0, -1.0]), reference_N=old, total_tokens=3, settings=WITH_KL
    )
    assert all(math.isfinite(value.detach()) for value in [loss, *metrics.values()])
    assert torch.autograd.grad(loss, logp)[0].isfinite().all()


@given(LOGPROBS, LOGPROBS)
def test_k3_is_never_negative_and_zero_at_equality(first: list[float], second: list[float]) -> None:
    size = min(len(first), len(second))
    p, q = torch.tensor(first[:size]), torch.tensor(second[:size])
    assert (kl_k3(p, q) >= 0).all()
    assert kl_k3(p, p).tolist() == [0.0] * size
    assert (kl_k3(p, p * (1 + 3e-7)) >= 0).all()


def test_k3_keeps_its_digits_where_policies_hardly_differ() -> None:
    d = 3 * 2.0**-12  # exact, and its square is not a multiple of the last digit of 1
    got = kl_k3(torch.tensor([-1.0]), torch.tensor([-1.0 + d]))
    assert got.item() == pytest.approx(d**2 / 2 + d**3 / 6, rel=1e-3)


def test_k3_is_an_unbiased_estimate_of_the_kl_divergence() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    expectation = (p * kl_k3(p.log(), q.log())).sum()
    assert float(expectation) == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))


def test_importance_weights_make_the_samplers_mean_the_trainers() -> None:
    trainer, sampler = (torch.tensor(p, dtype=torch.float64) for p in ([0.5, 0.3, 0.2], [0.3, 0.4, 0.3]))
    values = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    weights = importance_weights(trainer.log(), sampler.log())
    assert float((sampler * weights * values).sum()) == pytest.approx(float((trainer * values).sum()))
    assert importance_weights(trainer.log(), sampler.log(), cap=1.5).tolist() == pytest.approx([1.5, 0.75, 2 / 3])


# ----------------------------------------------------------------------------- the whole way, with a model of one matrix


def rollout(calls: list[tuple[list[int], list[int]]], reward: float, rng: np.random.Generator) -> Rollout:
    replies = [Reply("", tuple(p), tuple(c), tuple((-rng.random(len(c))).tolist())) for p, c in calls]
    turns = tuple(Turn({}, reply, ()) for reply in replies)  # type: ignore[typeddict-item]
    return Rollout("hand/1", 0, turns, reward, StopReason.ANSWERED)


def play(rewards_P_G: list[list[float]]) -> list[list[Rollout]]:
    """Random rollouts of one to four turns over a vocabulary of 6; some turns continue the one before."""
    rng = np.random.default_rng(0)

    def one(reward: float) -> Rollout:
        calls: list[tuple[list[int], list[int]]] = []
        for _ in range(rng.integers(1, 5)):
            prompt = rng.integers(0, 6, rng.integers(1, 6)).tolist()
            if calls and rng.random() < 0.4:
                prompt = calls[-1][0] + calls[-1][1] + prompt
            calls.append((prompt, rng.integers(0, 6, rng.integers(1, 8)).tolist()))
        return rollout(calls, reward, rng)

    return [[one(reward) for reward in group] for group in rewards_P_G]


class Counting(torch.nn.Module):
    """Logits from the last token and the running mean of a sample's tokens, so that a leak between samples shows."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.last = torch.nn.Parameter(torch.randn(6, 6, generator=generator, dtype=torch.float64))
        self.mean = torch.nn.Parameter(torch.randn(6, 6, generator=generator, dtype=torch.float64))

    def forward(self, token_ids_B_T: Tensor, position_ids_B_T: Tensor) -> Tensor:
        rows = []
        for tokens, positions in zip(token_ids_B_T, position_ids_B_T, strict=True):
            starts = [*torch.nonzero(positions == 0)[:, 0].tolist(), len(tokens)]
            for start, end in pairwise(starts):
                seen = self.mean[tokens[start:end]].cumsum(0) / torch.arange(1, end - start + 1)[:, None]
                rows.append(self.last[tokens[start:end]] + seen)
        return torch.cat(rows).view(*token_ids_B_T.shape, 6)


def parts(batch: Batch, model: Counting) -> dict[str, Tensor]:
    mask = torch.from_numpy(batch.loss_mask_B_T)
    logits = model(torch.from_numpy(batch.token_ids_B_T), torch.from_numpy(batch.position_ids_B_T))[mask]
    # In double, which `token_logprobs` does not keep: sums in another order must agree to more than float32 has.
    logp = torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(batch.targets_B_T)[mask][:, None])[:, 0]
    sampler = torch.from_numpy(batch.logprobs_B_T)[mask].double()
    return {
        "logp_N": logp,
        "old_N": sampler + 0.1,
        "sampler_N": sampler,
        "advantages_N": torch.from_numpy(batch.advantages_B_T)[mask].double(),
        "reference_N": sampler - 0.2,
    }


def gradient(rows_of_batches: list[list[list[Sample]]], total: int) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient and metrics summed over batches."""
    model, loss_sum = Counting(), 0.0
    sums: dict[str, float] = {}
    for rows in rows_of_batches:
        loss, metrics = grpo_loss(**parts(collate(rows), model), total_tokens=total, settings=WITH_KL)
        loss.backward()
        loss_sum += float(loss.detach())
        sums = {name: sums.get(name, 0.0) + float(value) for name, value in metrics.items()}
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return loss_sum, torch.cat(grads), sums


REWARDS = [[1.0, 0.0, 0.5], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(12)), st.integers(1, 11))
def test_micro_batches_padded_or_packed_add_up_to_one_batch(order: list[int], split: int) -> None:
    played = play(REWARDS)
    samples = make_samples(played, group_advantages(REWARDS))
    total = sum(sample.trained_tokens for sample in samples)
    whole = gradient([[[sample] for sample in samples]], total)

    shuffled = [samples[place] for place in order]
    for batches in ([[shuffled[:split]], [shuffled[split:]]], [[[sample]] for sample in shuffled]):
        loss, grads, metrics = gradient(batches, total)
        assert loss == pytest.approx(whole[0], rel=1e-9)
        assert torch.allclose(grads, whole[1], rtol=1e-9, atol=1e-12)
        assert metrics == pytest.approx(whole[2], rel=1e-9)


def test_the_batch_loss_equals_a_loop_over_the_turns_of_the_rollouts() -> None:
    played = play(REWARDS)
    last, mean = (parameter.detach().numpy() for parameter in Counting().parameters())
    losses = []
    for group, rewards in zip(played, REWARDS, strict=True):
        if len(set(rewards)) == 1:
            continue
        for one in group:
            for turn in one.turns:
                context = list(turn.reply.prompt_ids)
                for token, logprob in zip(turn.reply.completion_ids, turn.reply.logprobs, strict=True):
                    logits = last[context[-1]] + np.mean([mean[seen] for seen in context], axis=0)
                    logp = logits[token] - math.log(sum(map(math.exp, logits)))
                    sampler, advantage = float(np.float32(logprob)), one.reward - sum(rewards) / 3
                    losses.append((logp, sampler + 0.1, sampler, advantage, sampler - 0.2, WITH_KL))
                    context.append(token)
    samples = make_samples(played, group_advantages(REWARDS))
    assert any(len(sample.turns) > 1 for sample in samples)
    assert sum(sample.trained_tokens for sample in samples) == len(losses)
    loss, _, _ = gradient([[samples[:5]], [samples[5:]]], len(losses))
    assert loss == pytest.approx(math.fsum(starmap(plain_loss, losses)) / len(losses), rel=1e-6)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1.0])
def test_equal_rewards_give_exactly_zero_gradient_and_leave_the_weights_as_they_are(reward: float) -> None:
    rewards = [[reward] * 3, [1.0, 0.0, 0.5]]
    groups = group_advantages(rewards)
    assert {sample.group for sample in make_samples(play(rewards), groups)} == {1}  # skipped as a rule

    groups.zero_variance_P[0] = False  # and if it were not:
    samples = [sample for sample in make_samples(play(rewards), groups) if sample.group == 0]
    model = Counting()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    batch = parts(collate([[sample] for sample in samples]), model)
    batch["old_N"] = batch["logp_N"].detach() - torch.linspace(-1, 1, len(batch["logp_N"]))  # in every clip region
    loss, _ = grpo_loss(**batch, total_tokens=len(batch["logp_N"]), settings=NO_KL)
    loss.backward()
    assert float(loss.detach()) == 0.0
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0).step()
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(old.view(torch.int64), parameter.detach().view(torch.int64))


# --------------------------------------------------------------------------------------------------------- what is rejected


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip_low": 0.0},
        {"clip_low": 1.1},
        {"clip_high": 0.0},
        {"clip_high": math.nan},
        {"kl_coef": -0.1},
        {"importance_cap": 0.5},
        {"importance_cap": math.nan},
    ],
)
def test_settings_that_cannot_work_are_rejected(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        LossConfig(**wrong)


def test_shapes_that_would_broadcast_are_rejected() -> None:
    one = torch.zeros(3)
    with pytest.raises(SettingError, match=r"'advantages': \(1,\)"):
        grpo_loss(one, one, one, torch.zeros(1), total_tokens=3)
    with pytest.raises(SettingError, match=r"shape \[N\]"):
        grpo_loss(*[torch.zeros(1, 3)] * 4, total_tokens=3)


def test_a_kl_term_needs_a_reference() -> None:
    with pytest.raises(SettingError, match="needs the reference"):
        grpo_loss(*[torch.zeros(3)] * 4, total_tokens=3, settings=WITH_KL)


@pytest.mark.parametrize("total", [0, 2])
def test_a_count_of_the_micro_batch_or_of_nothing_is_rejected(total: int) -> None:
    with pytest.raises(SettingError, match="whole batch"):
        token_mean(torch.zeros(3), total)
    assert float(token_mean(torch.zeros(0), 1)) == 0.0  # a process may have nothing to train on
