"""From rollouts to training samples, and from samples to the arrays of a batch. Token ids go through as they were sampled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atommem_env.errors import DataError, SamplesMismatch, SettingError
from atommem_env.types import Reply, Rollout
from train.advantages import GroupAdvantages

SampleKey = tuple[int, int, int]  # group, rollout in the group, first turn


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence to train on: a model call, or several of which each continues the one before."""

    token_ids: tuple[int, ...]  # [T] prompt and completion, or prompt, completion, more prompt, completion, …
    trained: tuple[tuple[int, int], ...]  # from, to (exclusive): the positions of the completions in `token_ids`
    logprobs: tuple[float, ...]  # [N] the sampler's, one a trained token, in order
    advantage: float  # of the whole rollout
    group: int  # which problem, 0 ≤ group < P
    rollout: int  # which rollout of the group, 0 ≤ rollout < G
    turns: tuple[int, ...]  # the turns of the rollout that it holds

    @property
    def trained_tokens(self) -> int:
        """How many tokens it adds to the loss."""
        return len(self.logprobs)

    @property
    def key(self) -> SampleKey:
        """Names the sample within its training step."""
        return self.group, self.rollout, self.turns[0]


def make_samples(rollouts_P_G: Sequence[Sequence[Rollout | None]], groups: GroupAdvantages) -> list[Sample]:
    """The samples of all active groups: every turn of every rollout is in exactly one.

    Args:
        rollouts_P_G: None is a rollout that the infrastructure lost.
        groups: What `group_advantages` made of their rewards.

    Raises:
        SettingError: `groups` is about other rollouts.
        DataError: see `rollout_samples`.
    """
    active = np.flatnonzero(groups.active_P).tolist()
    shape, sizes = groups.advantages_P_G.shape, [len(group) for group in rollouts_P_G]
    if sizes != [shape[1]] * shape[0] or any(None in rollouts_P_G[group] for group in active):
        raise SettingError(
            f"Expected {shape[0]} groups of {shape[1]} rollouts, none lost in groups {active}; got groups of sizes {sizes}, lost "
            f"rollouts in {[number for number, group in enumerate(rollouts_P_G) if None in group]}. Compute the advantages "
            "from the rewards of these very rollouts, with None for a lost one."
        )
    return [
        sample
        for group in active
        for index, rollout in enumerate(rollouts_P_G[group])
        if rollout is not None
        for sample in rollout_samples(rollout, float(groups.advantages_P_G[group, index]), group=group, index=index)
    ]


def rollout_samples(rollout: Rollout, advantage: float, *, group: int = 0, index: int = 0) -> list[Sample]:
    """The samples of one rollout.

    A turn continues the sample before it only where that sample's ids are an exact prefix of the turn's prompt; else it begins
    one. Prompt → completion of three turns, the first two of one conversation:

        (1 2 → 3 4)   (1 2 3 4 5 → 6)   (1 2 7 → 8)

    give two samples, with the trained tokens in brackets:

        1 2 [3 4] 5 [6]       trained = ((2, 4), (5, 6))      turns = (0, 1)
        1 2 7 [8]             trained = ((3, 4),)             turns = (2,)

    Raises:
        DataError: a turn without token ids, or with other than one finite log-probability a sampled token.
    """
    where = f"of rollout {index} of group {group} (task {rollout.task_id}, seed {rollout.seed})"
    if not rollout.turns:
        raise DataError(f"Expected at least one turn, got none {where}. Train on finished episodes only.")
    samples: list[Sample] = []
    ids: tuple[int, ...] = ()  # the sample that is being put together
    trained: tuple[tuple[int, int], ...] = ()
    logprobs: tuple[float, ...] = ()
    turns: tuple[int, ...] = ()
    for number, turn in enumerate(rollout.turns):
        reply = turn.reply
        _check(reply, f"turn {number} {where}")
        if turns and reply.prompt_ids[: len(ids)] != ids:
            samples.append(Sample(ids, trained, logprobs, advantage, group, index, turns))
            trained, logprobs, turns = (), (), ()
        ids = reply.prompt_ids + reply.completion_ids
        trained += ((len(reply.prompt_ids), len(ids)),)
        logprobs += reply.logprobs
        turns += (number,)
    samples.append(Sample(ids, trained, logprobs, advantage, group, index, turns))
    return samples


def _check(reply: Reply, turn: str) -> None:
    if not reply.prompt_ids or not reply.completion_ids:
        raise DataError(
            f"Expected token ids of prompt and completion, got {len(reply.prompt_ids)} and {len(reply.completion_ids)} in "
            f"{turn}. Train on rollouts of a language model policy that returns what it sampled (see Reply)."
        )
    if len(reply.logprobs) != len(reply.completion_ids) or not np.isfinite(reply.logprobs).all():
        raise DataError(
            f"Expected a finite log-probability for each of the {len(reply.completion_ids)} sampled tokens, got "
            f"{len(reply.logprobs)}, {np.isfinite(reply.logprobs).sum()} of them finite, in {turn}. Have the sampler return "
            "the log-probabilities of the tokens it draws."
        )


