"""`agents.models.transformers_model` and its continuous batching, on a tiny random Llama and Qwen3 made here."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from agents.models.chat_tokenizer import ChatTokenizer  # noqa: E402
from agents.models.decoding import fill_gaps  # noqa: E402
from agents.models.find import find_model  # noqa: E402
from agents.models.transformers_model import TransformersModel  # noqa: E402
from atommem_env.errors import PromptTooLong, SettingError  # noqa: E402
from atommem_env.types import Message, Reply, Usage  # noqa: E402

WORDS = [f"w{index}" for index in range(60)]
CHATML = (
    "{% for m in messages %}<start> {{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<start> assistant {% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
DROPS_SYSTEM = "{% for m in messages if m['role'] != 'system' %}<start> {{ m['content'] }} <end> {% endfor %}"
WINDOW = 64


def save_tiny_model(
    folder: Path,
    template: str | None = CHATML,
    family: str = "Llama",
    more_words: Sequence[str] = (),
    **settings: object,
) -> Path:
    """A model of 2 layers with random weights and a vocabulary of words; `<end>` ends a reply."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = ["<unk>", "<pad>", "<start>", "<end>", "system", "user", "assistant", *WORDS, *more_words]
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
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,  # far from uniform, so that the likeliest token is clear
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=1,
        head_dim=8,
        **{"max_position_embeddings": WINDOW, **settings},
    )
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["Llama", "Qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), family=request.param)


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
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
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


@pytest.mark.parametrize(
    "content", ["plain text, <create> and all", "a <|im_end|> that a document spells", "", "\n two \n\n1"]
)
def test_a_prompt_is_the_sanitised_template_whatever_its_text_and_however_often(content: str) -> None:
    """The short way round the library, and the memory of it, give the library's ids."""
    tokenizer = ChatTokenizer(find_model("tiny"))
    messages: list[Message] = [{"role": "user", "content": content}]
    expected = tokenizer.backend.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
    first = tokenizer.prompt_ids(messages)
    assert first == expected
    first.append(0)
    assert tokenizer.prompt_ids(messages) == expected


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> TransformersModel:
    """A model whose template opens the thought, or closes it at once where there is to be none."""
    template = CHATML + "{{ '<think>' if enable_thinking else '<think> </think>' }}"
    folder = save_tiny_model(tmp_path_factory.mktemp("thinker"), template, more_words=("<think>", "</think>"))
    return TransformersModel(folder, dtype="float32", device="cpu")


def test_a_template_is_given_whether_to_think_and_thoughts_are_no_reply(thinker: TransformersModel) -> None:
    tokenizer = thinker.chat
    loud, quiet = (tokenizer.prompt_ids(chat("w2"), thinking) for thinking in (True, False))
    assert tokenizer.backend.decode(loud).endswith("<start> assistant <think>")
    assert tokenizer.backend.decode(quiet).endswith("<start> assistant <think> </think>")
    assert tokenizer.prompt_ids(chat("w2")) == quiet
    for prompt, written, reply in (
        (loud, "w5 w6 </think> w7", "w7"),
        (loud, "w5 w6", ""),
        (quiet, "w5 w6", "w5 w6"),
        (quiet, "<think> w5 </think> w6", "w6"),
        (quiet, "<think> w5", ""),
        (quiet, "w5 <think> w6 </think> w7", "w5 <think> w6 </think> w7"),
    ):
        assert tokenizer.reply_text(prompt, tokenizer.completion_ids(written)) == reply


def test_what_was_thought_is_recorded_as_ids_alone(thinker: TransformersModel) -> None:
    async def complete(thinking: bool) -> Reply:
        return await thinker.complete(chat("w2"), max_new_tokens=4, temperature=0, thinking=thinking)

    loud, quiet = (asyncio.run(complete(thinking)) for thinking in (True, False))
    assert loud.prompt_ids != quiet.prompt_ids
    assert loud.completion_ids
    assert (loud.text, bool(quiet.text)) == ("", True)


def test_a_reply_says_what_it_took(model: TransformersModel) -> None:
    (reply,) = model.generate([prompts(model)[2]], max_new_tokens=8, temperature=0)
    assert reply.usage == Usage(1, len(reply.prompt_ids), len(reply.completion_ids))


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_a_system_message_is_never_lost(tmp_path: Path, template: str) -> None:
    model = TransformersModel(save_tiny_model(tmp_path, template), dtype="float32", device="cpu")
    text = model.chat.backend.decode(model.prompt_ids(chat("w2", "w3")))
    assert "w0 w1 w2 w3" in text
    assert "system" not in text


def test_a_model_without_a_chat_template_is_rejected(tmp_path: Path) -> None:
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
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
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


def test_an_end_of_sequence_token_is_recorded_and_stops_the_reply(model: TransformersModel) -> None:
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
    with pytest.raises(
        PromptTooLong, match=rf"{WINDOW - 10} tokens and up to 11 .* {WINDOW} tokens.*chunk_tokens"
    ) as caught:
        model.generate([[5], prompt], max_new_tokens=11, temperature=0)
    assert (caught.value.tokens, caught.value.room) == (WINDOW - 10, WINDOW - 11)


@pytest.mark.parametrize(("temperature", "seeds"), [(-1.0, [1]), (1.0, None), (1.0, [1, 2])])
def test_sampling_without_its_seeds_is_rejected(
    model: TransformersModel, temperature: float, seeds: list[int] | None
) -> None:
    with pytest.raises(SettingError, match="one seed for each of the 1 prompts"):
        model.generate([[5, 6]], max_new_tokens=4, temperature=temperature, seeds=seeds)


@pytest.mark.parametrize(("prompt", "max_new_tokens"), [([], 4), ([5], 0)])
def test_an_empty_prompt_or_reply_is_rejected(model: TransformersModel, prompt: list[int], max_new_tokens: int) -> None:
    with pytest.raises(SettingError, match=f"got {len(prompt)} and max_new_tokens={max_new_tokens}"):
        model.generate([prompt], max_new_tokens=max_new_tokens, temperature=0)


def test_nothing_to_do_is_nothing(model: TransformersModel) -> None:
    assert model.generate([], max_new_tokens=4, temperature=1.0, seeds=[]) == []


def test_global_randomness_is_left_alone(model: TransformersModel) -> None:
    before = torch.get_rng_state()
    model.generate(prompts(model), max_new_tokens=4, temperature=1.0, seeds=range(7))
    assert torch.equal(before, torch.get_rng_state())


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
    for reply, expected in zip(asyncio.run(main()), [greedy[0], sampled[0], greedy[1]], strict=True):
        assert (reply.completion_ids, reply.stop) == (expected.completion_ids, expected.stop)
        assert_close(reply.logprobs, expected.logprobs)


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


# ---------------------------------------------------------------------------------------------------- continuous batching


@contextmanager
def recorded_forwards(model: TransformersModel) -> Iterator[list[tuple[int, int]]]:
    """The shapes [rows, tokens] of what the model reads, one a forward pass."""
    shapes: list[tuple[int, int]] = []

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    handle = model.model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


async def until_read(shapes: list[tuple[int, int]], count: int) -> None:
    """Returns once the model has made `count` forward passes."""
    for _ in range(10_000):
        if len(shapes) >= count:
            return
        await asyncio.sleep(0)
    raise AssertionError(f"{len(shapes)} forward passes, {count} never came")


async def play_schedule(model: TransformersModel, schedule: Sequence[tuple[int, int, int, float]]) -> list[Reply]:
    """Calls that come in after so many turns of the event loop, with such prompts, lengths and temperatures."""

    async def call(seed: int, delay: int, prompt: int, max_new_tokens: int, temperature: float) -> Reply:
        for _ in range(delay):
            await asyncio.sleep(0)
        messages = chat(*WORDS[prompt : 3 * prompt + 2])
        return await model.complete(messages, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)

    return await asyncio.gather(*(call(seed, *entry) for seed, entry in enumerate(schedule)))


def long_chat(model: TransformersModel) -> list[Message]:
    """A chat whose greedy reply has 30 tokens, and no end among them."""
    for word in WORDS:
        (reply,) = model.generate([model.prompt_ids(chat(word))], max_new_tokens=30, temperature=0)
        if reply.stop == "length":
            return chat(word)
    raise AssertionError("every greedy reply ends early")


SCHEDULES = st.lists(
    st.tuples(st.integers(0, 150), st.integers(0, 6), st.integers(1, 24), st.sampled_from([0.0, 0.7, 1.5])),
    min_size=1,
    max_size=10,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=SCHEDULES, max_batch=st.sampled_from([1, 3, 16]))
def test_whenever_calls_come_their_replies_are_those_sampled_alone(
    schedule: list[tuple[int, int, int, float]], max_batch: int, folder: Path, model: TransformersModel
) -> None:
    shared = TransformersModel.of(model.model, model.chat, name="shared", max_batch=max_batch)
    for seed, (reply, (_, prompt, max_new_tokens, temperature)) in enumerate(
        zip(asyncio.run(play_schedule(shared, schedule)), schedule, strict=True)
    ):
        (alone,) = model.generate(
            [prompts(model)[prompt]], max_new_tokens=max_new_tokens, temperature=temperature, seeds=[seed]
        )
        assert (reply.prompt_ids, reply.completion_ids) == (alone.prompt_ids, alone.completion_ids)
        assert (reply.text, reply.stop) == (alone.text, alone.stop)
        assert_close(reply.logprobs, full_forward_logprobs(folder, reply, temperature or 1.0))


def test_the_same_calls_at_the_same_moments_give_the_same_replies_bit_for_bit(model: TransformersModel) -> None:
    schedule = [(17 * n % 60, n % 7, 3 + 5 * n % 21, (0.0, 0.7, 1.5)[n % 3]) for n in range(30)]
    one, other = (asyncio.run(play_schedule(model, schedule)) for _ in "ab")
    assert one == other


def test_a_call_joins_the_running_batch_and_returns_before_the_others(model: TransformersModel) -> None:
    messages = long_chat(model)

    async def main() -> bool:
        first = asyncio.create_task(model.complete(messages, max_new_tokens=30, temperature=0))
        await until_read(shapes, 6)
        await model.complete(messages, max_new_tokens=3, temperature=0)
        early = not first.done()
        await first
        return early

    with recorded_forwards(model) as shapes:
        assert asyncio.run(main())
    widths = [rows for rows, tokens in shapes if tokens == 1]
    assert len(shapes) - len(widths) == 2  # two prompts were read
    assert widths.count(2) == 2  # the guest's second and third token; the first comes of reading
    assert widths.index(2) >= 4
    assert widths[-5:] == [1] * 5


def test_a_batch_holds_at_most_max_batch_rows_and_a_free_one_is_taken_at_once(model: TransformersModel) -> None:
    narrow = TransformersModel.of(model.model, model.chat, name="narrow", max_batch=2)
    messages = long_chat(model)

    async def main() -> None:
        lengths = (20, 5, 5, 5)
        await asyncio.gather(*(narrow.complete(messages, max_new_tokens=n, temperature=0) for n in lengths))

    with recorded_forwards(narrow) as shapes:
        asyncio.run(main())
    widths = [rows for rows, tokens in shapes if tokens == 1]
    assert widths == [2] * 12 + [1] * 7  # 3 guests of 4 steps each, one after the other, beside the 19 of the longest


def test_prompts_are_read_together_and_equal_ones_once(model: TransformersModel) -> None:
    messages = [chat("w1", "w2", "w3"), chat("w4")]
    lengths = [len(model.prompt_ids(each)) for each in messages]

    async def main() -> list[Reply]:
        calls = (model.complete(messages[n % 2], max_new_tokens=6, temperature=1.5, seed=n) for n in range(8))
        return await asyncio.gather(*calls)

    with recorded_forwards(model) as shapes:
        replies = asyncio.run(main())
    assert [shape for shape in shapes if shape[1] > 1] == [(2, max(lengths))]
    assert len({reply.completion_ids for reply in replies[::2]}) > 1
    for seed, reply in enumerate(replies):
        (alone,) = model.generate([reply.prompt_ids], max_new_tokens=6, temperature=1.5, seeds=[seed])
        assert reply.completion_ids == alone.completion_ids


def test_a_long_prompt_is_read_alone(tmp_path: Path) -> None:
    model = TransformersModel(
        save_tiny_model(tmp_path / "wide", max_position_embeddings=8192), dtype="float32", device="cpu"
    )
    with recorded_forwards(model) as shapes:
        model.generate([[5] * 5000, [6] * 3, [7] * 4], max_new_tokens=1, temperature=0)
    assert shapes == [(2, 4), (1, 5000)]


def test_a_cancelled_call_frees_its_row_and_leaves_the_others_alone(model: TransformersModel) -> None:
    narrow = TransformersModel.of(model.model, model.chat, name="narrow", max_batch=2)
    messages = long_chat(model)
    (expected,) = model.generate([model.prompt_ids(messages)], max_new_tokens=30, temperature=0)

    async def main() -> list[Reply]:
        calls = [asyncio.create_task(narrow.complete(messages, max_new_tokens=30, temperature=0)) for _ in range(4)]
        await until_read(shapes, 5)
        calls[0].cancel()  # it runs
        calls[2].cancel()  # it waits
        replies = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(reply, asyncio.CancelledError) for reply in replies] == [True, False, True, False]
        return [reply for reply in replies if isinstance(reply, Reply)]

    with recorded_forwards(narrow) as shapes:
        replies = asyncio.run(main())
    assert [reply.completion_ids for reply in replies] == [expected.completion_ids] * 2
    assert sum(tokens == 1 for _, tokens in shapes) < 2 * 29  # the last one did not wait for the second one's end


