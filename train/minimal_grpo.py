"""GRPO on AtomMem in one file, to be read from top to bottom.

    python -m train.minimal_grpo --model agents/models/tiny

A language model reads a document chunk by chunk, stores what it likes in a small memory, answers a question from what it
stored, and is rewarded if the answer is right. Nobody says what to store. A step of the training

    1. plays P tasks, G times each     the trajectories of a group differ, because replies are sampled
    2. compares within each group      was a trajectory better than the mean of its task's G trajectories, or worse?
    3. updates the weights, once       each token of a better trajectory becomes more likely, of a worse one less

This is GRPO (DeepSeekMath, arXiv 2402.03300) with the settings of AtomMem (arXiv 2601.08323): on-policy, no division by
the group's standard deviation, clipping at 0.2 and 0.28, no KL term. Tests hold the mathematics to those of
`train/grpo.py`. What is left out here is there: replies that join and leave a running batch, beginnings that prompts
share computed once, LoRA, bfloat16, schedules, KL, lost trajectories, logs, keeping the best model, and resuming.

Names of arrays end in their axes: P tasks, G trajectories of each, B rows, T positions, V the vocabulary, N sampled tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import atommem_env  # noqa: F401  (registers the environments)
from agents.models.chat_tokenizer import ChatTokenizer
from atommem_env.errors import SettingError
from atommem_env.prompts import get_layout

# Short documents, most of them beside the point, and a memory with too little room: what to store is the problem.
TASK: dict[str, Any] = {"hops": (1, 2), "corrections": 0.0, "unanswerable": 0.0}  # one or two facts answer a question
MEMORY: dict[str, Any] = {"chunk_tokens": 48, "capacity": 4, "top_k": 3, "scratchpad": False, "durability": "off"}
LAYOUT = "terse"  # how an observation is written as a prompt
CLIP_LOW, CLIP_HIGH = 0.2, 0.28  # how much less, or more, likely a token may become in one step
IMPORTANCE_CAP = 2.0  # most that a token counts for the sampler's rounding
MAX_GRAD_NORM = 1.0  # a longer gradient is scaled down to this length
MICRO_BATCH = 64  # replies computed at the same time; changes memory and speed only


@dataclass(frozen=True, kw_only=True)
class MinimalGRPOConfig:
    """Train a small model by GRPO, in one file for reading; the full trainer is `atommem grpo`."""

    model: Path  # folder of a Hugging Face chat model that can already play
    out: Path | None = None  # folder for the trained model; without one it is not saved
    env_id: str = "AtomMem-Synthetic"  # environment; its other arguments stand at the top of the file
    num_docs: int = 8  # documents in each task
    steps: int = 200  # updates
    groups: int = 8  # tasks in a step
    group_size: int = 16  # trajectories of each task
    learning_rate: float = 2e-4  # for a million parameters; a billion want 1e-6
    max_new_tokens: int = 64  # of a reply; a longer one is truncated
    eval_every: int = 20  # steps between evaluations
    eval_episodes: int = 200  # held-out episodes of an evaluation
    seed: int = 0  # of the tasks and of what is sampled


# ---------------------------------------------------------------------------------------------------- 1. play


@dataclass
class SampledReply:
    """One reply, as the ids that were sampled: its text, made into ids again, might give others."""

    prompt_ids: list[int]
    completion_ids: list[int] = field(default_factory=list)  # with the token that ends a reply, unless it was truncated
    logprobs: list[float] = field(default_factory=list)  # of these, as they were sampled


@dataclass
class Trajectory:
    """One episode. Each reply has a prompt of its own: the model sees its memory, not its earlier replies."""

    replies: list[SampledReply] = field(default_factory=list)
    reward: float = 0.0


def play(
    model: PreTrainedModel, chat: ChatTokenizer, envs: Sequence[gym.Env], seeds: Sequence[int], **sampling: Any
) -> list[Trajectory]:
    """A trajectory in each environment, on the task that its seed draws, reply by reply; `sampling` as in `sample_replies`."""
    layout, settings = get_layout(LAYOUT), envs[0].get_wrapper_attr("settings")
    observations = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)]
    trajectories = [Trajectory() for _ in envs]
    running = list(range(len(envs)))
    while running:
        prompts = [chat.prompt_ids(layout(observations[index], settings)) for index in running]
        replies = sample_replies(model, prompts, eos_id=chat.backend.eos_token_id, **sampling)
        for index, reply in zip(tuple(running), replies, strict=True):
            trajectories[index].replies.append(reply)
            observations[index], reward, terminated, truncated, _ = envs[index].step(chat.text(reply.completion_ids))
            if terminated or truncated:
                trajectories[index].reward = float(reward)
                running.remove(index)
    return trajectories


@torch.no_grad()
def sample_replies(
    model: PreTrainedModel, prompts: Sequence[list[int]], *, eos_id: int, max_new_tokens: int, greedy: bool = False
) -> list[SampledReply]:
    """A reply to each prompt, drawn from the distribution that is trained: temperature 1, no token ruled out."""
    replies = [SampledReply(prompt) for prompt in prompts]
    # Padding goes to the left, so that in every row the next token follows the last column. It is never looked at.
    pads = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
    new_B_T = torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)]).to(model.device)
    seen_B_T = (torch.arange(new_B_T.shape[1]) >= torch.tensor(pads)[:, None]).long().to(model.device)
    cache = DynamicCache()  # keys and values of what was read: after the prompts, each pass reads one token a row
    for _ in range(max_new_tokens):
        positions_B_T = (seen_B_T.cumsum(-1) - 1).clamp(min=0)[:, -new_B_T.shape[1] :]
        inputs = {"input_ids": new_B_T, "attention_mask": seen_B_T, "position_ids": positions_B_T}
        logits_B_1_V = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        logp_B_V = logits_B_1_V[:, 0].float().log_softmax(-1)
        tokens_B_1 = logp_B_V.argmax(-1, keepdim=True) if greedy else logp_B_V.exp().multinomial(1)
        logp_B_1 = logp_B_V.gather(-1, tokens_B_1)
        for reply, token, logp in zip(replies, tokens_B_1[:, 0].tolist(), logp_B_1[:, 0].tolist(), strict=True):
            if eos_id not in reply.completion_ids:  # a reply that ended is computed on with the others, and ignored
                reply.completion_ids.append(token)
                reply.logprobs.append(logp)
        if all(eos_id in reply.completion_ids for reply in replies):
            break
        new_B_T, seen_B_T = tokens_B_1, torch.cat([seen_B_T, torch.ones_like(tokens_B_1)], dim=1)
    return replies


# ------------------------------------------------------------------------------------------------- 2. compare


def group_advantages(rewards_P_G: np.ndarray) -> np.ndarray:
    """[P, G] how much better each trajectory is than the mean of its group; 0 where all have the same reward.

    >>> group_advantages(np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])).tolist()
    [[0.5, -0.5, -0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]
    """
    same_P_1 = (rewards_P_G == rewards_P_G[:, :1]).all(axis=1, keepdims=True)  # the mean of three times 0.1 is not 0.1
    return np.where(same_P_1, 0.0, rewards_P_G - rewards_P_G.mean(axis=1, keepdims=True))


def make_samples(trajectories_P_G: Sequence[Sequence[Trajectory]]) -> list[tuple[SampledReply, float]]:
    """Every reply of every group whose rewards differ, with the advantage of its trajectory.

    Trajectories are compared, not replies: a mean over replies would lean towards the longest ones' rewards.
    """
    advantages_P_G = group_advantages(np.array([[one.reward for one in group] for group in trajectories_P_G]))
    return [
        (reply, advantage)
        for group, advantages_G in zip(trajectories_P_G, advantages_P_G, strict=True)
        if advantages_G.any()
        for trajectory, advantage in zip(group, advantages_G.tolist(), strict=True)
        for reply in trajectory.replies
    ]


# -------------------------------------------------------------------------------------------------- 3. update


def token_logprobs(model: PreTrainedModel, replies: Sequence[SampledReply]) -> Tensor:
    """[N] log-probabilities of the sampled tokens, one reply after the other, with gradient."""
    rows = [torch.tensor(reply.prompt_ids + reply.completion_ids) for reply in replies]
    sampled = [torch.arange(len(row)) >= len(reply.prompt_ids) for row, reply in zip(rows, replies, strict=True)]
    # Padding goes to the right, where no token looks: each sees only what is before it.
    ids_B_T = pad_sequence(rows, batch_first=True).to(model.device)
    sampled_B_T = pad_sequence(sampled, batch_first=True).to(model.device)
    # The logits at position t predict the token at t + 1.
    logits_N_V = model(input_ids=ids_B_T, use_cache=False).logits[:, :-1][sampled_B_T[:, 1:]]
    tokens_N = ids_B_T[:, 1:][sampled_B_T[:, 1:]]
    return logits_N_V.float().log_softmax(-1).gather(-1, tokens_N[:, None])[:, 0]


def grpo_loss(logp_N: Tensor, old_N: Tensor, sampler_N: Tensor, advantages_N: Tensor, total_tokens: int) -> Tensor:
    """What these tokens add to the loss: a mean over all `total_tokens` of the step, so that each weighs the same.

    Log-probabilities are `logp_N` under the weights being trained, `old_N` under those that the step began with, and
    `sampler_N` as noted in sampling: the old ones but for rounding, which `weight_N` makes up for.
    """
    ratio_N = (logp_N - old_N).exp()
    gain_N = torch.minimum(ratio_N * advantages_N, ratio_N.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages_N)
    weight_N = (old_N - sampler_N).exp().clamp(max=IMPORTANCE_CAP)
    return -(weight_N * gain_N).sum() / total_tokens


def add_gradients(model: PreTrainedModel, samples: Sequence[tuple[SampledReply, float]]) -> float:
    """Computes the gradient of the loss; returns the most that sampler and trainer differ by, which must be tiny."""
    total_tokens = sum(len(reply.completion_ids) for reply, _ in samples)
    samples = sorted(samples, key=lambda sample: len(sample[0].prompt_ids + sample[0].completion_ids))  # little padding
    gap = 0.0
    for start in range(0, len(samples), MICRO_BATCH):
        batch = samples[start : start + MICRO_BATCH]
        logp_N = token_logprobs(model, [reply for reply, _ in batch])
        sampler_N = logp_N.new_tensor([logp for reply, _ in batch for logp in reply.logprobs])
        advantages_N = logp_N.new_tensor([advantage for reply, advantage in batch for _ in reply.completion_ids])
        # With one update a step the old weights are these: the ratio is 1, and its gradient that of logp_N. The clip
        # would act from a second update on the same trajectories.
        grpo_loss(logp_N, logp_N.detach(), sampler_N, advantages_N, total_tokens).backward()
        gap = max(gap, (logp_N.detach() - sampler_N).abs().max().item())
    return gap


def train(run: MinimalGRPOConfig) -> None:
    """Plays, compares and updates `run.steps` times; prints a line for each, and one for each evaluation."""
    if run.group_size < 2 or run.eval_every < 1:
        raise SettingError(f"group_size must be at least 2 and eval_every at least 1, got {run}.")
    torch.manual_seed(run.seed)
    rng = np.random.default_rng(run.seed)
    chat = ChatTokenizer(run.model)
    # In eval mode, as it is loaded: dropout would train another distribution than the one that was sampled.
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32, local_files_only=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    P, G = run.groups, run.group_size
    options = {"num_docs": run.num_docs, **TASK, **MEMORY}
    envs = [gym.make(run.env_id, split="train", **options) for _ in range(P * G)]
    held_out = [gym.make(run.env_id, split="dev", **options) for _ in range(run.eval_episodes)]
    for step in range(run.steps + 1):
        if step % run.eval_every == 0 or step == run.steps:  # greedily, and always on the same tasks
            played = play(model, chat, held_out, range(len(held_out)), max_new_tokens=run.max_new_tokens, greedy=True)
            print(f"held-out reward {np.mean([trajectory.reward for trajectory in played]):.3f}", flush=True)
        if step == run.steps:
            break
        started = time.perf_counter()
        seeds = np.repeat(rng.integers(2**31, size=P), G).tolist()  # one seed, and so one task, for all of a group
        played = play(model, chat, envs, seeds, max_new_tokens=run.max_new_tokens)
        samples = make_samples([played[start : start + G] for start in range(0, P * G, G)])
        line = f"step {step + 1:4d}  reward {np.mean([trajectory.reward for trajectory in played]):.3f}"
        if samples:  # else every group has equal rewards, and AdamW would move the weights by its momentum alone
            gap = add_gradients(model, samples)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM, error_if_nonfinite=True)
            optimizer.step()
            optimizer.zero_grad()
            line += f"  replies {len(samples)}  gradient {norm:.3f}  gap {gap:.0e}"
        print(f"{line}  {time.perf_counter() - started:.1f} s", flush=True)
    if run.out is not None:
        model.save_pretrained(run.out)
        chat.backend.save_pretrained(run.out)


if __name__ == "__main__":
    train(tyro.cli(MinimalGRPOConfig))
