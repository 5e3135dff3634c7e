"""How much better each rollout is than its group: the advantages of GRPO.

Source: DeepSeekMath (arXiv 2402.03300), without its division by the standard deviation unless asked for: that division weighs
problems by how alike their rollouts are (Dr. GRPO, arXiv 2503.20783), and AtomMem (arXiv 2601.08323) leaves it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atommem_env.errors import DataError, SettingError

_EPS = 1e-6  # keeps the division finite where rewards hardly differ


@dataclass(frozen=True, slots=True, eq=False)
class GroupAdvantages:
    """One advantage a rollout, and which groups there is something to learn from."""

    advantages_P_G: NDArray[np.float64]  # exactly 0 in groups that are not active
    failed_P: NDArray[np.bool_]  # a rollout was lost to the infrastructure: the whole group is dropped
    zero_variance_P: NDArray[np.bool_]  # complete, but all rewards are equal: its gradient is zero, so it is skipped

    @property
    def active_P(self) -> NDArray[np.bool_]:
        """Groups to train on."""
        return ~(self.failed_P | self.zero_variance_P)

    @property
    def active_groups(self) -> int:
        """How many groups are trained on; with `zero_variance_groups` and `failed_groups` it adds up to P."""
        return int(self.active_P.sum())

    @property
    def zero_variance_groups(self) -> int:
        """How many complete groups were skipped for want of variance."""
        return int(self.zero_variance_P.sum())

    @property
    def failed_groups(self) -> int:
        """How many groups were dropped because a rollout failed."""
        return int(self.failed_P.sum())


def group_advantages(rewards_P_G: Sequence[Sequence[float | None]], *, divide_by_std: bool = False) -> GroupAdvantages:
    """The advantage of each rollout over the mean reward of its group.

    `A = r - mean(r)`, or `A = (r - mean(r)) / (std(r) + 1e-6)` with the sample standard deviation (divisor G - 1). It is
    computed **once per rollout**, and every token of every turn of the rollout gets it.

    A baseline taken over *turns* (the mean over all samples of a group, as a trainer does that takes each turn for a rollout)
    would be biased wherever rollouts differ in length, for it leans towards the rewards of the long ones. Rewards 1, ½ and 0 in
    rollouts of 1, 1 and 6 turns: the mean over rollouts is ½, over turns (1 + ½ + 6·0) / 8 = 3/16. The middling rollout
    would be pushed up by 5/16 for no merit of its own, and the failed one down by 3/16 in place of ½:

    >>> group_advantages([[1.0, 0.5, 0.0]]).advantages_P_G.tolist()
    [[0.5, 0.0, -0.5]]
    >>> rewards_by_turn = np.repeat([1.0, 0.5, 0.0], [1, 1, 6])
    >>> (np.array([1.0, 0.5, 0.0]) - rewards_by_turn.mean()).tolist()  # wrong
    [0.8125, 0.3125, -0.1875]

    A group without variance is skipped, and so is one with a failed rollout; neither failure nor group becomes a reward of 0:

    >>> groups = group_advantages([[1.0, 0.0], [1.0, 1.0], [None, 1.0]])
    >>> groups.advantages_P_G.tolist()
    [[0.5, -0.5], [0.0, 0.0], [0.0, 0.0]]
    >>> groups.active_groups, groups.zero_variance_groups, groups.failed_groups
    (1, 1, 1)

    Args:
        rewards_P_G: Rewards; None is a rollout that the infrastructure lost.

    Raises:
        SettingError: no group, groups of different sizes, or of fewer than two rollouts (the advantage would always be 0).
        DataError: a reward that is not finite.
    """
    sizes = {len(group) for group in rewards_P_G}
    if len(sizes) != 1 or min(sizes) < 2:
        raise SettingError(
            f"Expected at least one group, all of one size of at least 2 rollouts; got {len(rewards_P_G)} groups of sizes "
            f"{sorted(sizes)}. Make the group size at least 2, and write a lost rollout as None instead of leaving it out."
        )
    for problem, group in enumerate(rewards_P_G):
        for rollout, reward in enumerate(group):
            if reward is not None and not np.isfinite(reward):
                raise DataError(
                    f"Rewards must be finite numbers, got {reward!r} for rollout {rollout} of group {problem}. Fix the "
                    "reward function; a rollout without a reward is None."
                )
    # NaN marks lost rollouts from here on; nothing else can be NaN.
    rewards = np.array(
        [[np.nan if reward is None else reward for reward in group] for group in rewards_P_G], dtype=float
    )
    failed_P = np.isnan(rewards).any(axis=1)
    # Compared, not subtracted: the mean of three times 0.1 is not 0.1, and a rest of 1e-17 would be divided by its like.
    zero_variance_P = ~failed_P & (rewards == rewards[:, :1]).all(axis=1)
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    if divide_by_std:
        advantages /= rewards.std(axis=1, ddof=1, keepdims=True) + _EPS
    advantages[failed_P | zero_variance_P] = 0.0
    return GroupAdvantages(advantages, failed_P, zero_variance_P)
