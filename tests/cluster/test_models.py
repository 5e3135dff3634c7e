"""The back ends with vLLM, in process and as a service, on a CPU: the same prompts, the same replies, and no reply lost."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import gymnasium as gym
import pytest
from processes import free_port, wait_until

import atommem_env  # noqa: F401  registers the environments
from agents.chat_policy import ChatModel, ChatPolicy, Sampling
from agents.models.chat_tokenizer import ChatTokenizer
from agents.models.openai_api import OpenAIModel
from agents.models.vllm_model import VLLMModel
from agents.rollout import Driver, EpisodeSpec
from atommem_env.errors import EngineDied, ModelError, PromptTooLong, SettingError
from atommem_env.types import Message, Reply, Rollout, StopReason

NEW_TOKENS = 24


class Served:
    """`vllm serve` with the model tiny, in float32."""

    def __init__(self, model: Path, log: Path) -> None:
        self.port = free_port()
        vllm = str(Path(sys.executable).with_name("vllm"))
        self.command = [vllm, "serve", str(model), "--served-model-name", "tiny", "--port", str(self.port)]
        self.command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
        self.command += ["--enable-prompt-tokens-details"]
        self.log = log
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)

    def kill(self) -> None:
        """By the machine, so to say: no process of it has time for anything."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        try:
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200)
        except (URLError, OSError):
            return False


@pytest.fixture(scope="module")
def served(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tiny, tmp_path_factory.mktemp("vllm") / "log")
    try:
        wait_until(served.up, 600)
        yield served
    finally:
        served.kill()


@pytest.fixture
def service(served: Served, monkeypatch: pytest.MonkeyPatch) -> OpenAIModel:
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{served.port}/v1")
    return OpenAIModel("tiny")


def driver() -> Driver:
    return Driver.of(gym.make("AtomMem-Synthetic", num_docs=24, chunk_tokens=96, durability="off"))


def play(model: ChatModel, replied: Callable[[], None] = lambda: None) -> list[Rollout]:
    """Eight episodes, four at a time."""
    driving = driver()
    policy = ChatPolicy(model, driving.settings, Sampling(max_new_tokens=NEW_TOKENS), layout="terse")
    specs = [EpisodeSpec(index, index, index) for index in range(8)]
    return asyncio.run(driving.run(specs, policy, in_flight=4, replied=replied))


def chats() -> list[list[Message]]:
    """Of any length up to some hundred tokens; with a system message, and with words that the model does not know."""
    system: Message = {"role": "system", "content": "You answer."}
    return [
        [*([system] if number % 2 else []), {"role": "user", "content": "Where does Ada live? Ünknown\n" * number}]
        for number in (1, 2, 3, 4, 40, 41, 42)
    ]


def ask(model: ChatModel, temperature: float = 0.0, asked: Sequence[list[Message]] = ()) -> list[Reply]:
    """Replies to `asked`, of everything in `chats()` if that is empty."""

    async def all_at_once() -> list[Reply]:
        wanted = {"max_new_tokens": NEW_TOKENS, "temperature": temperature, "thinking": False}
        calls = [model.complete(chat, seed=seed, **wanted) for seed, chat in enumerate(asked or chats())]
        return await asyncio.gather(*calls)

    return asyncio.run(all_at_once())


def greedy(network: Any, prompt: Sequence[int], end: int) -> list[int]:
    """The ids of a reply by transformers, one full forward pass a token."""
    import torch

    ids: list[int] = []
    while len(ids) < NEW_TOKENS and ids[-1:] != [end]:
        with torch.no_grad():
            ids.append(int(network(torch.tensor([[*prompt, *ids]])).logits[0, -1].argmax()))
    return ids


def scores(network: Any, reply: Reply, temperature: float = 1.0) -> list[float]:
    """The log-probabilities of a reply's ids by transformers."""
    import torch

    ids = torch.tensor([[*reply.prompt_ids, *reply.completion_ids]])
    start = len(reply.prompt_ids)
    with torch.no_grad():
        logprobs = (network(ids).logits[0, start - 1 : -1] / temperature).log_softmax(-1)
    chosen: list[float] = logprobs.gather(-1, ids[0, start:, None])[:, 0].tolist()
    return chosen


