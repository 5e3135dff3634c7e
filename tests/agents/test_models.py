"""`agents.models.transformers_model`, on a tiny random Llama made here."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from agents.models.transformers_model import TransformersModel  # noqa: E402
from atommem_env.errors import PromptTooLong, SettingError  # noqa: E402
from atommem_env.types import Message, Reply  # noqa: E402

WORDS = [f"w{index}" for index in range(60)]
CHATML = (
    "{% for m in messages %}<start> {{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<start> assistant {% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
DROPS_SYSTEM = "{% for m in messages if m['role'] != 'system' %}<start> {{ m['content'] }} <end> {% endfor %}"
WINDOW = 64


def save_tiny_model(folder: Path, template: str | None = CHATML) -> Path:
    """A Llama of 2 layers with random weights and a vocabulary of words; `<end>` ends a reply."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = ["<unk>", "<pad>", "<start>", "<end>", "system", "user", "assistant", *WORDS]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<end>",
        bos_token="<start>",
        chat_template=template,
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        initializer_range=0.5,  # far from uniform, so that the likeliest token is clear
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> TransformersModel:
    return TransformersModel(folder, dtype="float32", device="cpu")


def chat(*words: str) -> list[Message]:
    return [{"role": "system", "content": "w0 w1"}, {"role": "user", "content": " ".join(words)}]


def prompts(model: TransformersModel) -> list[list[int]]:
    """Seven prompts of seven lengths."""
    return [model.prompt_ids(chat(*WORDS[n : 3 * n + 2])) for n in range(7)]


def full_forward_logprobs(folder: Path, reply: Reply, temperature: float) -> list[float]:
    """The sampled tokens' log-probabilities by one pass over prompt and completion, without cache, batch or padding."""
    network = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[*reply.prompt_ids, *reply.completion_ids]])
    with torch.no_grad():
        logits = network(ids, use_cache=False).logits[0] / temperature
    start = len(reply.prompt_ids)
    return [
        torch.log_softmax(logits[start + index - 1], dim=-1)[token].item()
        for index, token in enumerate(reply.completion_ids)
    ]


def assert_close(found: Sequence[float], expected: Sequence[float], tolerance: float = 1e-4) -> None:
    assert len(found) == len(expected)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= tolerance


def test_prompt_ids_follow_the_chat_template(model: TransformersModel) -> None:
    ids = model.prompt_ids(chat("w2", "w3"))
    tokens = "<start> system w0 w1 <end> <start> user w2 w3 <end> <start> assistant"
    assert [model.chat.backend.convert_ids_to_tokens(index) for index in ids] == tokens.split()


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_a_system_message_is_never_lost(tmp_path: Path, template: str) -> None:
    model = TransformersModel(save_tiny_model(tmp_path, template), dtype="float32", device="cpu")
    text = model.chat.backend.decode(model.prompt_ids(chat("w2", "w3")))
    assert "w0 w1 w2 w3" in text
    assert "system" not in text


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no chat template"):
        TransformersModel(save_tiny_model(tmp_path, template=None), dtype="float32", device="cpu")


def test_name_and_window_are_the_folder_s(model: TransformersModel, folder: Path) -> None:
    assert model.name == folder.name
    assert model.window == WINDOW


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.5])
def test_logprobs_are_those_of_a_full_forward_pass(model: TransformersModel, folder: Path, temperature: float) -> None:
    replies = model.generate(prompts(model), max_new_tokens=16, temperature=temperature, seeds=range(7))
    assert len({len(reply.completion_ids) for reply in replies}) > 1  # rows have left the batch at different times
    for reply in replies:
        assert_close(reply.logprobs, full_forward_logprobs(folder, reply, temperature or 1.0))


