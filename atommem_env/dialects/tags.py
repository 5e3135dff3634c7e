"""The operations as XML-like tags: the AtomMem paper's form (arXiv 2601.08323)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

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

_FORMS = {
    OperationKind.CREATE: "text",
    OperationKind.READ: "query",
    OperationKind.UPDATE: "id: text",
    OperationKind.DELETE: "id",
    OperationKind.SCRATCHPAD: "text",
    OperationKind.ANSWER: "answer",
}

# What each operation is for, where entries are named by their ids; other dialects use these texts as well.
USES = {
    OperationKind.CREATE: "store a new entry in the memory.",
    OperationKind.READ: (
        "search the memory; the entries found are shown from your next turn on. Only the last search of a turn counts."
    ),
    OperationKind.UPDATE: "replace the text of the entry with that id, for example m3.",
    OperationKind.DELETE: "remove the entry with that id.",
    OperationKind.SCRATCHPAD: "replace your scratchpad, a note that is shown to you on every turn.",
    OperationKind.ANSWER: (
        "answer the question that is asked, as briefly as possible; unknown if the document did not tell."
    ),
}


class TagsDialect:
    """`<create_memory>text</create_memory>`, `<update_memory>m3: text</update_memory>`, `<final_answer>…</final_answer>` …

    A tag that is not closed before the next one opens is a fault; it does not affect what follows.

    >>> TagsDialect().parse("<create_memory>lost <delete_memory> m2 </delete_memory>")[1]
    Operation(kind=<OperationKind.DELETE: 'delete'>, text='', target='m2')
    """

    name = "tags"

    def parse(self, reply: str) -> list[Operation | OperationResult]:
        return [
            unclosed(_TAGS[name], name) if content is None else _operation(_TAGS[name], content)
            for name, content in elements(reply, _TAG)
        ]

    def write(self, operation: Operation) -> str:
        name = _NAMES[operation.kind]
        content = operation.text
        if operation.kind is OperationKind.UPDATE:
            content = f"{operation.target}: {operation.text}"
        elif operation.kind is OperationKind.DELETE:
            content = operation.target
        return f"<{name}>{content}</{name}>"

    def show(self, entries: Sequence[Entry]) -> str:
        return show_by_id(entries)

    def entry_id(self, target: str, shown: Sequence[str]) -> str:
        return target

    def describe(self, settings: EpisodeSettings) -> str:
        return "\n".join(f"<{_NAMES[kind]}>{_FORMS[kind]}</{_NAMES[kind]}>: {USES[kind]}" for kind in allowed(settings))


def elements(reply: str, tag: re.Pattern[str]) -> Iterator[tuple[str, str | None]]:
    """The elements of `reply`, in the order of their opening tags: name in lower case, and content.

    The content is None where the element was not closed before the next one opened, or not at all; a closing tag without an
    opening one is text. Takes time linear in the length.

    Args:
        reply: any text.
        tag: matches one tag; its groups are the slash of a closing tag, or "", and the name.

    >>> list(elements("<a> 1 </a><b><a>2</b></a>", re.compile("<(/?)([ab])>")))
    [('a', '1'), ('b', None), ('a', '2</b>')]
    """
    opened: str | None = None
    start = 0
    for match in tag.finditer(reply):
        name = match[2].lower()
        if not match[1]:
            if opened is not None:
                yield opened, None
            opened, start = name, match.end()
        elif name == opened:
            yield name, reply[start : match.start()].strip()
            opened = None
    if opened is not None:
        yield opened, None


def unclosed(kind: OperationKind | None, name: str) -> OperationResult:
    """The fault of an element without a closing tag."""
    return OperationResult(kind, Fault.MALFORMED, f"<{name}> was not closed by </{name}>; nothing was done for it.")


def show_by_id(entries: Sequence[Entry]) -> str:
    """The entries as `id: text`. Continuation lines are indented, so that no entry can look like two."""
    return "\n".join(f"{entry.id}: " + "\n    ".join(entry.text.splitlines()) for entry in entries)


def allowed(settings: EpisodeSettings) -> list[OperationKind]:
    """The kinds of operations that these settings allow."""
    kinds = [kind for kind in OperationKind if kind.value in settings.operations]
    return kinds + [OperationKind.SCRATCHPAD] * settings.scratchpad + [OperationKind.ANSWER]


def _operation(kind: OperationKind, content: str) -> Operation | OperationResult:
    if kind is OperationKind.UPDATE:
        target, colon, text = content.partition(":")
        if not colon:
            return OperationResult(kind, Fault.MALFORMED, "<update_memory> needs 'id: text'; nothing was updated.")
        return Operation(kind, text.strip(), target.strip())
    if kind is OperationKind.DELETE:
        return Operation(kind, target=content)
    if kind is OperationKind.ANSWER:
        return Operation(kind, unboxed(content))
    return Operation(kind, content)


def unboxed(answer: str) -> str:
    r"""The content of the last `\boxed{…}`; the answer itself where there is none, or it is not closed.

    >>> unboxed("It is \\boxed{the {n}-th}.")
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
