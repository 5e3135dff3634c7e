"""Samples hold each sampled token once, in the very context it was sampled in; batches keep all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atommem_env.errors import DataError, SamplesMismatch, SettingError
from atommem_env.types import Observation, Reply, Rollout, StopReason, Turn
from train.advantages import group_advantages
from train.packing import pack_samples
from train.samples import Sample, check_all_trained, collate, make_samples, rollout_samples

OBSERVATION: Observation = {
    "phase": "read",
    "questions": "",
    "question": "",
    "chunk": "",
    "scratchpad": "",
    "query": "",
    "retrieved": "",
    "notice": "",
    "step": 0,
    "steps_left": 1,
}


def rollout(*calls: tuple[list[int], list[int]], reward: float = 0.0) -> Rollout:
    """A rollout of model calls (prompt, completion); token t has the log-probability -t / 8."""
    replies = (Reply("", tuple(prompt), tuple(done), tuple(-token / 8 for token in done)) for prompt, done in calls)
    turns = tuple(Turn(OBSERVATION, reply, ()) for reply in replies)
    return Rollout("hand/1", 7, turns, reward, StopReason.ANSWERED)


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=3)


@st.composite
def rollouts(draw: st.DrawFn, rewards: tuple[float, ...] = (0.0,)) -> Rollout:
    """Calls of which some continue the one before and others nearly do; the alphabet is small, so some do by chance."""
    calls = [(draw(TOKENS), draw(TOKENS))]
    for _ in range(draw(st.integers(0, 4))):
        full = calls[-1][0] + calls[-1][1]
        more = draw(st.lists(st.integers(0, 2), max_size=2))
        prompt = draw(st.sampled_from([full + more, full[:-1] or [0], [*full[:-1], 2 - full[-1], *more], draw(TOKENS)]))
        calls.append((prompt, draw(TOKENS)))
    return rollout(*calls, reward=draw(st.sampled_from(rewards)))


def test_calls_are_samples_of_their_own_unless_one_continues_the_other() -> None:
    played = rollout(([1, 2], [3, 4]), ([1, 2, 3, 4, 5], [6]), ([1, 2, 7], [8]))
    assert rollout_samples(played, 0.5, group=3, index=1) == [
        Sample((1, 2, 3, 4, 5, 6), ((2, 4), (5, 6)), (-3 / 8, -4 / 8, -6 / 8), 0.5, 3, 1, (0, 1)),
        Sample((1, 2, 7, 8), ((3, 4),), (-1.0,), 0.5, 3, 1, (2,)),
    ]


@given(rollouts())
def test_merging_happens_at_exact_prefixes_only_and_loses_nothing(played: Rollout) -> None:
    samples = rollout_samples(played, 1.0)
    assert [turn for sample in samples for turn in sample.turns] == list(range(len(played.turns)))
    home = {turn: number for number, sample in enumerate(samples) for turn in sample.turns}
    for sample in samples:
        assert sample.trained_tokens == sum(last - first for first, last in sample.trained)
        logprobs: list[float] = []
        for turn, (first, last) in zip(sample.turns, sample.trained, strict=True):
            reply = played.turns[turn].reply
            assert sample.token_ids[:first] == reply.prompt_ids  # all that the policy saw, and nothing else
            assert sample.token_ids[first:last] == reply.completion_ids
            logprobs += reply.logprobs
        assert list(sample.logprobs) == logprobs
        assert last == len(sample.token_ids)
    for turn in range(1, len(played.turns)):
        before, after = played.turns[turn - 1].reply, played.turns[turn].reply
        text, prompt = (
            " ".join(map(str, ids)) for ids in (before.prompt_ids + before.completion_ids, after.prompt_ids)
        )
        assert (home[turn] == home[turn - 1]) == prompt.startswith(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": ()}, "got 0 and 1 in turn 1 of rollout 2 of group 5 "),
        ({"completion_ids": (), "logprobs": ()}, "got 1 and 0 in turn 1"),
        ({"logprobs": ()}, "got 0, 0 of them finite, in turn 1"),
    ],
)
def test_a_turn_that_cannot_be_trained_on_is_named(change: dict[str, Any], message: str) -> None:
    first, second = rollout(([1], [2]), ([3], [4])).turns
    played = replace(rollout(([1], [2])), turns=(first, replace(second, reply=replace(second.reply, **change))))
    with pytest.raises(DataError, match=message):
        rollout_samples(played, 0.0, group=5, index=2)


def test_a_rollout_without_turns_is_rejected() -> None:
    with pytest.raises(DataError, match="at least one turn"):
        rollout_samples(rollout(), 0.0)


@given(st.data(), st.integers(2, 4), st.integers(1, 4))
def test_samples_made_are_samples_trained_with_failures_injected(data: st.DataObject, size: int, problems: int) -> None:
    played = [
        [data.draw(st.one_of(st.none(), rollouts((0.0, 0.5, 1.0)))) for _ in range(size)] for _ in range(problems)
    ]
    rewards = [[None if one is None else one.reward for one in group] for group in played]
    groups = group_advantages(rewards)
    made = make_samples(played, groups)

    active = [group for group in played if None not in group and len({one.reward for one in group if one}) > 1]
    turns = [turn for group in active for one in group if one for turn in one.turns]
    assert groups.active_groups == len(active)
    assert sum(len(sample.turns) for sample in made) == len(turns)
    assert sum(sample.trained_tokens for sample in made) == sum(len(turn.reply.completion_ids) for turn in turns)
    for sample in made:  # every token of every turn of a rollout has the rollout's advantage
        group = [float(reward or 0) for reward in rewards[sample.group]]
        assert sample.advantage == pytest.approx(group[sample.rollout] - sum(group) / size)

    budget = data.draw(st.integers(30, 60))  # the longest sample has 27 tokens
    batches = pack_samples(made, budget)
    assert all(batch.tokens <= budget for batch in batches)
    assert sum(len(batch.targets_N) for batch in batches) == sum(sample.trained_tokens for sample in made)
    trained = [key for batch in batches for key in batch.keys]
    check_all_trained(made, trained)
    if trained:
        with pytest.raises(SamplesMismatch, match="1 left out"):
            check_all_trained(made, trained[1:])
        with pytest.raises(SamplesMismatch, match="1 too many"):
            check_all_trained(made, [*trained, trained[0]])
        with pytest.raises(SamplesMismatch, match=r"1 left out .* 1 too many"):
            check_all_trained(made, [*trained[1:], (99, 0, 0)])


def test_advantages_of_other_rollouts_are_rejected() -> None:
    groups = group_advantages([[1.0, 0.0]])
    with pytest.raises(SettingError, match=r"got groups of sizes \[3\]"):
        make_samples([[rollout(([1], [2]))] * 3], groups)
    with pytest.raises(SettingError, match=r"lost rollouts in \[0\]"):
        make_samples([[rollout(([1], [2])), None]], groups)


@given(st.lists(rollouts(), min_size=1, max_size=4), st.booleans())
def test_batches_shift_each_sample_on_its_own(played: list[Rollout], packed: bool) -> None:
    samples = [sample for index, one in enumerate(played) for sample in rollout_samples(one, index + 1.0, index=index)]
    batch = collate([samples] if packed else [[sample] for sample in samples], pad_id=9)
    seen = []  # (row, column, sample, position) of every place, found by walking along
    for number, sample in enumerate(samples):
        row, start = (0, sum(len(other.token_ids) for other in samples[:number])) if packed else (number, 0)
        seen += [(row, start + place, sample, place) for place in range(len(sample.token_ids))]
    empty = np.ones(batch.token_ids_B_T.shape, dtype=bool)
    for row, column, sample, place in seen:
        empty[row, column] = False
        target = place + 1
        sampled = [token for first, last in sample.trained for token in range(first, last)]
        assert batch.token_ids_B_T[row, column] == sample.token_ids[place]
        assert batch.position_ids_B_T[row, column] == place
        assert batch.attention_mask_B_T[row, column] == 1
        assert batch.targets_B_T[row, column] == (sample.token_ids[target] if target < len(sample.token_ids) else 0)
        assert batch.loss_mask_B_T[row, column] == (target in sampled)
        if target in sampled:
            assert batch.logprobs_B_T[row, column] == -sample.token_ids[target] / 8
            assert batch.advantages_B_T[row, column] == sample.advantage
    assert (batch.token_ids_B_T[empty] == 9).all()
    for array in (batch.attention_mask_B_T, batch.loss_mask_B_T, batch.logprobs_B_T, batch.advantages_B_T):
        assert not array[empty].any()
    assert not batch.logprobs_B_T[~batch.loss_mask_B_T].any()
    assert not batch.advantages_B_T[~batch.loss_mask_B_T].any()


@pytest.mark.parametrize("rows", [[], [[]]])
def test_a_batch_of_nothing_is_rejected(rows: list[list[Sample]]) -> None:
    with pytest.raises(SettingError, match="at least one sample"):
        collate(rows)
