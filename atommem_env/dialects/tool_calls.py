"""The operations as JSON function calls, for models trained to call tools.

They are written in the form of Hermes and Qwen, one call in each `<tool_call>`:

    <tool_call>
    {"name": "update_memory", "arguments": {"id": "m3", "text": "Ada lives in Rome."}}
    </tool_call>

Also parsed: a list of calls in one `<tool_call>`, and a reply that is only JSON in OpenAI's form, as one call, a list of calls
or a message with its `tool_calls`.

The functions as schemas, to pass as tools to a model, and the conversion of OpenAI's responses into a reply:

    chat.apply_chat_template(messages, tools=schemas(settings))
    response = client.chat.completions.create(messages=messages, tools=schemas(settings), model=…)
    reply = reply_of(response.choices[0].message.tool_calls)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from atommem_env.dialects.tags import USES, allowed, elements, show_by_id, unclosed
from atommem_env.types import Entry, EpisodeSettings, Fault, Operation, OperationKind, OperationResult

# function → what it does, and what its arguments are; all arguments are strings and none may be missing
_FUNCTIONS = {
    "create_memory": (OperationKind.CREATE, {"text": "The new entry."}),
    "read_memory": (OperationKind.READ, {"query": "What to search for."}),
    "update_memory": (OperationKind.UPDATE, {"id": "The entry's id.", "text": "Its new text."}),
    "delete_memory": (OperationKind.DELETE, {"id": "The entry's id."}),
    "update_scratchpad": (OperationKind.SCRATCHPAD, {"text": "The new scratchpad."}),
    "final_answer": (OperationKind.ANSWER, {"answer": "The answer."}),
}
_NAMES = {kind: name for name, (kind, _) in _FUNCTIONS.items()}
_TAG = re.compile("<(/?)(tool_call)>")
_TAG_IN_TEXT = re.compile("<(?=/?tool_call>)")
_ILLEGAL = re.compile("[\ud800-\udfff\x00]")
_REPEATED = "A call had the same key twice"
_FORM = '{"name": "…", "arguments": {…}}'


class _RepeatedKey:
    """A JSON object with a repeated key, which parsers interpret differently."""


class ToolCallsDialect:
    """`<tool_call>{"name": "create_memory", "arguments": {"text": "…"}}</tool_call>` …

    A call that cannot be parsed is a fault, and the others are carried out. Any text can be written, even one that contains
    `</tool_call>`; only outer whitespace is lost, as in every dialect.

    >>> ToolCallsDialect().parse('[{"name": "delete_memory", "arguments": {"id": "m2"}}]')
    [Operation(kind=<OperationKind.DELETE: 'delete'>, text='', target='m2')]
    """

    name = "tool_calls"

    def parse(self, reply: str) -> list[Operation | OperationResult]:
        if reply.lstrip()[:1] in ("{", "["):
            value = _decode(reply)
            if value is not None or "<tool_call>" not in reply:
                return list(_operations(value))
        operations: list[Operation | OperationResult] = []
        for name, content in elements(reply, _TAG):
            operations += [unclosed(None, name)] if content is None else _operations(_decode(content))
        return operations

    def write(self, operation: Operation) -> str:
        _, parameters = _FUNCTIONS[_NAMES[operation.kind]]
        arguments = {name: operation.target if name == "id" else operation.text for name in parameters}
        return _call(_NAMES[operation.kind], arguments)

    def show(self, entries: Sequence[Entry]) -> str:
        return show_by_id(entries)

    def entry_id(self, target: str, shown: Sequence[str]) -> str:
        return target

    def describe(self, settings: EpisodeSettings) -> str:
        lines = [
            f"<tool_call>{_json({'name': _NAMES[kind], 'arguments': dict.fromkeys(parameters, '…')})}</tool_call>: {USES[kind]}"
            for kind in allowed(settings)
            for _, parameters in [_FUNCTIONS[_NAMES[kind]]]
        ]
        return "\n".join(
            ["Write JSON between <tool_call> and </tool_call>, and a string of yours for each … in it.", *lines]
        )


def schemas(settings: EpisodeSettings) -> list[dict[str, Any]]:
    """The functions that these settings allow, as OpenAI's `tools`; chat templates accept the same.

    >>> [tool["function"]["name"] for tool in schemas(EpisodeSettings(operations=("create", "read"), scratchpad=False))]
    ['create_memory', 'read_memory', 'final_answer']
    """
    return [
        {
            "type": "function",
            "function": {
                "name": _NAMES[kind],
                "description": USES[kind][0].upper() + USES[kind][1:],
                "parameters": {
                    "type": "object",
                    "properties": {name: {"type": "string", "description": what} for name, what in parameters.items()},
                    "required": list(parameters),
                    "additionalProperties": False,
                },
            },
        }
        for kind in allowed(settings)
        for _, parameters in [_FUNCTIONS[_NAMES[kind]]]
    ]


def reply_of(tool_calls: Sequence[Any] | None) -> str:
    """The reply that is equivalent to the `tool_calls` of a message from an OpenAI-compatible server.

    Args:
        tool_calls: objects of the package `openai`, or the same as dictionaries; None: no calls.

    >>> print(reply_of([{"type": "function", "function": {"name": "read_memory", "arguments": '{"query": "Ada"}'}}]))
    <tool_call>
    {"name": "read_memory", "arguments": {"query": "Ada"}}
    </tool_call>
    """
    texts = []
    for call in tool_calls or ():
        function = (call if isinstance(call, Mapping) else call.model_dump())["function"]
        written = function["arguments"]
        arguments = _decode(written) if isinstance(written, str) else written
        # Invalid arguments are left unchanged: they become a fault that the model is shown.
        texts.append(_call(function["name"], arguments if _is_texts(arguments) else written))
    return "\n".join(texts)


def _call(name: str, arguments: Any) -> str:
    return f"<tool_call>\n{_json({'name': name, 'arguments': arguments})}\n</tool_call>"


def _json(value: Any) -> str:
    # A `<` can only be inside a string, where it may be escaped: no text can open or close a call.
    return _TAG_IN_TEXT.sub(r"\\u003c", json.dumps(value, ensure_ascii=False))


def _decode(text: str) -> Any:
    """The JSON value, or None where `text` is not valid JSON."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=float)  # an int of 5,000 digits would raise
    except (json.JSONDecodeError, RecursionError):
        return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _RepeatedKey:
    members = dict(pairs)
    return members if len(members) == len(pairs) else _RepeatedKey()


