"""Full context: the whole document in the prompt, as far as the model's window goes.

What is too long loses its middle, as in LongBench (Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context
Understanding", arXiv 2308.14508), which cuts to a length fixed for each model, in that model's tokens. Here as much is left out
as makes this prompt fit, between two tokens of the environment, "[…]" stands in its place, and `usage.dropped_tokens` tells how
much it was. A service that does not tell how long its window is costs up to half of what would have fitted; one that tells
that alone, as vLLM does, up to a tenth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from agents.baselines.answering import answer, check_settings
from agents.policy import Act
from agents.prompting import Ask, render_reply
from atommem_env.errors import PromptTooLong
from atommem_env.tokens import get_tokenizer
from atommem_env.types import EpisodeSettings, Observation, Operation, OperationKind, Phase, Reply, Usage

_MARK = "\n\n[…]\n\n"
_SPARE = 8  # tokens left out beyond what seems enough: how many the model sees in them is an estimate


def full_context(settings: EpisodeSettings, ask: Ask) -> Act:
    """A `Method`: keeps the chunks itself, asks the model once a question; the environment's memory stays empty.

    Raises:
        PromptTooLong: when played, if not even the question alone fits.
    """
    check_settings("full-context", settings)
    chunks: list[str] = []
    spans: list[tuple[int, int]] = []  # of the document's tokens
    kept = 0  # of them; what one question needed cut stays cut for the next

    async def act(observation: Observation) -> str | Reply:
        nonlocal kept
        if observation["phase"] == Phase.READ:
            chunks.append(observation["chunk"])
            return ""
        document = "\n\n".join(chunks)
        if not spans:
            spans.extend(get_tokenizer(settings.tokenizer).spans(document))
            kept = len(spans)
        while True:
            try:
                said = await answer(ask, settings, observation["question"], without_middle(document, spans, kept))
                break
            except PromptTooLong as error:
                if kept == 0:
                    raise
                kept = fewer(kept, error)
        text = render_reply(settings, Operation(OperationKind.ANSWER, said)) if said else ""
        return Reply(text, usage=Usage(dropped_tokens=len(spans) - kept))

    return act


def fewer(kept: int, error: PromptTooLong) -> int:
    """How many of `kept` tokens of a document to try after a prompt with them was too long; at least one less.

    Half of them, or, where the service told how long the prompt was, what should just fit: the model's tokens are taken to be
    spread evenly over the environment's. Where it told no more than the room, as many as there is room for, then a tenth less
    each time.

    >>> fewer(1000, PromptTooLong("", tokens=1500, room=1200)), fewer(1000, PromptTooLong(""))
    (792, 500)
    >>> fewer(1000, PromptTooLong("", room=600)), fewer(600, PromptTooLong("", room=600))
    (600, 540)
    """
    if error.room is None:
        return kept // 2
    if error.tokens is None:
        return min(error.room, kept * 9 // 10)
    surplus = math.ceil(kept * max(0, error.tokens - error.room) / error.tokens)
    return max(0, kept - surplus - _SPARE)


def without_middle(text: str, spans: Sequence[tuple[int, int]], kept: int) -> str:
    r"""The first and the last of a text's tokens, `kept` in all, the odd one in front; the text itself where that is all.

    >>> without_middle("one two three four five", [(0, 3), (4, 7), (8, 13), (14, 18), (19, 23)], 3)
    'one two\n\n[…]\n\nfive'
    """
    if kept >= len(spans):
        return text
    tail = kept // 2
    start = text[: spans[kept - tail - 1][1]] if kept else ""
    return start + _MARK + (text[spans[-tail][0] :] if tail else "")
