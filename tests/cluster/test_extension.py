"""What becomes of rollouts on the way into OpenRLHF, without Ray and without a model."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from openrlhf.trainer.ppo_utils.experience import balance_experiences  # noqa: E402

from agents.rollout import EpisodeSpec  # noqa: E402
from atommem_env.errors import SamplesMismatch  # noqa: E402
from atommem_env.types import Reply, Rollout, StopReason, Turn  # noqa: E402
from eval.run_folder import read_jsonl  # noqa: E402
from train.advantages import group_advantages  # noqa: E402
from train.cluster import experience, extension  # noqa: E402
from train.cluster.executor import response  # noqa: E402
from train.cluster.experience import ExperienceMaker, trained_keys  # noqa: E402
from train.cluster.extension import Generator  # noqa: E402
from train.cluster.recipe import REPLACEMENTS, ClusterGRPOConfig, Prompt, write_prompts  # noqa: E402
from train.samples import check_all_trained  # noqa: E402

REWARDS = [[1.0, 0.0, 0.0], [0.25, 1.0, 0.5], [1.0, 1.0, 1.0]]  # the last group has no variance
TURNS = [[3, 1, 2], [5, 1, 4], [2, 2, 2]]


@pytest.fixture
def run(recipe: ClusterGRPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterGRPOConfig:
    made = dataclasses.replace(recipe, out=tmp_path, groups=3, group_size=3, fault_penalty=0.0)
    monkeypatch.setattr(experience, "read_run", lambda: made)
    return made


def rollout(reward: float, turns: int, name: int) -> Rollout:
    """Turn t of rollout `name` has the ids name, t, … and a reply of t + 1 tokens."""
    replies = [
        Reply("", (100 + name, 50 + t, 7), tuple(range(10, 11 + t)), tuple(-0.1 * (t + 1) for _ in range(t + 1)))
        for t in range(turns)
    ]
    seen: Any = {}
    return Rollout("task", 0, tuple(Turn(seen, reply, ()) for reply in replies), reward, StopReason.ANSWERED)


def arguments(ranks: int) -> SimpleNamespace:
    return SimpleNamespace(
        algo=SimpleNamespace(advantage=SimpleNamespace(estimator="dr_grpo"), kl=SimpleNamespace(use_loss=False)),
        actor=SimpleNamespace(num_nodes=1, num_gpus_per_node=ranks),
        ds=SimpleNamespace(ring_attn_size=1, tensor_parallel_size=1),
        rollout=SimpleNamespace(max_tokens_per_gpu=24, n_samples_per_prompt=3),
        train=SimpleNamespace(dynamic_batch_enable=True),
    )


def rollout_experiences(run: ClusterGRPOConfig) -> list[Any]:
    generator = Generator.__new__(Generator)
    options = {"max_len": 64}
    return [
        generator._experience(response(Prompt("train", position, EpisodeSpec(0, 0, 0)).text(), one), options)
        for position, (rewards, turns) in enumerate(zip(REWARDS, TURNS, strict=True))
        for one in [rollout(r, t, 3 * position + i) for i, (r, t) in enumerate(zip(rewards, turns, strict=True))]
    ]


def made(run: ClusterGRPOConfig, ranks: int) -> tuple[ExperienceMaker, list[Any]]:
    maker = ExperienceMaker(
        None, None, None, None, SimpleNamespace(value=0.0), SimpleNamespace(args=arguments(ranks)), None
    )
    maker.tokenizer = SimpleNamespace(pad_token_id=0)

    def forward(samples: list[Any]) -> list[Any]:  # what the models add, zeros here
        for sample in samples:
            sample.action_log_probs = sample.kl = torch.zeros(sample.action_mask.shape)
            sample.info["kl"] = sample.info["logprobs_diff"] = torch.zeros(len(sample.sequences))
        return samples

    maker.make_experience = forward
    before = rollout_experiences(run)
    maker.prepare(before)
    return maker, maker.make_experience_batch(before)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_turn_of_an_active_group_is_trained_on_once_with_its_rollout_s_advantage(
    run: ClusterGRPOConfig, ranks: int
) -> None:
    maker, experiences = made(run, ranks)
    expected = group_advantages(REWARDS).advantages_P_G
    per_rank = balance_experiences(experiences, arguments(ranks))
    assert len(per_rank) == ranks
    assert len({len(batch.sequences) for batch in per_rank}) == 1
    labels = list(itertools.chain.from_iterable(batch.labels for batch in per_rank))
    check_all_trained(maker.samples, trained_keys(labels))
    turns = sum(sum(row) for row in TURNS[:2])
    assert len(maker.samples) == turns == 16
    assert (maker.stats["samples"], maker.stats["padding_samples"]) == (turns, -turns % ranks)
    for batch in per_rank:
        for row, label in enumerate(batch.labels):
            mask, advantages = batch.action_mask[row].bool(), batch.advantages[row]
            assert not advantages[~mask].any()
            if not label:
                assert mask.sum() == 1
                assert advantages[mask] == 0
                continue
            ((group, index, turn),) = trained_keys([label])
            assert batch.sequences[row, :2].tolist() == [100 + 3 * group + index, 50 + turn]
            assert mask.sum() == turn + 1
            np.testing.assert_allclose(advantages[mask], expected[group, index], atol=1e-7)
            np.testing.assert_allclose(batch.rollout_log_probs[row][mask], -0.1 * (turn + 1), atol=1e-6)


def test_a_sample_that_a_rank_left_out_is_noticed(run: ClusterGRPOConfig) -> None:
    maker, experiences = made(run, 2)
    labels = [label for experience in experiences for label in experience.labels]
    with pytest.raises(SamplesMismatch, match="1 left out"):
        check_all_trained(maker.samples, trained_keys(labels[1:]))


def test_the_stats_of_a_step(run: ClusterGRPOConfig) -> None:
    maker, _ = made(run, 2)
    assert maker.stats["groups_active"] == 2
    assert maker.stats["groups_zero_variance"] == 1
    assert maker.stats["turns"] == pytest.approx(sum(map(sum, TURNS)) / 9)
    assert maker.stats["reward"] == pytest.approx(np.mean(REWARDS))


def test_each_prompt_has_replacements_of_its_own(run: ClusterGRPOConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    write_prompts(run, 1000, 1000)
    monkeypatch.setattr(extension, "read_run", lambda: run)
    generator = Generator.__new__(Generator)
    prompts = [line["prompt"] for line in read_jsonl(run.out / "prompts.jsonl")]
    assert len(prompts) == run.steps * run.groups
    chains = []
    for prompt in prompts:
        chain = [prompt]
        while (replacement := generator._replacement(chain[-1])) is not None:
            assert Prompt.of(replacement).position == Prompt.of(prompt).position
            chain.append(replacement)
        assert len(chain) == 1 + REPLACEMENTS
        chains += chain
    assert len(set(chains)) == len(chains)
