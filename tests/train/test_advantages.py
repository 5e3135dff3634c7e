"""Group advantages: against plain arithmetic, and against the baseline that they must not be."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from atommem_env.errors import DataError, SettingError
from train.advantages import group_advantages

REWARD = st.one_of(st.none(), st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 1.0]), st.floats(-5, 5))


@st.composite
def rewards(draw: st.DrawFn) -> list[list[float | None]]:
    size = draw(st.integers(2, 6))
    return draw(st.lists(st.lists(REWARD, min_size=size, max_size=size), min_size=1, max_size=5))


@given(rewards(), st.booleans())
def test_equals_plain_arithmetic(rewards_P_G: list[list[float | None]], divide_by_std: bool) -> None:
    groups = group_advantages(rewards_P_G, divide_by_std=divide_by_std)
    for row, failed, zero_variance, group in zip(
        groups.advantages_P_G, groups.failed_P, groups.zero_variance_P, rewards_P_G, strict=True
    ):
        known = [reward for reward in group if reward is not None]
        assert failed == (len(known) < len(group))
        assert zero_variance == (not failed and len(set(known)) == 1)
        if failed or zero_variance:
            assert row.tolist() == [0.0] * len(group)
            continue
        scale = statistics.stdev(known) + 1e-6 if divide_by_std else 1.0
        assert row == pytest.approx([(reward - statistics.fmean(known)) / scale for reward in known], abs=1e-9)
    assert groups.active_groups + groups.zero_variance_groups + groups.failed_groups == len(rewards_P_G)
    assert groups.active_groups == int(groups.active_P.sum())


@pytest.mark.parametrize("divide_by_std", [False, True])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 0.7, 1.0])
def test_equal_rewards_give_exactly_zero_whatever_the_rounding_of_their_mean(
    reward: float, divide_by_std: bool
) -> None:
    for size in range(2, 20):
        groups = group_advantages([[reward] * size], divide_by_std=divide_by_std)
        assert groups.zero_variance_groups == 1
        assert groups.advantages_P_G.tolist() == [[0.0] * size]


def test_a_failure_is_not_a_reward_of_zero() -> None:
    lost = group_advantages([[None, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert (lost.active_groups, lost.zero_variance_groups, lost.failed_groups) == (1, 0, 1)
    assert lost.advantages_P_G[0].tolist() == [0.0, 0.0, 0.0]
    assert group_advantages([[0.0, 1.0, 0.0]]).active_groups == 1  # as a reward of 0 would have it


def test_a_group_that_failed_is_not_counted_as_flat_too() -> None:
    groups = group_advantages([[None, 1.0, 1.0], [None, None, None]])
    assert (groups.active_groups, groups.zero_variance_groups, groups.failed_groups) == (0, 0, 2)


def test_the_baseline_is_a_rollouts_and_not_a_turns_by_hand() -> None:
    turns, group = [1, 3], [1.0, 0.0]
    assert group_advantages([group]).advantages_P_G.tolist() == [[0.5, -0.5]]  # mean 1/2
    per_turn = np.array(group) - np.repeat(group, turns).mean()  # mean 1/4
    assert per_turn.tolist() == [0.75, -0.25]


def expected_gradient(baseline: str) -> NDArray[np.float64]:
    """E[Σ A ∇log p] over all groups of two draws from a softmax policy with three actions, by enumeration.

    An action is a whole rollout; the third takes six turns.
    """
    logits, reward, turns = np.array([0.2, 0.0, 0.5]), np.array([1.0, 0.5, 0.0]), np.array([1, 1, 6])
    p = np.exp(logits) / np.exp(logits).sum()
    scores = np.eye(3) - p  # scores[a] = ∇ log p(a)
    total = np.zeros(3)
    for pair in itertools.product(range(3), repeat=2):
        drawn = list(pair)
        advantages = group_advantages([reward[drawn].tolist()]).advantages_P_G[0]
        if baseline == "turn":
            advantages = reward[drawn] - (reward * turns)[drawn].sum() / turns[drawn].sum()
        if baseline == "none":  # the policy gradient itself
            advantages = reward[drawn]
        total += p[drawn].prod() * (advantages[:, None] * scores[drawn]).sum(axis=0)
    return total


def test_the_baseline_is_a_rollouts_and_not_a_turns_in_expectation() -> None:
    true = expected_gradient("none")
    assert expected_gradient("rollout") == pytest.approx(true / 2)  # (G - 1) / G of it: the same direction
    biased = expected_gradient("turn")
    cosine = biased @ true / np.linalg.norm(biased) / np.linalg.norm(true)
    assert cosine < 0.99
    assert true[1] > 0 > biased[1]  # the middling action is unlearned, though it is better than average


@pytest.mark.parametrize("rewards_P_G", [[], [[]], [[1.0]], [[1.0, 0.0], [1.0]]])
def test_groups_that_cannot_be_compared_are_rejected(rewards_P_G: list[list[float | None]]) -> None:
    with pytest.raises(SettingError, match="group size at least 2"):
        group_advantages(rewards_P_G)


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_that_is_no_number_is_named(reward: float) -> None:
    with pytest.raises(DataError, match="rollout 1 of group 2"):
        group_advantages([[0.0, 1.0], [None, 1.0], [0.0, reward]])
