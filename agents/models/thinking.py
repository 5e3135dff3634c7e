"""Separates what a model thought before it replied from the reply."""

from __future__ import annotations

import re

_OPEN, _CLOSE = "<think>", "</think>"
_TAG = re.compile(f"{_OPEN}|{_CLOSE}")


def opens_thought(prompt: str) -> bool:
    """Whether a chat template has opened the thought itself, so that the model only closes it.

    >>> opens_thought("<|assistant|>\\n<think>\\n"), opens_thought("<|assistant|>\\n<think>\\n\\n</think>\\n\\n")
    (True, False)
    """
    return prompt.rstrip().endswith(_OPEN)


def without_thought(text: str, opened: bool | None = False, *, thinking: bool = False, truncated: bool = False) -> str:
    """The reply in what a model wrote: a draft inside a thought is none.

    Where the text begins within a thought, all thoughts are left out, later ones too, each with the white space after it. One
    that is not closed lasts to the end, and what stands before a close without an opening belongs to a thought. In other texts
    a `<think>` is ordinary text, which a reply may quote.

    Args:
        opened: whether the prompt ended within the thought. None: not known; it did if a thought is closed that was not opened,
            and is taken to have if a model that was asked to think was truncated before it closed one.
        thinking: whether the model was asked to think and its thoughts, if any, are in `text`.
        truncated: whether the tokens ran out.

    >>> without_thought("<think>Rome? Yes.</think>\\n\\nRome"), without_thought("<think>Rome? Or")
    ('Rome', '')
    >>> without_thought("Rome? Yes.</think>Rome", opened=True), without_thought("It <think>s</think>.", opened=None)
    ('Rome', 'It <think>s</think>.')
    >>> without_thought("<think>Rome?</think>Ro<think>Or Bern?</think>me")
    'Rome'
    >>> without_thought("Rome? Or", opened=None, thinking=True, truncated=True)
    ''
    """
    tags = [match[0] for match in _TAG.finditer(text)]
    if opened is None:
        opened = tags[:1] == [_CLOSE] or (thinking and truncated and not tags)
    if not opened and not text.lstrip().startswith(_OPEN):
        return text
    reply: list[str] = []
    inside, start = opened, 0
    for match in _TAG.finditer(text):
        if match[0] == _OPEN:
            if not inside:
                reply.append(text[start : match.start()])
        elif not inside:  # closed, and not opened: a thought that quoted the end of one
            reply.clear()
        inside, start = match[0] == _OPEN, match.end()
        if not inside:
            start += len(text[start:]) - len(text[start:].lstrip())
    return "".join([*reply, "" if inside else text[start:]]).lstrip()
