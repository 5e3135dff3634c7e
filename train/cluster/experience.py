"""From the rollouts of a step to what OpenRLHF trains on: an Experience of every turn, and one update of all of them.

A padding sample fills the batch up to a multiple of the data-parallel ranks. It has one trained token, of advantage 0, because a
micro-batch without any would divide by zero; so it weighs one token in the loss's mean. They are counted (`padding_samples`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.replay_buffer import NaiveReplayBuffer

from atommem_env.types import Rollout
from train.advantages import GroupAdvantages, group_advantages
from train.cluster.recipe import ClusterGRPOConfig, read_run
from train.metrics import policy_metrics, training_rewards
from train.samples import Sample, SampleKey, make_samples

_PADDING = ""  # the label of a padding sample


def step_advantages(rollouts_P_G: Sequence[Sequence[Rollout | None]], run: ClusterGRPOConfig) -> GroupAdvantages:
    """The advantages of a step, exactly as `train.grpo` has them."""
    return group_advantages(training_rewards(rollouts_P_G, run.fault_penalty), divide_by_std=run.divide_by_std)


def sample_experience(sample: Sample, reward: float) -> Experience:
    """A sample as an Experience of one row: sequences [1, T], and [1, T - 1] where it is about the targets."""
    length = len(sample.token_ids)
    action_mask = torch.zeros(1, length - 1, dtype=torch.long)
    logprobs = torch.zeros(1, length - 1)
    positions = torch.cat([torch.arange(first - 1, last - 1) for first, last in sample.trained])
    action_mask[0, positions] = 1
    logprobs[0, positions] = torch.tensor(sample.logprobs)
    return Experience(
        sequences=torch.tensor([sample.token_ids]),
        attention_mask=torch.ones(1, length, dtype=torch.long),
        action_mask=action_mask,
        rollout_log_probs=logprobs,
        prompts=[""],
        labels=[json.dumps(sample.key)],  # comes back from the trainer as proof of having been trained on
        images=[None],
        mm_train_inputs=[None],
        rewards=torch.tensor([reward]),
        scores=torch.tensor([reward]),
        response_length=torch.tensor([sample.trained_tokens]),
        truncated=torch.tensor([False]),
        total_length=torch.tensor([float(length)]),
        info={"reward": torch.tensor([reward])},
    )


def padding_sample(experience: Experience) -> Experience:
    """A copy with one trained token; it is given advantage 0."""
    padding = copy.deepcopy(experience)
    first = int(padding.action_mask[0].argmax())
    padding.action_mask.zero_()
    padding.action_mask[0, first] = 1
    padding.labels = [_PADDING]
    return padding


class ExperienceMaker(RemoteExperienceMaker):
    """Makes what is trained on: an Experience of every turn, with the advantage of its rollout."""

    samples: list[Sample]  # of the step
    stats: dict[str, Any]

    def prepare(self, rollout_samples: Sequence[Experience]) -> list[Sample]:
        """The samples of a step, from its Experiences of one rollout each; there may be none to learn from."""
        run = read_run()
        rollouts = [experience.rollout for experience in rollout_samples]
        rollouts_P_G = [rollouts[start : start + run.group_size] for start in range(0, len(rollouts), run.group_size)]
        advantages = step_advantages(rollouts_P_G, run)
        self.samples = make_samples(rollouts_P_G, advantages)
        self._rewards = {
            (group, index): rollout.reward
            for group, row in enumerate(rollouts_P_G)
            for index, rollout in enumerate(row)
        }
        self.stats = {
            "reward": fmean(rollout.reward for rollout in rollouts),
            "groups_active": advantages.active_groups,
            "groups_zero_variance": advantages.zero_variance_groups,
            **getattr(rollout_samples[0], "generation", {}),
            **policy_metrics(rollouts),
            "samples": len(self.samples),
            "trained_tokens": sum(sample.trained_tokens for sample in self.samples),
            "padding_samples": -len(self.samples) % ranks(self.args),
        }
        return self.samples

    def make_experience_batch(self, rollout_samples: Sequence[Experience]) -> list[Experience]:
        """The Experiences of the samples that `prepare` made, in batches as the actors compute them."""
        rows = [sample_experience(sample, self._rewards[sample.key[:2]]) for sample in self.samples]
        shortest = min(rows, key=lambda row: row.total_length.item())
        rows += [padding_sample(shortest) for _ in range(self.stats["padding_samples"])]
        # By index in `rows`, which is what the parent class puts into `Experience.index`.
        self._advantages = torch.tensor(
            [sample.advantage for sample in self.samples] + [0.0] * self.stats["padding_samples"]
        )
        experiences: list[Experience] = super().make_experience_batch(rows)
        return experiences

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[Experience]) -> list[Experience]:
        """Gives each row the advantage of its rollout, on every trained token; KL, if any, is a part of the loss."""
        for experience in experiences:
            advantages = self._advantages[experience.index][:, None] * experience.action_mask
            experience.advantages, experience.returns = advantages, advantages.clone()
            experience.info["return"] = self._advantages[experience.index]
            experience.kl = None
        return experiences


def ranks(args: Any) -> int:
    """How many data-parallel ranks train."""
    gpus = args.actor.num_nodes * args.actor.num_gpus_per_node
    return int(gpus // args.ds.ring_attn_size // args.ds.tensor_parallel_size)


class ReplayBuffer(NaiveReplayBuffer):
    """One optimizer step over all samples, in micro-batches by length; remembers what was taken out to be trained on."""

    taken: list[str]

    def setup_dynamic_batch(self, strategy: Any) -> None:
        """Divides the samples into micro-batches, as if the sizes of rollouts and batch were those of the samples."""
        args, world = strategy.args, strategy.ds_device_mesh["dp"].size()
        count = len(self.items) * world
        counted = SimpleNamespace(
            train=SimpleNamespace(**{**vars(args.train), "batch_size": count}),
            rollout=SimpleNamespace(**{**vars(args.rollout), "batch_size": count, "n_samples_per_prompt": 1}),
            ds=args.ds,
            actor=args.actor,
        )
        self.taken = []
        super().setup_dynamic_batch(
            SimpleNamespace(args=counted, ds_device_mesh=strategy.ds_device_mesh, all_reduce=strategy.all_reduce)
        )

    def __getitem__(self, index: int) -> Any:
        items = super().__getitem__(index)
        self.taken += [item.labels[0] for item in items]
        return items


def trained_keys(labels: Iterable[str]) -> list[SampleKey]:
    """The keys of the samples that were trained on, padding samples left out.

    >>> trained_keys(["[0, 1, 2]", ""])
    [(0, 1, 2)]
    """
    return [tuple(json.loads(label)) for label in labels if label != _PADDING]