def test_greedy_takes_the_likeliest_token(model: TransformersModel, folder: Path) -> None:
    (reply,) = model.generate([prompts(model)[2]], max_new_tokens=8, temperature=0)
    network = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = list(reply.prompt_ids)
    for token in reply.completion_ids:
        with torch.no_grad():
            assert token == network(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
        ids.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_reply_does_not_depend_on_its_batch(model: TransformersModel, temperature: float) -> None:
    together = model.generate(prompts(model), max_new_tokens=16, temperature=temperature, seeds=range(7))
    alone = [
        model.generate([prompt], max_new_tokens=16, temperature=temperature, seeds=[seed])[0]
        for seed, prompt in enumerate(prompts(model))
    ]
    for one, other in zip(together, alone, strict=True):
        assert (one.text, one.completion_ids, one.stop) == (other.text, other.completion_ids, other.stop)
        assert_close(one.logprobs, other.logprobs)


def test_the_same_call_gives_the_same_replies_bit_for_bit(model: TransformersModel) -> None:
    for temperature in (0.0, 1.0):
        one, other = (
            model.generate(prompts(model), max_new_tokens=16, temperature=temperature, seeds=range(7)) for _ in "ab"
        )
        assert one == other


def test_seeds_decide_the_sample(model: TransformersModel) -> None:
    prompt = prompts(model)[3]
    first, second, again = model.generate([prompt] * 3, max_new_tokens=12, temperature=1.5, seeds=[1, 2, 1])
    assert first.completion_ids == again.completion_ids
    assert first.completion_ids != second.completion_ids


def test_tokens_are_drawn_with_their_probabilities(model: TransformersModel) -> None:
    prompt, draws = prompts(model)[1], 2000
    replies = model.generate([prompt] * draws, max_new_tokens=1, temperature=1.5, seeds=range(draws))
    logprob = {reply.completion_ids[0]: reply.logprobs[0] for reply in replies}
    assert len(logprob) > 3
    for token, value in logprob.items():
        share, expected = sum(reply.completion_ids == (token,) for reply in replies) / draws, math.exp(value)
        assert abs(share - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / draws) + 1 / draws


def test_an_end_of_sequence_token_is_kept_and_stops_the_reply(model: TransformersModel) -> None:
    end = model.chat.backend.eos_token_id
    replies = model.generate(prompts(model) * 4, max_new_tokens=24, temperature=1.5, seeds=range(28))
    assert {reply.stop for reply in replies} == {"stop", "length"}
    for reply in replies:
        assert end not in reply.completion_ids[:-1]
        assert (reply.completion_ids[-1] == end) == (reply.stop == "stop")
        assert reply.stop == "stop" or len(reply.completion_ids) == 24
        assert len(reply.logprobs) == len(reply.completion_ids)
        assert "<end>" not in reply.text


def test_a_prompt_beyond_the_window_is_an_error_with_both_numbers(model: TransformersModel) -> None:
    prompt = [5] * (WINDOW - 10)
    assert len(model.generate([prompt], max_new_tokens=10, temperature=0)[0].completion_ids) > 0
    with pytest.raises(PromptTooLong, match=rf"{WINDOW - 10} tokens and up to 11 .* {WINDOW} tokens.*chunk_tokens"):
        model.generate([[5], prompt], max_new_tokens=11, temperature=0)


@pytest.mark.parametrize(("temperature", "seeds"), [(-1.0, [1]), (1.0, None), (1.0, [1, 2])])
def test_sampling_without_its_seeds_is_refused(
    model: TransformersModel, temperature: float, seeds: list[int] | None
) -> None:
    with pytest.raises(SettingError, match="one seed for each of the 1 prompts"):
        model.generate([[5, 6]], max_new_tokens=4, temperature=temperature, seeds=seeds)


def test_nothing_to_do_is_nothing(model: TransformersModel) -> None:
    assert model.generate([], max_new_tokens=4, temperature=1.0, seeds=[]) == []


def test_global_randomness_is_left_alone(model: TransformersModel) -> None:
    before = torch.get_rng_state()
    model.generate(prompts(model), max_new_tokens=4, temperature=1.0, seeds=range(7))
    assert torch.equal(before, torch.get_rng_state())


def test_waiting_completions_share_batches_and_equal_generate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TransformersModel(folder, dtype="float32", device="cpu", max_batch=4)
    chats = [chat(*WORDS[n : 3 * n + 2]) for n in range(7)]
    batches: list[list[int]] = []
    generate = model.generate

    def recorded(given: Sequence[Sequence[int]], **settings: object) -> list[Reply]:
        batches.append([len(prompt) for prompt in given])
        return generate(given, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "generate", recorded)

    async def main() -> list[Reply]:
        calls = (
            model.complete(messages, max_new_tokens=8, temperature=1.0, seed=seed)
            for seed, messages in enumerate(chats)
        )
        return await asyncio.gather(*calls)

    for _ in "ab":  # one event loop after another
        batches.clear()
        for seed, (reply, messages) in enumerate(zip(asyncio.run(main()), chats, strict=True)):
            (expected,) = generate([model.prompt_ids(messages)], max_new_tokens=8, temperature=1.0, seeds=[seed])
            assert reply.completion_ids == expected.completion_ids
        assert [len(batch) for batch in batches] == [4, 3]
        assert max(batches[0]) < min(batches[1])  # prompts of about the same length


def test_completions_with_different_settings_may_wait_together(model: TransformersModel) -> None:
    async def main() -> list[Reply]:
        calls = [
            model.complete(chat("w3"), max_new_tokens=4, temperature=0),
            model.complete(chat("w3"), max_new_tokens=8, temperature=1.0, seed=3),
            model.complete(chat("w4"), max_new_tokens=4, temperature=0),
        ]
        return await asyncio.gather(*calls)

    prompt_3, prompt_4 = model.prompt_ids(chat("w3")), model.prompt_ids(chat("w4"))
    greedy = model.generate([prompt_3, prompt_4], max_new_tokens=4, temperature=0)
    sampled = model.generate([prompt_3], max_new_tokens=8, temperature=1.0, seeds=[3])
    assert asyncio.run(main()) == [greedy[0], sampled[0], greedy[1]]


def test_one_completion_that_cannot_work_leaves_the_others_alone(model: TransformersModel) -> None:
    async def main() -> list[Reply | BaseException]:
        calls = [
            model.complete(chat("w3"), max_new_tokens=4, temperature=0),
            model.complete(chat(*WORDS), max_new_tokens=4, temperature=0),
            model.complete(chat("w3"), max_new_tokens=4, temperature=1.0),
        ]
        return await asyncio.gather(*calls, return_exceptions=True)

    good, too_long, seedless = asyncio.run(main())
    assert isinstance(good, Reply)
    assert isinstance(too_long, PromptTooLong)
    assert isinstance(seedless, SettingError)
