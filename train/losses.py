"""The loss of GRPO, in small functions on flat tensors of trained tokens.

Both trainers take the trained positions out of a batch first (`logits_B_T_V[loss_mask_B_T]`, and the targets, log-probabilities
and advantages alike), so that padded and padding-free batches give the same `[N]` tensors, and most logits are never computed.
Probabilities are natural logarithms: `logp` of the policy that is being trained, `old` of the same before the step's first
update (on-policy with one update: `logp.detach()`), `sampler` as recorded when the token was drawn, `reference` of a frozen one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atommem_env.errors import SettingError

_MAX_LOG_RATIO = 20.0  # exp(89) overflows float32, and an infinite ratio times an advantage of 0 is NaN


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """The constants of the loss; the defaults are the AtomMem paper's (arXiv 2601.08323), but for `importance_cap`."""

    clip_low: float = 0.2  # a token made less likely than 1 - clip_low times its old probability is left there
    clip_high: float = 0.28  # one made more likely than 1 + clip_high times is left there
    kl_coef: float = 0.0  # weight of the KL divergence from the reference; 0: no reference needed
    importance_cap: float | None = 2.0  # most that a token counts for the sampler's rounding; None: no correction

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise SettingError(f"{name} must be {expected}, got {getattr(self, name)!r}.")

        check("clip_low", 0 < self.clip_low <= 1, "above 0 and at most 1")
        check("clip_high", 0 < self.clip_high < float("inf"), "above 0")
        check("kl_coef", 0 <= self.kl_coef < float("inf"), "at least 0")
        check("importance_cap", self.importance_cap is None or self.importance_cap >= 1, "None or at least 1")


