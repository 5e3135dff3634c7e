"""The operations as XML-like tags: the AtomMem paper's form (arXiv 2601.08323)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from atommem_env.types import Entry, EpisodeSettings, Fault, Operation, OperationKind, OperationResult

_TAGS = {
    "create_memory": OperationKind.CREATE,
    "read_memory": OperationKind.READ,
    "update_memory": OperationKind.UPDATE,
    "delete_memory": OperationKind.DELETE,
    "update_scratchpad": OperationKind.SCRATCHPAD,
    "final_answer": OperationKind.ANSWER,
}
_NAMES = {kind: name for name, kind in _TAGS.items()}
_TAG = re.compile(rf"<(/?)({'|'.join(_TAGS)})>")
_BOXED = "\\boxed{"

_EXPLANATIONS = {
    OperationKind.CREATE: ("text", "store a new entry in the memory."),
    OperationKind.READ: (
        "query",
        "search the memory; the entries found are shown from your next turn on. Only the last search of a turn counts.",
    ),
    OperationKind.UPDATE: ("id: text", "replace the text of the entry with that id, for example m3."),
    OperationKind.DELETE: ("id", "remove the entry with that id."),
    OperationKind.SCRATCHPAD: ("text", "replace your scratchpad, a note that is shown to you on every turn."),
    OperationKind.ANSWER: (
        "answer",
        "answer the question that is asked, as briefly as possible; unknown if the document did not tell.",
    ),
}


class TagsDialect:
    """`<create_memory>text</create_memory>`, `<update_memory>m3: text</update_memory>`, `<final_answer>…</final_answer>` …

    A tag that is not closed before the next one opens is a fault of its own; what follows is read as if it were not there.

    >>> TagsDialect().parse("<create_memory>lost <delete_memory> m2 </delete_memory>")[1]
    Operation(kind=<OperationKind.DELETE: 'delete'>, text='', target='m2')
    """

    name = "tags"

    def parse(self, reply: str) -> list[Operation | OperationResult]:
        found: list[Operation | OperationResult] = []
        opened: re.Match[str] | None = None
        for tag in _TAG.finditer(reply):
            closing, name = tag.groups()
            if not closing:
                if opened is not None:
                    found.append(_unclosed(opened))
                opened = tag
            elif opened is not None and opened[2] == name:
                found.append(_operation(_TAGS[name], reply[opened.end() : tag.start()].strip()))
                opened = None
        if opened is not None:
            found.append(_unclosed(opened))
        return found

    def write(self, operation: Operation) -> str:
        name = _NAMES[operation.kind]
        content = operation.text
        if operation.kind is OperationKind.UPDATE:
            content = f"{operation.target}: {operation.text}"
        elif operation.kind is OperationKind.DELETE:
            content = operation.target
        return f"<{name}>{content}</{name}>"

    def show(self, entries: Sequence[Entry]) -> str:
        # Continuation lines are indented, so that no entry can pass for two.
        return "\n".join(f"{entry.id}: " + "\n    ".join(entry.text.splitlines()) for entry in entries)

    def entry_id(self, target: str, shown: Sequence[str]) -> str:
        return target

    def describe(self, settings: EpisodeSettings) -> str:
        kinds = [kind for kind in OperationKind if kind.value in settings.operations]
        kinds += [OperationKind.SCRATCHPAD] * settings.scratchpad + [OperationKind.ANSWER]
        return "\n".join(
            f"<{_NAMES[kind]}>{form}</{_NAMES[kind]}>: {use}" for kind in kinds for form, use in [_EXPLANATIONS[kind]]
        )


def _unclosed(tag: re.Match[str]) -> OperationResult:
    return OperationResult(
        _TAGS[tag[2]], Fault.MALFORMED, f"<{tag[2]}> was not closed by </{tag[2]}>; nothing was done for it."
    )


def _operation(kind: OperationKind, content: str) -> Operation | OperationResult:
    if kind is OperationKind.UPDATE:
        target, colon, text = content.partition(":")
        if not colon:
            return OperationResult(kind, Fault.MALFORMED, "<update_memory> needs 'id: text'; nothing was updated.")
        return Operation(kind, text.strip(), target.strip())
    if kind is OperationKind.DELETE:
        return Operation(kind, target=content)
    if kind is OperationKind.ANSWER:
        return Operation(kind, _unboxed(content))
    return Operation(kind, content)


def _unboxed(answer: str) -> str:
    r"""What stands in the last `\boxed{…}`, or the answer itself where there is none that closes.

    >>> _unboxed("It is \\boxed{the {n}-th}.")
    'the {n}-th'
    """
    start = answer.rfind(_BOXED)
    if start < 0:
        return answer
    start += len(_BOXED)
    depth = 1
    for brace in re.finditer(r"[{}]", answer[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return answer[start : start + brace.start()].strip()
    return answer