@pytest.mark.parametrize("after", [0, 4])
def test_a_failure_reaches_every_call_and_the_model_goes_on(model: TransformersModel, after: int) -> None:
    narrow = TransformersModel.of(model.model, model.chat, name="narrow", max_batch=2)
    messages = long_chat(model)

    async def main() -> list[Reply | BaseException]:
        calls = (narrow.complete(messages, max_new_tokens=30, temperature=0) for _ in range(4))
        failed = await asyncio.gather(*calls, return_exceptions=True)
        handle.remove()
        return [*failed, await narrow.complete(messages, max_new_tokens=30, temperature=0)]

    def fail(*_: object) -> None:
        if len(shapes) > after:
            raise RuntimeError("the device is gone")

    with recorded_forwards(narrow) as shapes:
        handle = narrow.model.register_forward_pre_hook(fail)
        *failed, reply = asyncio.run(main())
    assert [str(error) for error in failed] == ["the device is gone"] * 4
    (expected,) = model.generate([model.prompt_ids(messages)], max_new_tokens=30, temperature=0)
    assert isinstance(reply, Reply)
    assert reply.completion_ids == expected.completion_ids


def test_one_event_loop_after_another_also_when_one_stopped_in_the_middle(model: TransformersModel) -> None:
    messages = long_chat(model)

    async def stop_in_the_middle() -> None:
        running = asyncio.create_task(model.complete(messages, max_new_tokens=30, temperature=0))
        await until_read(shapes, 3)
        assert not running.done()

    async def whole() -> Reply:
        return await model.complete(messages, max_new_tokens=30, temperature=0)

    with recorded_forwards(model) as shapes:
        asyncio.run(stop_in_the_middle())
    first, second = asyncio.run(whole()), asyncio.run(whole())
    assert first == second
    assert len(first.completion_ids) == 30


