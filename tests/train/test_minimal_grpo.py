"""The loop in one file against the functions of the full trainer, and whole, on a tiny model with random weights."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

transformers = pytest.importorskip("transformers")

from agents.models.chat_tokenizer import ChatTokenizer  # noqa: E402
from atommem_env.env import AtomMemEnv  # noqa: E402
from atommem_env.errors import SettingError  # noqa: E402
from atommem_env.types import Observation, Reply, Rollout, StopReason, Turn  # noqa: E402
from train import advantages, losses, minimal_grpo, samples  # noqa: E402
from train.minimal_grpo import (  # noqa: E402
    MinimalGRPOConfig,
    SampledReply,
    Trajectory,
    add_gradients,
    group_advantages,
    grpo_loss,
    make_samples,
    play,
    sample_replies,
    token_logprobs,
    train,
)
from train.tiny_base import build_tokenizer  # noqa: E402

NEVER = -1  # a token id that no reply ends with


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of 2 layers with random weights that reads the words of the synthetic world."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def groups(folder: Path, model: Any) -> list[list[Trajectory]]:
    """Three groups of four trajectories of the real environment, with rewards made up, equal ones in the second."""
    options: dict[str, Any] = {"split": "train", "num_docs": 8, **minimal_grpo.TASK, **minimal_grpo.MEMORY}
    envs = [gym.make("AtomMem-Synthetic", **options) for _ in range(12)]
    torch.manual_seed(1)
    seeds = np.repeat([5, 6, 7], 4).tolist()
    trajectories = play(model, ChatTokenizer(folder), envs, seeds, max_new_tokens=6)
    rewards = [1.0, 0.0, 0.5, 0.0, 0.1, 0.1, 0.1, 0.1, 0.0, 0.0, 0.0, 1.0]
    for trajectory, reward in zip(trajectories, rewards, strict=True):
        assert trajectory.reward == 0  # of a model that knows nothing
        trajectory.reward = reward
    return [trajectories[:4], trajectories[4:8], trajectories[8:]]


def gradients(model: Any) -> list[Tensor]:
    found = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    return found


def as_rollout(trajectory: Trajectory) -> Rollout:
    """The same trajectory as the full trainer has it."""
    observation: Any = {}
    turns = tuple(
        Turn(observation, Reply("", *map(tuple, (reply.prompt_ids, reply.completion_ids, reply.logprobs))), results=())
        for reply in trajectory.replies
    )
    return Rollout("task", 0, turns, trajectory.reward, StopReason.ANSWERED)


def test_it_stays_a_file_to_read_that_stands_alone() -> None:
    source = Path(minimal_grpo.__file__).read_text(encoding="utf-8")
    assert len(source.splitlines()) < 250
    imports = [node.module or "" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in imports if name.split(".")[0] in ("train", "eval")]


# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_what_is_noted_in_sampling_is_what_the_trainer_computes(model: Any, positions: str) -> None:
    torch.manual_seed(2)
    if positions == "absolute":  # where a wrong offset shows
        config = transformers.GPT2Config(vocab_size=99, n_positions=32, n_embd=32, n_layer=2, n_head=2)
        model = transformers.GPT2LMHeadModel(config).eval()
        model.transformer.wpe.weight.data.normal_()
    replies = sample_replies(model, [[5], [6, 7, 8, 9, 10], [11, 12, 13]], eos_id=NEVER, max_new_tokens=9)
    noted = torch.tensor([logp for reply in replies for logp in reply.logprobs])
    assert len(noted) == 27
    torch.testing.assert_close(token_logprobs(model, replies), noted, atol=1e-4, rtol=0)


def test_a_reply_does_not_depend_on_the_prompts_beside_it(model: Any) -> None:
    prompts = [[5], [6, 7, 8, 9, 10, 20, 21], [11, 12, 13]]
    together = sample_replies(model, prompts, eos_id=NEVER, max_new_tokens=9, greedy=True)
    for prompt, reply in zip(prompts, together, strict=True):
        (alone,) = sample_replies(model, [prompt], eos_id=NEVER, max_new_tokens=9, greedy=True)
        assert alone.completion_ids == reply.completion_ids
        assert alone.logprobs == pytest.approx(reply.logprobs, abs=1e-4)


def test_a_reply_ends_with_its_first_end_token(model: Any) -> None:
    def sample(eos_id: int) -> list[SampledReply]:
        torch.manual_seed(3)
        return sample_replies(model, [[5], [6, 7], [8, 9, 10]], eos_id=eos_id, max_new_tokens=12)

    endless = sample(NEVER)
    assert [len(reply.completion_ids) for reply in endless] == [12, 12, 12]
    end = endless[1].completion_ids[3]
    for reply, longer in zip(sample(end), endless, strict=True):
        ids = longer.completion_ids
        length = ids.index(end) + 1 if end in ids else 12
        assert reply.completion_ids == ids[:length]
        assert reply.logprobs == longer.logprobs[:length]


def test_tokens_are_drawn_as_often_as_their_probability_says(model: Any) -> None:
    torch.manual_seed(4)
    drawn = [
        reply.completion_ids[0] for reply in sample_replies(model, [[5, 6]] * 4000, eos_id=NEVER, max_new_tokens=1)
    ]
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    likeliest = int(expected.argmax())
    share, probability = drawn.count(likeliest) / 4000, float(expected[likeliest])
    assert share == pytest.approx(probability, abs=4 * (probability * (1 - probability) / 4000) ** 0.5)


def test_the_rollouts_of_a_group_read_the_same_document(folder: Path, groups: list[list[Trajectory]]) -> None:
    chat = ChatTokenizer(folder)
    first_prompts = [{chat.text(trajectory.replies[0].prompt_ids) for trajectory in group} for group in groups]
    assert [len(texts) for texts in first_prompts] == [1, 1, 1]
    assert len(set.union(*first_prompts)) == 3
    assert all(len(trajectory.replies) > 4 for group in groups for trajectory in group)


# -------------------------------------------------------------------------------- the same mathematics as the full trainer


@given(st.lists(st.lists(st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 1.0]), min_size=3, max_size=3), min_size=1, max_size=4))
def test_the_advantages_are_those_of_the_full_trainer(rewards: list[list[float]]) -> None:
    expected = advantages.group_advantages(rewards)
    np.testing.assert_array_equal(group_advantages(np.array(rewards)), expected.advantages_P_G)


@given(st.lists(st.tuples(*[st.floats(-6, 0)] * 3, st.floats(-2, 2)), min_size=1, max_size=8))
def test_the_loss_is_that_of_the_full_trainer_where_it_clips_too(rows: list[tuple[float, ...]]) -> None:
    logp, old, sampler, advantage = torch.tensor(rows, dtype=torch.float64).unbind(1)
    logp.requires_grad_()
    ours = grpo_loss(logp, old, sampler, advantage, 10)
    full, _ = losses.grpo_loss(logp, old, sampler, advantage, total_tokens=10)
    torch.testing.assert_close(ours, full)
    torch.testing.assert_close(torch.autograd.grad(ours, logp), torch.autograd.grad(full, logp))


@pytest.mark.parametrize("micro_batch", [1000, 5])
def test_loss_and_gradients_are_those_of_the_full_trainer(
    groups: list[list[Trajectory]], model: Any, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for reply in (reply for group in groups for trajectory in group for reply in trajectory.replies):
        # A sampler that is somewhat off, so that the correction for it has something to do.
        reply.logprobs = [min(0.0, logp + float(rng.normal(0, 0.5))) for logp in reply.logprobs]
    monkeypatch.setattr(minimal_grpo, "MICRO_BATCH", micro_batch)
    ours = make_samples(groups)
    add_gradients(model, ours)
    our_gradients = gradients(model)
    replies, reply_advantages = zip(*ours, strict=True)
    logp = token_logprobs(model, replies)
    noted = torch.tensor([logp for reply in replies for logp in reply.logprobs])
    weights = torch.tensor([advantage for reply, advantage in ours for _ in reply.completion_ids])
    our_loss = grpo_loss(logp, logp.detach(), noted, weights, len(logp))

    rewards = [[trajectory.reward for trajectory in group] for group in groups]
    made = samples.make_samples(
        [list(map(as_rollout, group)) for group in groups], advantages.group_advantages(rewards)
    )
    assert [sample.token_ids for sample in made] == [
        tuple(reply.prompt_ids + reply.completion_ids) for reply in replies
    ]
    assert [sample.advantage for sample in made] == list(reply_advantages)
    batch = samples.collate([[sample] for sample in made])
    mask = torch.from_numpy(batch.loss_mask_B_T)
    logits = model(torch.from_numpy(batch.token_ids_B_T), torch.from_numpy(batch.attention_mask_B_T)).logits[mask]
    full_logp = losses.token_logprobs(logits, torch.from_numpy(batch.targets_B_T)[mask])
    full_loss, parts = losses.grpo_loss(
        full_logp,
        full_logp.detach(),
        torch.from_numpy(batch.logprobs_B_T)[mask],
        torch.from_numpy(batch.advantages_B_T)[mask],
        total_tokens=int(mask.sum()),
    )
    full_loss.backward()
    assert abs(float(parts["importance_weight"]) - 1) > 0.01
    torch.testing.assert_close(our_loss, full_loss, atol=1e-6, rtol=0)
    torch.testing.assert_close(our_gradients, gradients(model), atol=1e-6, rtol=0)
    assert max(float(gradient.abs().max()) for gradient in our_gradients) > 1e-3


def test_an_advantage_of_zero_has_a_gradient_of_exactly_zero(groups: list[list[Trajectory]], model: Any) -> None:
    add_gradients(model, [(reply, 0.0) for reply in groups[0][0].replies])
    assert all((gradient == 0).all() for gradient in gradients(model))


# -------------------------------------------------------------------------------------------------------------- the loop


class LowercaseEnv(AtomMemEnv):
    """Pays for words without a capital letter, in any reply: what a model that knows nothing can learn in a few updates."""

    def step(self, action: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        observation, _, terminated, truncated, info = super().step(action)
        assert self.episode is not None
        self.said: list[str] = (self.said if self.episode.steps > 1 else []) + action.split()
        reward = sum(word.islower() for word in self.said) / max(len(self.said), 1)
        return observation, reward if terminated or truncated else 0.0, terminated, truncated, info


@pytest.fixture
def lowercase() -> Iterator[str]:
    gym.register("AtomMemLowercase-v0", entry_point=LowercaseEnv, kwargs={"source": "synthetic"})
    yield "AtomMemLowercase-v0"
    del gym.registry["AtomMemLowercase-v0"]


def small(folder: Path, **changes: Any) -> MinimalGRPOConfig:
    options: dict[str, Any] = {"groups": 2, "group_size": 4, "num_docs": 4, "max_new_tokens": 6, "eval_episodes": 4}
    return MinimalGRPOConfig(model=folder, **options | changes)


def numbers(text: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"{name} (\S+)", text)]


def test_the_loop_learns_and_its_model_can_be_loaded(
    folder: Path, lowercase: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small(folder, env_id=lowercase, out=tmp_path / "model", steps=8, group_size=8, learning_rate=3e-2))
    printed = capsys.readouterr().out
    rewards = numbers(printed, r"(?m)^step .*reward")
    assert len(rewards) == 8
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.2
    assert max(numbers(printed, "gap")) < 1e-4
    before, after = numbers(printed, "held-out reward")
    assert after > before
    ChatTokenizer(tmp_path / "model")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_each_update_is_of_its_own_rollouts_alone(
    folder: Path, model: Any, lowercase: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Played again beside the loop, with weights that hardly move."""
    train(small(folder, env_id=lowercase, steps=2, learning_rate=1e-12))
    printed = numbers(capsys.readouterr().out, "gradient")
    options: dict[str, Any] = {"split": "train", "num_docs": 4, **minimal_grpo.TASK, **minimal_grpo.MEMORY}
    envs = [gym.make(lowercase, **options) for _ in range(8)]
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    for gradient in printed:
        seeds = np.repeat(rng.integers(2**31, size=2), 4).tolist()
        trajectories = play(model, ChatTokenizer(folder), envs, seeds, max_new_tokens=6)
        add_gradients(model, make_samples([trajectories[:4], trajectories[4:]]))
        expected = sum(float((part**2).sum()) for part in gradients(model)) ** 0.5
        assert gradient == pytest.approx(expected, abs=1e-3)
    assert len(printed) == 2


def test_the_same_seed_trains_the_same_model(
    folder: Path, lowercase: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def weights(name: str, seed: int) -> list[Tensor]:
        train(small(folder, env_id=lowercase, out=tmp_path / name, steps=1, seed=seed))
        return list(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).parameters())

    first, again, other = weights("first", 0), weights("again", 0), weights("other", 1)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_equal_rewards_leave_the_weights_as_they_are(
    folder: Path, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small(folder, out=tmp_path / "model", steps=2))  # random weights answer nothing: every reward is 0
    printed = capsys.readouterr().out
    assert numbers(printed, r"(?m)^step .*reward") == [0.0, 0.0]
    assert "gradient" not in printed
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(map(torch.equal, model.parameters(), after.parameters()))


@pytest.mark.parametrize("changes", [{"group_size": 1}, {"eval_every": 0}])
def test_what_cannot_work_is_rejected_at_once(folder: Path, changes: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=next(iter(changes))):
        train(small(folder, **changes))
