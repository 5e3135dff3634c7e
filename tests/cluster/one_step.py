"""One step of both trainers on the same rollouts, in float32; prints what came of it as JSON. Run by `test_one_step.py`."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openrlhf.utils
import torch
from openrlhf.trainer.ppo_utils.experience import balance_experiences
from transformers import AutoModelForCausalLM

from agents.models.chat_tokenizer import ChatTokenizer
from agents.models.find import find_model
from atommem_env.types import Message, Reply
from train.cluster import experience
from train.cluster.executor import response
from train.cluster.extension import Generator, PolicyActor
from train.cluster.recipe import ClusterGRPOConfig, Prompt, openrlhf_flags, read_recipe
from train.grpo import Trainer
from train.samples import make_samples
from train.settings import GRPOConfig, LocalGRPOConfig


class Parsed(Exception):
    """Carries OpenRLHF's parsed arguments out of its command line, before it starts anything."""


def parsed(flags: list[str]) -> Any:
    real = openrlhf.utils.get_strategy

    def stop(args: Any) -> None:
        raise Parsed(args)

    openrlhf.utils.get_strategy = stop
    sys.argv = ["train_ppo_ray", *flags]
    try:
        runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)
    except Parsed as parsed:
        return parsed.args[0]
    finally:
        openrlhf.utils.get_strategy = real
    raise AssertionError("unreachable")


class PlainModel:
    """Samples by transformers' own `generate`: the version that OpenRLHF pins is older than the one our engine is written for."""

    name = "plain"

    def __init__(self, model: Any, chat: ChatTokenizer) -> None:
        self.model, self.chat = model, chat

    async def complete(
        self, messages: Sequence[Message], *, max_new_tokens: int, temperature: float, thinking: bool, seed: int
    ) -> Reply:
        prompt = self.chat.prompt_ids(messages, thinking)
        torch.manual_seed(seed)
        done = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        ids = done.sequences[0, len(prompt) :].tolist()
        logprobs = [float(scores[0].log_softmax(-1)[token]) for token, scores in zip(ids, done.scores, strict=True)]
        return Reply(self.chat.text(ids), tuple(prompt), tuple(ids), tuple(logprobs))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def main(folder: Path, zero_stage: int) -> None:
    recipe = read_recipe(str(Path(__file__).with_name("tiny.toml")))
    changes = {"out": folder / "cluster", "gpus_per_node": 2, "zero_stage": zero_stage, "eval_every": 0}
    run: ClusterGRPOConfig = dataclasses.replace(recipe, **changes)  # its micro_batch_tokens make three micro-batches
    shared = {field.name: getattr(run, field.name) for field in dataclasses.fields(GRPOConfig)}
    trainer = Trainer(LocalGRPOConfig(**shared | {"out": folder / "local"}))
    trainer.sampler = PlainModel(AutoModelForCausalLM.from_pretrained(find_model(run.model)), trainer.chat)
    before = weights(trainer.model)

    # One machine.
    groups = trainer.play_groups()
    advantages = experience.step_advantages(groups, run)
    local = trainer.update(make_samples(groups, advantages))

    # OpenRLHF: the same rollouts from the generator's hands on, to the actor's update; Ray, which would carry them, is left out.
    experience.read_run = lambda: run
    args = parsed(openrlhf_flags(run, find_model(run.model)))
    generator = Generator.__new__(Generator)
    experiences = [
        generator._experience(
            response(Prompt("train", position, trainer.specs[position]).text(), rollout), {"max_len": run.max_tokens}
        )
        for position, group in enumerate(groups)
        for rollout in group
    ]
    actor = PolicyActor(1, 0, "127.0.0.1", None)
    actor.init_model_from_pretrained(openrlhf.utils.get_strategy(args), str(find_model(run.model)), run.steps, None)
    maker = experience.ExperienceMaker(
        None, None, None, None, SimpleNamespace(value=0.0), SimpleNamespace(args=args), actor.tokenizer
    )

    def forward(samples: list[Any]) -> list[Any]:
        for sample in samples:
            sample.action_log_probs = actor.forward(sample.sequences, sample.action_mask, sample.attention_mask)
            sample.info["kl"] = sample.info["logprobs_diff"] = torch.zeros(len(sample.sequences))
        return samples

    maker.make_experience = forward
    maker.prepare(experiences)
    (batch,) = balance_experiences(maker.make_experience_batch(experiences), args)
    actor.append(batch)
    status = actor.fit(kl_ctl=0.0)
    after, theirs = weights(trainer.model), weights(actor.actor.model.module)
    moved, apart = (
        float(torch.cat([(after[name] - other[name]).abs().flatten() for name in after]).mean())
        for other in (before, theirs)
    )
    print(
        json.dumps(
            {
                "samples": len(maker.samples),
                "trained": len(experience.trained_keys(actor.trained_labels())),
                "grad_norms": [local["grad_norm"], status["actor_grad_norm"]],
                "policy_losses": [local["policy_loss"], status["policy_loss"]],
                "sampler_kl": status["vllm_kl"],
                "moved": moved,
                "apart": apart,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
