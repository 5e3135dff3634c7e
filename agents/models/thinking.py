"""Separates what a model thought before it replied from the reply."""

from __future__ import annotations

_OPEN, _CLOSE = "<think>", "</think>"


def opens_thought(prompt: str) -> bool:
    """Whether a chat template has opened the thought itself, so that the model only closes it.

    >>> opens_thought("<|assistant|>\\n<think>\\n"), opens_thought("<|assistant|>\\n<think>\\n\\n</think>\\n\\n")
    (True, False)
    """
    return prompt.rstrip().endswith(_OPEN)


def without_thought(text: str, opened: bool | None = False) -> str:
    """The reply in what a model wrote: `<think>…</think>` at its start is left out, with the white space after it.

    A model whose tokens ran out while it thought has not replied. A thought in the middle of a reply is ordinary text.

    Args:
        opened: whether the prompt ended within the thought. None: not known; it did if a thought is closed that was not opened.

    >>> without_thought("<think>Rome? Yes.</think>\\n\\nRome"), without_thought("<think>Rome? Or")
    ('Rome', '')
    >>> without_thought("Rome? Yes.</think>Rome", opened=True), without_thought("It <think>s</think>.", opened=None)
    ('Rome', 'It <think>s</think>.')
    """
    before, closed, after = text.partition(_CLOSE)
    if opened is None:
        opened = bool(closed) and _OPEN not in before
    return after.lstrip() if opened or text.lstrip().startswith(_OPEN) else text
