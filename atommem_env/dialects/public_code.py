r"""The operations as AtomMem's public code (RUCBM/AtomMem) writes them: other tags, and entries named by their index.

`Memory i` is the i-th entry shown in the observation, counted from 1. Also from that code's grammar: tags in any case and
with attributes, a `Delete` that repeats the entry's text, `\boxed{…}` around an answer, and `<think>` blocks, whose content
is ignored. The faults differ: an index out of range refers to no entry, a malformed or unclosed tag affects no other
operation, and no entry can look like two. That code advances as with the setting `advance="on_write"`, and explains the
operations in the layout `public_code:PATH`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from atommem_env.dialects.tags import USES, allowed, elements, unboxed, unclosed
from atommem_env.types import Entry, EpisodeSettings, Fault, Operation, OperationKind, OperationResult

_TAGS = {
    "add_memory": OperationKind.CREATE,
    "update_query": OperationKind.READ,
    "modify_memory": OperationKind.UPDATE,
    "delete_memory": OperationKind.DELETE,
    "update_memory": OperationKind.SCRATCHPAD,
    "final_answer": OperationKind.ANSWER,
}
_NAMES = {kind: name for name, kind in _TAGS.items()}
_TAG = re.compile(rf"<(/?)({'|'.join(_TAGS)})(?:\s[^<>]*)?>", re.IGNORECASE | re.ASCII)
_NAMED = re.compile(r"Memory\s+([0-9]+)\s*(?::(.*))?", re.DOTALL)
_INDEX = re.compile("[0-9]{1,9}")
# The start of a line within an entry that looks like another entry; the line breaks are those of `str.splitlines`.
_HEAD = re.compile(r"(?<=[\n\r\v\f\x1c-\x1e\x85\u2028\u2029])(?=Memory\s)")

_FORMS = {
    OperationKind.CREATE: ("text", USES[OperationKind.CREATE]),
    OperationKind.READ: ("query", USES[OperationKind.READ]),
    OperationKind.UPDATE: ("Memory i: text", "replace the text of the entry shown as Memory i, for example Memory 2."),
    OperationKind.DELETE: ("Memory i", "remove the entry shown as Memory i."),
    OperationKind.SCRATCHPAD: ("text", USES[OperationKind.SCRATCHPAD]),
    OperationKind.ANSWER: (r"\boxed{answer}", USES[OperationKind.ANSWER]),
}


class PublicCodeDialect:
    """`<add_memory>text</add_memory>`, `<modify_memory>Memory 2: text</modify_memory>`, `<update_query>query</update_query>` …

    >>> PublicCodeDialect().parse("<add_memory>lost <delete_memory>Memory 2</delete_memory>")[1]
    Operation(kind=<OperationKind.DELETE: 'delete'>, text='', target='2')
    """

    name = "public_code"

    def parse(self, reply: str) -> list[Operation | OperationResult]:
        if reply.lstrip().startswith("<think>") and "</think>" in reply:
            reply = reply.partition("</think>")[2]
        return [
            unclosed(_TAGS[name], name) if content is None else _operation(_TAGS[name], content)
            for name, content in elements(reply, _TAG)
        ]

    def write(self, operation: Operation) -> str:
        name = _NAMES[operation.kind]
        content = operation.text
        if operation.kind is OperationKind.UPDATE:
            content = f"Memory {operation.target}: {operation.text}"
        elif operation.kind is OperationKind.DELETE:
            content = f"Memory {operation.target}"
        elif operation.kind is OperationKind.ANSWER:
            boxed = f"\\boxed{{{operation.text}}}"
            content = boxed if unboxed(boxed) == operation.text else content  # unbalanced braces cannot be boxed
        return f"<{name}>{content}</{name}>"

    def show(self, entries: Sequence[Entry]) -> str:
        # Only a line that looks like an entry is indented: everything else is shown as that code shows it.
        return "\n".join(
            f"Memory {index}: {_HEAD.sub('    ', entry.text)}" for index, entry in enumerate(entries, start=1)
        )

    def entry_id(self, target: str, shown: Sequence[str]) -> str:
        """The id of the entry shown at the index `target`; where there is none, `Memory …`, which is no entry's id.

        >>> [PublicCodeDialect().entry_id(target, ["m4", "m9"]) for target in ("2", "0", "3")]
        ['m9', 'Memory 0', 'Memory 3']
        """
        if _INDEX.fullmatch(target) and 1 <= int(target) <= len(shown):
            return shown[int(target) - 1]
        return f"Memory {target}"

    def describe(self, settings: EpisodeSettings) -> str:
        return "\n".join(
            f"<{_NAMES[kind]}>{form}</{_NAMES[kind]}>: {use}"
            for kind in allowed(settings)
            for form, use in [_FORMS[kind]]
        )


def _operation(kind: OperationKind, content: str) -> Operation | OperationResult:
    if kind in (OperationKind.UPDATE, OperationKind.DELETE):
        named = _NAMED.fullmatch(content)
        if named is None or (named[2] is None and kind is OperationKind.UPDATE):
            form = "Memory i: text" if kind is OperationKind.UPDATE else "Memory i"
            return OperationResult(kind, Fault.MALFORMED, f"<{_NAMES[kind]}> needs '{form}'; nothing was {kind}d.")
        return Operation(kind, named[2].strip() if kind is OperationKind.UPDATE else "", named[1])
    return Operation(kind, unboxed(content) if kind is OperationKind.ANSWER else content)