def token_logprobs(logits_N_V: Tensor, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
    """[N] log softmax(logits / temperature) at the targets, in float32 whatever the model computes in.

    The temperature must be the one that was sampled at, else old and new probabilities are of two distributions.

    >>> token_logprobs(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]), temperature=2.0).exp()
    tensor([0.7311, 0.2689])

    Raises:
        SettingError: a temperature that is not above 0.
    """
    return _log_softmax(logits_N_V, temperature).gather(-1, targets_N[:, None])[:, 0]


@torch.no_grad()
def token_entropy(logits_N_V: Tensor, temperature: float = 1.0) -> Tensor:
    """[N] entropy of each token's distribution in nats, in float32; a metric, without gradient.

    H = -Σ p log p; a fair coin has log 2:

    >>> token_entropy(torch.tensor([[0.0, 0.0], [-torch.inf, 0.0]]))
    tensor([0.6931, 0.0000])

    Raises:
        SettingError: a temperature that is not above 0.
    """
    return torch.special.entr(_log_softmax(logits_N_V, temperature).exp()).sum(-1)  # a token ruled out (p = 0) adds 0


def _log_softmax(logits_N_V: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise SettingError(f"temperature must be above 0, got {temperature!r}. Train at the temperature sampled at.")
    return torch.log_softmax(logits_N_V.float() / temperature, dim=-1)


def probability_ratio(logp_N: Tensor, old_N: Tensor) -> Tensor:
    """[N] ρ = p / p_old = exp(logp - old); beyond e^±20 it stays there, without gradient."""
    return (logp_N - old_N).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def clipped_policy_loss(
    logp_N: Tensor, old_N: Tensor, advantages_N: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.28
) -> Tensor:
    """[N] the surrogate to minimise: -min(ρ A, clip(ρ, 1 - clip_low, 1 + clip_high) A).

    PPO (arXiv 1707.06347) clips alike on both sides; the higher upper bound is DAPO's "clip-higher" (arXiv 2503.14476), which
    lets rare tokens grow. At ρ = 2, where a token has grown too likely already, only a negative advantage still acts:

    >>> logp = torch.tensor([2.0, 2.0]).log().requires_grad_()
    >>> loss = clipped_policy_loss(logp, torch.zeros(2), torch.tensor([1.0, -1.0]))
    >>> loss.detach(), torch.autograd.grad(loss.sum(), logp)[0]
    (tensor([-1.2800,  2.0000]), tensor([0., 2.]))
    """
    ratio = probability_ratio(logp_N, old_N)
    return -torch.minimum(ratio * advantages_N, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages_N)


@torch.no_grad()
def is_clipped(
    logp_N: Tensor, old_N: Tensor, advantages_N: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.28
) -> Tensor:
    """[N] whether the clip takes the token's gradient away; its mean is the clip fraction.

    >>> is_clipped(torch.tensor([2.0, 2.0, 0.5, 0.5]).log(), torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]))
    tensor([ True, False, False,  True])
    """
    ratio = probability_ratio(logp_N, old_N)
    return ((ratio > 1 + clip_high) & (advantages_N > 0)) | ((ratio < 1 - clip_low) & (advantages_N < 0))


@torch.no_grad()
def importance_weights(old_N: Tensor, sampler_N: Tensor, cap: float = 2.0) -> Tensor:
    """[N] min(exp(old - sampler), cap): corrects for a sampler whose probabilities are not quite the trainer's.

    An inference engine rounds otherwise than the trainer does, or is some updates behind; the weight makes the loss an
    expectation under the trainer's policy. Cut off at `cap`, a little biased, it has a bounded variance. Sources: truncated
    importance sampling (Ionides 2008, J. Comput. Graph. Stat. 17:295), for this purpose Yao et al. 2025, "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training".

    >>> importance_weights(torch.tensor([0.5, 0.1, 0.9]).log(), torch.tensor([0.5, 0.2, 0.1]).log())
    tensor([1.0000, 0.5000, 2.0000])
    """
    return probability_ratio(old_N, sampler_N).clamp(max=cap)


def kl_k3(logp_N: Tensor, other_N: Tensor) -> Tensor:
    """[N] an estimate of KL(p ‖ p_other) from tokens drawn from p: exp(d) - 1 - d with d = other - logp.

    Unbiased and never negative: the estimator "k3" of Schulman 2020, "Approximating KL Divergence"; with the reference for
    p_other it is the KL term of GRPO (DeepSeekMath, arXiv 2402.03300).

    >>> kl_k3(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.5, 0.25]).log())
    tensor([0.0000, 0.1931])
    """
    log_ratio = (other_N - logp_N).clamp(max=_MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio  # exp(d) - 1 would lose the digits of a small d


def token_mean(values_N: Tensor, total_tokens: int) -> Tensor:
    """The share of these tokens in the mean over all trained tokens of the whole batch: sum(values) / total_tokens.

    Every token weighs the same, however long its turn is (DAPO's token-level loss, arXiv 2503.14476). `total_tokens` counts those
    of all micro-batches and all processes, so that micro-batches' losses, and gradients, add up to the batch's:

    >>> values = torch.tensor([1.0, 2.0, 6.0])
    >>> float(token_mean(values, 3)), float(token_mean(values[:1], 3) + token_mean(values[1:], 3))
    (3.0, 3.0)

    A data-parallel trainer that averages gradients over W processes multiplies its loss by W.

    Raises:
        SettingError: fewer tokens in the batch than in this part of it, or none.
    """
    if total_tokens < max(1, values_N.numel()):
        raise SettingError(
            f"total_tokens must count the whole batch, at least the {values_N.numel()} tokens given and 1; got {total_tokens}."
        )
    return values_N.sum() / total_tokens


def grpo_loss(
    logp_N: Tensor,
    old_N: Tensor,
    sampler_N: Tensor,
    advantages_N: Tensor,
    *,
    total_tokens: int,
    reference_N: Tensor | None = None,
    settings: LossConfig = LossConfig(),
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a micro-batch adds to the loss of the whole batch: token_mean(w · clipped policy loss + kl_coef · k3).

    Returns:
        The loss, to be minimised, and metrics without gradient that add up over micro-batches as the loss does: `policy_loss`,
        `clip_fraction`, `approx_kl` (of the old policy from this one), `importance_weight` (mean), `sampler_kl` (of the
        sampler from the old policy; it must stay near 0), and `reference_kl` where there is a reference.

    Raises:
        SettingError: tensors of different shapes, or a KL term without a reference.
    """
    tensors = {"logp": logp_N, "old": old_N, "sampler": sampler_N, "advantages": advantages_N}
    if reference_N is not None:
        tensors["reference"] = reference_N
    if logp_N.dim() != 1 or len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise SettingError(f"Expected one number a trained token, all of one shape [N]; got {shapes}.")
    if settings.kl_coef and reference_N is None:
        raise SettingError(
            f"kl_coef={settings.kl_coef} needs the reference's log-probabilities; pass them, or set kl_coef=0."
        )
    clip = {"clip_low": settings.clip_low, "clip_high": settings.clip_high}
    old_N, sampler_N = old_N.detach(), sampler_N.detach()
    loss_N = clipped_policy_loss(logp_N, old_N, advantages_N, **clip)
    weights_N = torch.ones_like(old_N)
    if settings.importance_cap is not None:
        weights_N = importance_weights(old_N, sampler_N, settings.importance_cap)
        loss_N = loss_N * weights_N
    metrics_N = {
        "policy_loss": loss_N,
        "clip_fraction": is_clipped(logp_N, old_N, advantages_N, **clip).to(loss_N.dtype),
        "approx_kl": kl_k3(old_N, logp_N),
        "importance_weight": weights_N,
        "sampler_kl": kl_k3(sampler_N, old_N),
    }
    if reference_N is not None:
        metrics_N["reference_kl"] = kl_k3(logp_N, reference_N.detach())
    if settings.kl_coef:
        loss_N = loss_N + settings.kl_coef * metrics_N["reference_kl"]
    return token_mean(loss_N, total_tokens), {
        name: token_mean(values_N.detach(), total_tokens) for name, values_N in metrics_N.items()
    }