def check_all_trained(made: Iterable[Sample], trained: Iterable[SampleKey]) -> None:
    """Checks that each sample was trained on exactly once; a trainer calls it at the end of every pass over its samples.

    Args:
        made: All samples of the step, of every process.
        trained: The `Sample.key` of each sample of each batch that went into a gradient, from every process.

    Raises:
        SamplesMismatch: a sample was left out, used twice, or is unknown.
    """
    expected, got = Counter(sample.key for sample in made), Counter(trained)
    if expected != got:
        missing, surplus = expected - got, got - expected
        raise SamplesMismatch(
            f"Expected each of the {expected.total()} samples made to be trained on once, got {got.total()}: "
            f"{missing.total()} left out {sorted(missing)[:3]}, {surplus.total()} too many {sorted(surplus)[:3]} (the first "
            "three as group, rollout, turn). Batches must neither drop a remainder nor fill one up with real samples."
        )


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The arrays of a forward and backward pass. Position t predicts the token at t + 1."""

    token_ids_B_T: NDArray[np.int64]  # the model's input
    position_ids_B_T: NDArray[np.int64]  # from 0 in every sample; a 0 where a packed row's next sample begins
    attention_mask_B_T: NDArray[np.int64]  # 1: a token, 0: padding
    targets_B_T: NDArray[np.int64]  # the token that follows in the same sample; 0 after its last
    loss_mask_B_T: NDArray[np.bool_]  # whether the target was sampled by the policy, and so is trained
    logprobs_B_T: NDArray[np.float32]  # the sampler's, of the target; 0 outside the loss mask
    advantages_B_T: NDArray[np.float32]  # 0 outside the loss mask
    keys: tuple[SampleKey, ...]  # of all samples in it, for `check_all_trained`


def collate(rows: Sequence[Sequence[Sample]], *, pad_id: int = 0) -> Batch:
    """Lays the samples of each row end to end, pads the rows on the right, and shifts what belongs to the targets.

    A right-padded batch has one sample a row, `collate([[sample] for sample in samples])`. Where a row has several, attention
    must stay within a sample, whose beginnings are the zeros of `position_ids_B_T`. (`train.packing` lays out rows of its own, in
    which samples share beginnings.) One row of 1 2 [3 4] 5 [6] and 7 [8], the trained tokens in brackets:

        token_ids      1 2 3 4 5 6 7 8
        position_ids   0 1 2 3 4 5 0 1
        targets        2 3 4 5 6 0 8 0
        loss_mask      . x x . x . x .      trained are the positions *before* the sampled tokens

    >>> first = Sample((1, 2, 3, 4, 5, 6), ((2, 4), (5, 6)), (-0.3, -0.4, -0.6), 0.5, 0, 0, (0, 1))
    >>> second = Sample((7, 8), ((1, 2),), (-0.8,), -0.5, 0, 1, (0,))
    >>> packed = collate([[first, second]])
    >>> packed.loss_mask_B_T.astype(int).tolist()
    [[0, 1, 1, 0, 1, 0, 1, 0]]
    >>> collate([[first], [second]]).targets_B_T.tolist()
    [[2, 3, 4, 5, 6, 0], [8, 0, 0, 0, 0, 0]]

    Raises:
        SettingError: no samples, or a row without any.
    """
    if not rows or not all(rows):
        raise SettingError(
            "Expected at least one row, each with at least one sample; skip the step when no group is active."
        )
    shape = len(rows), max(sum(len(sample.token_ids) for sample in row) for row in rows)
    batch = Batch(
        token_ids_B_T=np.full(shape, pad_id, dtype=np.int64),
        position_ids_B_T=np.zeros(shape, dtype=np.int64),
        attention_mask_B_T=np.zeros(shape, dtype=np.int64),
        targets_B_T=np.zeros(shape, dtype=np.int64),
        loss_mask_B_T=np.zeros(shape, dtype=np.bool_),
        logprobs_B_T=np.zeros(shape, dtype=np.float32),
        advantages_B_T=np.zeros(shape, dtype=np.float32),
        keys=tuple(sample.key for row in rows for sample in row),
    )
    for line, row in enumerate(rows):
        start = 0
        for sample in row:
            end = start + len(sample.token_ids)
            here = np.concatenate([np.arange(start + first - 1, start + last - 1) for first, last in sample.trained])
            batch.token_ids_B_T[line, start:end] = sample.token_ids
            batch.position_ids_B_T[line, start:end] = np.arange(end - start)
            batch.attention_mask_B_T[line, start:end] = 1
            batch.targets_B_T[line, start : end - 1] = sample.token_ids[1:]
            batch.loss_mask_B_T[line, here] = True
            batch.logprobs_B_T[line, here] = sample.logprobs
            batch.advantages_B_T[line, here] = sample.advantage
            start = end
    return batch
