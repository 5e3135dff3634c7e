"""Full context: the whole document in the prompt, as far as the model's window goes.

What is too long loses its middle, as in LongBench (Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context
Understanding", arXiv 2308.14508), which truncates to a length fixed for each model, in that model's tokens. Here as much is left
out as makes this prompt fit, between two tokens of the environment, "[…]" replaces it, and `usage.dropped_tokens` says how much
it was. With a service that does not report its window up to half of what would have fitted is lost; with one that reports only
that, as vLLM does, up to a tenth.
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
_MARGIN = 8  # tokens left out beyond what seems enough: how many the model sees in them is an estimate


def full_context(settings: EpisodeSettings, ask: Ask) -> Act:
    """A `Method`: collects the chunks itself, asks the model once a question; the environment's memory stays empty.

    Raises:
        PromptTooLong: when played, if not even the question alone fits.
    """
    check_settings("full-context", settings)
    chunks: list[str] = []
    spans: list[tuple[int, int]] = []  # of the document's tokens
    shown = 0  # of them; what was left out for one question stays left out for the next

    async def act(observation: Observation) -> str | Reply:
        nonlocal shown
        if observation["phase"] == Phase.READ:
            chunks.append(observation["chunk"])
            return ""
        document = "\n\n".join(chunks)
        if not spans:
            spans.extend(get_tokenizer(settings.tokenizer).spans(document))
            shown = len(spans)
        while True:
            try:
                said = await answer(ask, settings, observation["question"], without_middle(document, spans, shown))
                break
            except PromptTooLong as error:
                if shown == 0:
                    raise
                shown = fewer(shown, error)
        text = render_reply(settings, Operation(OperationKind.ANSWER, said)) if said else ""
        return Reply(text, usage=Usage(dropped_tokens=len(spans) - shown))

    return act


def fewer(shown: int, error: PromptTooLong) -> int:
    """How many of `shown` tokens of a document to try after a prompt with them was too long; at least one less.

    Half of them, or, where the service reported how long the prompt was, what should just fit: the model's tokens are taken to be
    spread evenly over the environment's. Where it reported only the room, as many as there is room for, then a tenth less
    each time.

    >>> fewer(1000, PromptTooLong("", tokens=1500, room=1200)), fewer(1000, PromptTooLong(""))
    (792, 500)
    >>> fewer(1000, PromptTooLong("", room=600)), fewer(600, PromptTooLong("", room=600))
    (600, 540)
    """
    if error.room is None:
        return shown // 2
    if error.tokens is None:
        return min(error.room, shown * 9 // 10)
    surplus = math.ceil(shown * max(0, error.tokens - error.room) / error.tokens)
    return max(0, shown - surplus - _MARGIN)


def without_middle(text: str, spans: Sequence[tuple[int, int]], shown: int) -> str:
    r"""The first and the last of a text's tokens, `shown` in all, the odd one in front; the text itself where that is all.

    >>> without_middle("one two three four five", [(0, 3), (4, 7), (8, 13), (14, 18), (19, 23)], 3)
    'one two\n\n[…]\n\nfive'
    """
    if shown >= len(spans):
        return text
    tail = shown // 2
    start = text[: spans[shown - tail - 1][1]] if shown else ""
    return start + _MARK + (text[spans[-tail][0] :] if tail else "")