@contextmanager
def engine(model: str) -> Iterator[tuple[VLLMModel, list[int]]]:
    """vLLM in this process, and the processes that it started."""
    import psutil

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    made = VLLMModel(model)
    children = psutil.Process().children(recursive=True)
    started = [
        child for child in children if child.pid not in before and "resource_tracker" not in " ".join(child.cmdline())
    ]
    assert started
    try:
        yield made, [child.pid for child in started]
    finally:
        made.close()


def test_transformers_vllm_and_its_service_give_the_same_replies(tiny: Path, service: OpenAIModel) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    chat = ChatTokenizer(tiny)
    prompts = [chat.prompt_ids(messages) for messages in chats()]
    expected = [greedy(network, prompt, chat.backend.eos_token_id) for prompt in prompts]
    with engine("tiny") as (in_process, processes):
        for model in (service, in_process):
            for time in (1, 2):  # each in an event loop of its own
                replies = ask(model)
                for prompt, ids, reply in zip(prompts, expected, replies, strict=True):
                    assert list(reply.prompt_ids) == prompt
                    assert list(reply.completion_ids) == ids
                    assert reply.logprobs == pytest.approx(scores(network, reply), abs=1e-4)
                    assert reply.text == chat.text(ids)
                    assert reply.stop == ("stop" if ids[-1] == chat.backend.eos_token_id else "length")
                    assert reply.usage is not None
                    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), len(ids))
                cached = [reply.usage.cached_tokens for reply in replies if reply.usage]
                assert cached[0] == 0  # shorter than a block
                assert time == 1 or min(cached[-3:]) > 0
        sampled, again = (ask(in_process, 2.0) for _ in range(2))
        assert [reply.completion_ids for reply in sampled] == [reply.completion_ids for reply in again]
        assert [list(reply.completion_ids) for reply in sampled] != expected
        for reply in sampled:
            assert reply.logprobs == pytest.approx(scores(network, reply, 2.0), abs=1e-4)

        # More than vLLM reads in a step: a seeded request whose prompt is read in two kills its engine on a CPU.
        many: list[list[Message]] = [[{"role": "user", "content": f"{number} lives. " * 200}] for number in range(9)]
        assert len(ask(in_process, 1.0, many)) == 9

        for model in (service, in_process):
            long: list[Message] = [{"role": "user", "content": "Where does Ada live? " * 1000}]
            with pytest.raises(PromptTooLong, match="2048 tokens") as caught:
                asyncio.run(model.complete(long, max_new_tokens=48, temperature=0.0, thinking=False, seed=0))
            assert caught.value.room == 2000
            assert caught.value.tokens is None or caught.value.tokens > 2000

        for process in processes:
            os.kill(process, signal.SIGKILL)
        with pytest.raises(EngineDied, match="vllm:tiny"):
            ask(in_process)


def test_a_refusal_has_the_service_s_words(service: OpenAIModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="status 404: The model `other` does not exist"):
        ask(OpenAIModel("other"))
    with pytest.raises(SettingError, match="temperature must be a finite number of at least 0, got -1"):
        Sampling(temperature=-1.0)


def test_a_service_that_is_killed_and_started_again_loses_no_reply(
    served: Served, service: OpenAIModel, caplog: pytest.LogCaptureFixture
) -> None:
    expected = play(service)
    assert sum(len(rollout.turns) for rollout in expected) > 30
    count = 0

    def replied() -> None:
        nonlocal count
        count += 1
        if count == 12:
            served.kill()
            served.start()

    with caplog.at_level(logging.WARNING, "atommem_env"):
        rollouts = play(service, replied)
    assert count == sum(len(rollout.turns) for rollout in rollouts)
    began, ended = (record.getMessage() for record in caplog.records if record.name == "atommem_env.openai_client")
    assert "is asked again" in began
    assert "answers again" in ended
    print(ended)
    assert all(rollout.stop_reason in set(StopReason) and rollout.turns for rollout in rollouts)
    assert all(turn.reply.completion_ids for rollout in rollouts for turn in rollout.turns)
    assert [rollout.reward for rollout in rollouts] == [rollout.reward for rollout in expected]
    pairs = [
        (one.reply.completion_ids, other.reply.completion_ids)
        for before, after in zip(expected, rollouts, strict=True)
        for one, other in zip(before.turns, after.turns, strict=False)
    ]
    assert sum(one == other for one, other in pairs) > 0.9 * len(pairs)
