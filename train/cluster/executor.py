"""The agent that OpenRLHF has in every engine's actor: it plays the episode that a prompt names.

The episode is driven as everywhere else, by `agents.rollout.Driver`: one call of the engine a turn, on the token ids that
`ChatTokenizer` makes of the turn's messages; what is embedded shares its batches with all episodes of the actor.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from openrlhf.utils.agent import AgentExecutorBase

from agents.chat_policy import ChatPolicy, Sampling
from agents.models.chat_tokenizer import ChatTokenizer
from agents.models.find import find_model
from agents.models.vllm_model import reply_of
from agents.rollout import Driver
from atommem_env.errors import EngineDied, PromptTooLong
from atommem_env.types import Message, Reply, Rollout
from train.cluster.recipe import Prompt, read_run
from train.settings import make_env


@dataclasses.dataclass(frozen=True, slots=True)
class EngineModel:
    """A vLLM engine of OpenRLHF as a chat model."""

    engine: Any  # RolloutRayActor
    chat: ChatTokenizer
    sampling_params: Any  # vllm.SamplingParams
    max_tokens: int  # of prompt and reply
    name: str

    async def complete(
        self, messages: Sequence[Message], *, max_new_tokens: int, temperature: float, thinking: bool, seed: int
    ) -> Reply:
        """A reply, sampled as `sampling_params` say. The seed has no effect: a seeded request leaves vLLM's fast sampler, and
        what shares its batch would change last bits all the same.

        Raises:
            PromptTooLong: no reply fits behind the prompt.
            EngineDied: the engine's process is gone.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        prompt_ids = self.chat.prompt_ids(messages, thinking)
        room = self.max_tokens - len(prompt_ids)
        if room < 1:
            raise PromptTooLong(
                f"A prompt of {len(prompt_ids)} tokens leaves no room for a reply in max_tokens = {self.max_tokens}. Raise "
                "max_tokens, or lower chunk_tokens or memory_tokens."
            )
        params = copy.copy(self.sampling_params)
        params.temperature, params.max_tokens = temperature, min(max_new_tokens, room)
        try:
            return reply_of(await self.engine.generate(prompt_ids, params), self.chat)
        except EngineDeadError as error:
            raise EngineDied(f"The engine that samples from {self.name} died: {error}") from error


class AgentExecutor(AgentExecutorBase):
    """Plays episodes; what it returns is one response of OpenRLHF's, with the whole rollout in it."""

    def __init__(self) -> None:
        self.run = read_run()
        self.model = find_model(self.run.model)
        self.chat = ChatTokenizer(self.model)
        self.drivers = {
            split: Driver.of(make_env(self.run, name), embed_in_thread=True)
            for split, name in (("train", self.run.split), ("held_out", self.run.eval_split))
            if split == "train" or self.run.eval_every
        }
        self.played: Counter[str] = Counter()  # how often a prompt was: its rollouts differ in their seeds

    async def execute(
        self,
        prompt: str,
        label: str,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:
        """One rollout; its `rollout` is None, and `lost` says why, where the infrastructure failed at every try.

        Raises:
            AtomMemError: what another try cannot fix.
        """
        number = self.played[prompt]
        self.played[prompt] += 1
        named, run = Prompt.of(prompt), self.run
        driver, spec = self.drivers[named.split], named.spec
        temperature = 0.0
        if named.split == "train":
            temperature = run.temperature
            seeds = np.random.default_rng(spec.seed).integers(2**31, size=run.group_size).tolist()
            spec = dataclasses.replace(spec, seed=seeds[number % run.group_size])
        model = EngineModel(llm_engine, self.chat, sampling_params, max_length, Path(run.model).name)
        policy = ChatPolicy(model, driver.settings, Sampling(temperature, run.max_new_tokens), run.layout)
        return response(prompt, await driver.play_with_retries(spec, policy, retries=run.retries))


def response(prompt: str, rollout: Rollout | Exception) -> dict[str, Any]:
    """What OpenRLHF's generator makes an Experience of: the last turn's ids stand for the rollout until it is expanded."""
    if isinstance(rollout, Exception):
        return {"prompt": prompt, "rollout": None, "lost": f"{type(rollout).__name__}: {rollout}"}
    last = rollout.turns[-1].reply
    ids = [*last.prompt_ids, *last.completion_ids]
    return {
        "prompt": prompt,
        "label": "",
        "rollout": rollout,
        "reward": rollout.reward,
        "scores": rollout.reward,
        "observation_tokens": ids,
        "action_ranges": [(len(last.prompt_ids), len(ids))],
        "rollout_log_probs": [0.0] * len(last.prompt_ids) + list(last.logprobs),
        "truncated": last.stop == "length",
        "extra_logs": {},
    }
