"""Whether held-out questions are trained on: the same file imported as two splits, or two files that share questions."""

from __future__ import annotations

from collections.abc import Iterator

from atommem_env.types import TaskSource

_MOST_TASKS = 1000  # of a source that has to make a task to say what it asks


def overlap_warning(train: TaskSource, held_out: TaskSource) -> str | None:
    """A line that says how many of the held-out questions are trained on; None: none is, or the sources are too large to say.

    Questions are the same where their texts are, but for whitespace and case.
    """
    ours, theirs = _questions(train), _questions(held_out)
    shared = len(ours & theirs)
    if not shared:
        return None
    return (
        f"Warning: {shared:,} of the {len(theirs):,} held-out questions are among those that are trained on, so that the "
        "evaluation does not measure what is new to the model. Choose another --eval-split, or import another file as it."
    )


def _questions(source: TaskSource) -> set[str]:
    """What a source asks; empty where that is not known without making many tasks."""
    return {" ".join(text.casefold().split()) for text in _texts(source)}


def _texts(source: TaskSource) -> Iterator[str]:
    texts = getattr(source, "question_texts", None)
    if texts is not None:
        yield from texts()
    elif len(source) <= _MOST_TASKS:
        yield from (question.text for index in range(len(source)) for question in source.task(index, 0).questions)
