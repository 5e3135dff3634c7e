"""Policies that must score near zero."""

from __future__ import annotations

import numpy as np
import pytest
from playing import SPECS, make_driver, mean_reward, play

from atommem_env.types import Fault


def test_silence_earns_nothing() -> None:
    assert mean_reward(play("silent")) == 0.0


def test_a_constant_earns_its_share_of_the_golds_and_no_more() -> None:
    source = make_driver().source
    golds = [source.task(spec.index, spec.task_seed).questions[0].answers for spec in SPECS]
    share = np.mean(["unknown" in answers for answers in golds])
    assert mean_reward(play("constant=unknown")) == pytest.approx(share)


@pytest.mark.parametrize("policy", ["random", "spam"])
def test_noise_earns_no_more_than_abstaining_always(policy: str) -> None:
    assert mean_reward(play(policy)) <= mean_reward(play("constant=unknown")) + 0.05


def test_spam_floods_and_is_notified() -> None:
    rollout = play("spam", SPECS[:1])[0]
    seen = {result.fault for turn in rollout.turns for result in turn.results}
    assert {Fault.SUPERSEDED, Fault.OUT_OF_PHASE} <= seen