def _operations(value: Any) -> Iterator[Operation | OperationResult]:
    """The operations of a call, of a list of calls, or of a message."""
    if isinstance(value, dict) and "tool_calls" in value and "name" not in value:
        value = [] if value["tool_calls"] is None else value["tool_calls"]
    for call in value if isinstance(value, list) else [value]:
        yield _operation(call)


def _operation(call: Any) -> Operation | OperationResult:
    if isinstance(call, dict) and "function" in call:
        call = call["function"]
    if isinstance(call, _RepeatedKey):
        return _fault(None, _REPEATED)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return _fault(None, f"A call needs to be JSON like {_FORM}")
    if call["name"] not in _FUNCTIONS:
        return _fault(None, f"There is no function {call['name'][:40]!r}")
    kind, parameters = _FUNCTIONS[call["name"]]
    arguments: Any = call.get("arguments")
    if isinstance(arguments, str):
        arguments = _decode(arguments)
    if isinstance(arguments, _RepeatedKey):
        return _fault(kind, _REPEATED)
    if not _is_texts(arguments) or set(arguments) != set(parameters):
        return _fault(kind, f"{call['name']} needs the arguments {' and '.join(parameters)}, as strings, and no others")
    if any(map(_ILLEGAL.search, arguments.values())):
        return _fault(kind, f"{call['name']} had an escaped character that cannot be stored")
    named = {name: text.strip() for name, text in arguments.items()}
    target = named.pop("id", "")
    return Operation(kind, "".join(named.values()), target)


def _is_texts(arguments: Any) -> bool:
    return isinstance(arguments, dict) and all(isinstance(text, str) for text in arguments.values())


def _fault(kind: OperationKind | None, what: str) -> OperationResult:
    return OperationResult(kind, Fault.MALFORMED, f"{what}; nothing was done for it.")