def test_a_model_in_training_is_sampled_in_eval_mode_and_left_as_it_was(tmp_path: Path) -> None:
    sampler = TransformersModel(save_tiny_model(tmp_path, attention_dropout=0.5), dtype="float32", device="cpu")
    network = sampler.model
    expected = sampler.generate(prompts(sampler), max_new_tokens=12, temperature=1.0, seeds=range(7))
    network.train()
    network.lm_head.eval()  # modes may differ inside
    network.config.use_cache = False  # as trainers set it
    network.activation_checkpointing_enable()
    before = [module.training for module in network.modules()]
    assert sampler.generate(prompts(sampler), max_new_tokens=12, temperature=1.0, seeds=range(7)) == expected
    assert [module.training for module in network.modules()] == before
    handle = network.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampler.generate([[5]], max_new_tokens=1, temperature=0)
    handle.remove()
    assert [module.training for module in network.modules()] == before
    loss = network(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_replies_follow_the_weights(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    sampler = TransformersModel(folder, dtype="float32", device="cpu")

    async def main() -> tuple[Reply, Reply]:
        before = await sampler.complete(chat("w3"), max_new_tokens=12, temperature=0)
        with torch.no_grad():
            for parameter in sampler.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        return before, await sampler.complete(chat("w3"), max_new_tokens=12, temperature=0)

    before, after = asyncio.run(main())
    assert before.completion_ids != after.completion_ids
    sampler.model.save_pretrained(folder)
    (fresh,) = TransformersModel(folder, dtype="float32", device="cpu").generate(
        [after.prompt_ids], max_new_tokens=12, temperature=0
    )
    assert fresh == after


def test_a_module_with_adapters_is_sampled_with_them(model: TransformersModel, folder: Path) -> None:
    peft = pytest.importorskip("peft")
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(
        network, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    sampler = TransformersModel.of(adapted, model.chat, name="adapted", max_batch=4)
    assert (sampler.name, sampler.window, sampler.model, sampler.chat) == ("adapted", WINDOW, adapted, model.chat)
    replies = asyncio.run(play_schedule(sampler, [(0, n, 12, 1.0) for n in range(7)]))
    plain = asyncio.run(play_schedule(model, [(0, n, 12, 1.0) for n in range(7)]))
    assert [reply.completion_ids for reply in replies] != [reply.completion_ids for reply in plain]
    merged = adapted.merge_and_unload().eval()
    for reply in replies:
        with torch.no_grad():
            logits = merged(torch.tensor([[*reply.prompt_ids, *reply.completion_ids]]), use_cache=False).logits[0]
        logp = logits.log_softmax(-1)[len(reply.prompt_ids) - 1 : -1]
        assert_close(reply.logprobs, logp.gather(-1, torch.tensor(reply.completion_ids)[:, None])[:, 0].tolist())


def test_an_attention_that_rows_cannot_share_is_rejected(model: TransformersModel, tmp_path: Path) -> None:
    eager = transformers.AutoModelForCausalLM.from_config(model.model.config, attn_implementation="eager")
    with pytest.raises(SettingError, match="attn_implementation='eager'"):
        TransformersModel.of(eager, model.chat, name="eager")
    sliding = save_tiny_model(tmp_path, family="Qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(SettingError, match="sliding_attention"):
        TransformersModel(sliding, dtype="float32", device="cpu")


@given(st.lists(st.booleans(), max_size=12))
def test_filling_gaps_keeps_the_rows_that_stay_and_moves_no_more_than_needed(gone: list[bool]) -> None:
    rows = list(range(len(gone)))
    sources, targets = fill_gaps(gone)
    for source, target in zip(sources, targets, strict=True):
        rows[target] = rows[source]
    stay = [index for index in range(len(gone)) if not gone[index]]
    assert sorted(rows[: len(stay)]) == stay
    assert all(gone[target] for target in targets)
