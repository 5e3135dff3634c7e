"""Every dialect: what is written is read back, any text is read, and no fault of the public code's parser is ours."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.registry import load_policy
from atommem_env.dialects import get_dialect
from atommem_env.dialects.tool_calls import reply_of, schemas
from atommem_env.embedders import embed, get_embedder
from atommem_env.episode import Episode
from atommem_env.errors import SettingError
from atommem_env.tasks import make_source
from atommem_env.types import Entry, EpisodeSettings, Fault, Operation, OperationKind, OperationResult, StepResult

TAGS, PUBLIC, CALLS = (get_dialect(name) for name in ("tags", "public_code", "tool_calls"))
DIALECTS = [TAGS, PUBLIC, CALLS]
every_dialect = pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)

_NAMES = ("create_memory", "read_memory", "update_memory", "delete_memory", "update_scratchpad", "final_answer")
NAMES = {  # of each dialect, what writes an operation
    "tags": _NAMES,
    "public_code": ("add_memory", "update_query", "modify_memory", "delete_memory", "update_memory", "final_answer"),
    "tool_calls": _NAMES,
}
ORDER = list(OperationKind)  # create, read, update, delete, scratchpad, answer: that of NAMES
TARGETS = {"tags": "m{}", "public_code": "{}", "tool_calls": "m{}"}  # the i-th entry, or the i-th shown
PIECES = [
    *'<>/{}[]:,"\\ \nm1a',
    *(
        "\\boxed{",
        "\\u0000",
        "\\ud800",
        "null",
        "1e999",
        "NaN",
        "Memory 1",
        "Memory 0: ",
        "\r\n",
        "\u2028",
        "\x1b",
        "漢",
    ),
    *("</add_memory >", "<Add_Memory>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
    *(f"<{slash}{name}>" for names in NAMES.values() for name in names for slash in ("", "/")),
    *(
        '{"name": "create_memory", "arguments": {"text": "a"}}',
        '"name"',
        '{"name": "',
        '"arguments": {',
        '"tool_calls": [',
    ),
]
RUBBISH = st.lists(st.sampled_from(PIECES) | st.text(max_size=5)).map("".join)


def can_hold(dialect: str, kind: OperationKind, text: str) -> bool:
    """Whether `text` can be written; this is what the `Dialect` protocol says of it."""
    if text != text.strip() or re.search("[\ud800-\udfff\0]", text):
        return False
    if dialect == "tool_calls":
        return True
    end = r"(\s[^<>]*)?>" if dialect == "public_code" else ">"
    if re.search(f"</?({'|'.join(NAMES[dialect])}){end}", text, re.IGNORECASE if dialect == "public_code" else 0):
        return False
    return kind is not OperationKind.ANSWER or "\\boxed{" not in text


@st.composite
def operations(draw: st.DrawFn, dialect: str) -> Operation:
    """Any operation that the dialect can write."""
    kind = draw(st.sampled_from(ORDER))
    text = draw((RUBBISH.map(str.strip)).filter(lambda text: can_hold(dialect, kind, text)))
    named = kind in (OperationKind.UPDATE, OperationKind.DELETE)
    target = TARGETS[dialect].format(draw(st.integers(0, 9999))) if named else ""
    return Operation(kind, "" if kind is OperationKind.DELETE else text, target)


def play(episode: Episode, *written: Operation | str) -> StepResult:
    dialect = get_dialect(episode.settings.dialect)
    reply = "\n".join(item if isinstance(item, str) else dialect.write(item) for item in written)
    return episode.resolve(embed(get_embedder("hashing"), episode.submit(reply)))


def two_entries(dialect: str) -> Episode:
    """An episode in which m1, "Ada in Rome", is the first entry shown, and m2, "Bo in Oslo", the second."""
    task = make_source("synthetic", num_docs=12).task(0, 0)
    episode = Episode(task, EpisodeSettings(dialect=dialect, chunk_tokens=40), seed=0)
    texts = ("Ada in Rome", "Bo in Oslo")
    play(episode, *(Operation(OperationKind.CREATE, text) for text in texts), Operation(OperationKind.READ, "Ada Rome"))
    assert [line.split(": ")[1] for line in episode.observe()["retrieved"].splitlines()] == list(texts)
    return episode


def texts(episode: Episode) -> dict[str, str]:
    return {entry.id: entry.text for entry in episode.memory.entries()}


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("dialect", "reply"),
    [
        (
            TAGS,
            (
                "I keep this. <create_memory> Ada lives in Rome. </create_memory> and <delete_memory>m2</delete_memory>"
                "<update_memory>m1: Bo: a cook</update_memory><read_memory>Ada</read_memory>"
                "<update_scratchpad></update_scratchpad><final_answer>It is \\boxed{Rome}.</final_answer>"
            ),
        ),
        (
            PUBLIC,
            (
                "I keep this. <add_memory>\nAda lives in Rome.\n</add_memory> and <delete_memory>Memory 2</delete_memory>"
                "<modify_memory>Memory 1: Bo: a cook</modify_memory><update_query>Ada</update_query>"
                "<update_memory></update_memory><final_answer>It is \\boxed{Rome}.</final_answer>"
            ),
        ),
        (
            CALLS,
            (
                'I keep this. <tool_call>{"name": "create_memory", "arguments": {"text": " Ada lives in Rome. "}}</tool_call>'
                '<tool_call>[{"name": "delete_memory", "arguments": {"id": "m2"}},'
                ' {"name": "update_memory", "arguments": {"text": "Bo: a cook", "id": "m1"}}]</tool_call> and'
                '<tool_call>\n{"name": "read_memory", "arguments": "{\\"query\\": \\"Ada\\"}"}\n</tool_call>'
                '<tool_call>{"name": "update_scratchpad", "arguments": {"text": ""}}</tool_call>'
                '<tool_call>{"name": "final_answer", "arguments": {"answer": "Rome"}}</tool_call>'
            ),
        ),
    ],
    ids=["tags", "public_code", "tool_calls"],
)
def test_a_reply_is_read_in_the_order_written(dialect: Any, reply: str) -> None:
    one, two = (TARGETS[dialect.name].format(index) for index in (1, 2))
    assert dialect.parse(reply) == [
        Operation(OperationKind.CREATE, "Ada lives in Rome."),
        Operation(OperationKind.DELETE, target=two),
        Operation(OperationKind.UPDATE, "Bo: a cook", one),
        Operation(OperationKind.READ, "Ada"),
        Operation(OperationKind.SCRATCHPAD, ""),
        Operation(OperationKind.ANSWER, "Rome"),
    ]


@every_dialect
@given(data=st.data())
def test_what_is_written_is_read_back(dialect: Any, data: st.DataObject) -> None:
    written = data.draw(st.lists(operations(dialect.name), max_size=3))
    assert dialect.parse("thinking" + "".join(map(dialect.write, written)) + "done") == written


@every_dialect
@given(reply=RUBBISH)
def test_any_text_is_read_and_an_operation_costs_its_name(dialect: Any, reply: str) -> None:
    parsed = dialect.parse(reply)
    mentions = sum(reply.lower().count(name) for name in NAMES[dialect.name])
    assert sum(isinstance(item, Operation) for item in parsed) <= mentions
    faults = [item for item in parsed if isinstance(item, OperationResult)]
    assert all(item.fault is Fault.MALFORMED and item.detail.isprintable() for item in faults)


LONG = {  # of each dialect: what a reply may begin with, and what then comes again and again
    "tags": (
        ("", "<final_answer>"),
        ("<create_memory>", "</create_memory>", "<create_memory>a</create_memory>", "\\boxed{", "a"),
    ),
    "public_code": (
        ("", "<modify_memory>", "<final_answer>"),
        ("<add_memory>", "<add_memory ", "Memory 1 ", "<think>", "1", " "),
    ),
    "tool_calls": (
        ("", '<tool_call>{"name": '),
        ("<tool_call>", "</tool_call>", '<tool_call>{"', "<tool_call>[</tool_call>", "[", '{"a":', '"', "1", "\\"),
    ),
}


@pytest.mark.parametrize(("dialect", "piece"), [(name, piece) for name in LONG for piece in LONG[name][1]])
def test_reading_is_linear_in_the_length(dialect: str, piece: str) -> None:
    close = "</tool_call>" if dialect == "tool_calls" else f"</{LONG[dialect][0][-1][1:]}"

    def seconds(length: int) -> float:
        start = time.process_time()
        for opening in LONG[dialect][0]:
            get_dialect(dialect).parse(opening + piece * (length // len(piece)) + close)
        return time.process_time() - start

    # 16 times the text in far less than 16² times the time; the best of two, so that a busy machine does not matter.
    assert min(seconds(400_000) for _ in range(2)) < 100 * max(min(seconds(25_000) for _ in range(2)), 1e-3)


@pytest.mark.parametrize(
    "reply",
    [
        "<create_memory>a<read_memory>q</read_memory>",
        "<create_memory>a<read_memory>q</read_memory></create_memory>",
        "<read_memory>q</read_memory><create_memory>cut by the len",
    ],
)
def test_an_unclosed_tag_is_one_fault_and_nothing_else_is_lost(reply: str) -> None:
    calls = re.sub("<read_memory>q</read_memory>", CALLS.write(Operation(OperationKind.READ, "q")), reply)
    calls = calls.replace("<create_memory>", '<tool_call>{"name": "create_memory", "arguments": {"text": "')
    public = reply.replace("create_memory", "add_memory").replace("read_memory", "update_query")
    for dialect, text in ((TAGS, reply), (PUBLIC, public), (CALLS, calls)):
        parsed = dialect.parse(text)
        assert [item.fault for item in parsed if isinstance(item, OperationResult)] == [Fault.MALFORMED]
        assert [item for item in parsed if isinstance(item, Operation)] == [Operation(OperationKind.READ, "q")]


# ------------------------------------------------------------------------------------------ the faults of the public code

MALFORMED_UPDATES = [
    (TAGS, "<update_memory>no colon</update_memory>"),
    (PUBLIC, "<modify_memory>no number: text</modify_memory>"),
    (PUBLIC, "<modify_memory>Memory 1</modify_memory>"),
    (CALLS, '<tool_call>{"name": "update_memory", "arguments": {"text": "no id"}}</tool_call>'),
    (CALLS, '<tool_call>{"name": "update_memory", "arguments": {"id": 1, "text": "a number"}}</tool_call>'),
]


@pytest.mark.parametrize(("dialect", "malformed"), MALFORMED_UPDATES)
def test_fault_2_a_malformed_update_does_not_drop_the_rest_of_the_reply(dialect: Any, malformed: str) -> None:
    first, second = dialect.parse(malformed + dialect.write(Operation(OperationKind.CREATE, "kept")))
    assert isinstance(first, OperationResult)
    assert (first.kind, first.fault) == (OperationKind.UPDATE, Fault.MALFORMED)
    assert second == Operation(OperationKind.CREATE, "kept")


@every_dialect
@pytest.mark.parametrize(
    "written", [[], [Operation(OperationKind.SCRATCHPAD, "a note")], [Operation(ORDER[3], "", "{}")]]
)
def test_fault_2_a_reply_that_writes_no_entry_turns_the_page(dialect: Any, written: list[Operation]) -> None:
    episode = two_entries(dialect.name)
    before = episode.observe()["chunk"]
    target = TARGETS[dialect.name].format(2)
    play(episode, *(Operation(item.kind, item.text, item.target.format(target)) for item in written))
    assert episode.observe()["chunk"] != before


@every_dialect
@pytest.mark.parametrize(
    "index", ["0", "3", "-1", "00", "999999999999999999999", "9" * 5000, "²", "1.0", "", "\U0001d7ce"]
)
def test_fault_3_a_place_or_an_id_of_no_entry_is_a_fault_and_changes_nothing(dialect: Any, index: str) -> None:
    target = TARGETS[dialect.name].format(index)
    for operation in (Operation(OperationKind.UPDATE, "new", target), Operation(OperationKind.DELETE, "", target)):
        episode = two_entries(dialect.name)
        result = play(episode, operation)
        assert [item.fault in (Fault.UNKNOWN_ID, Fault.MALFORMED) for item in result.results] == [True]
        assert result.observation["notice"]
        assert texts(episode) == {"m1": "Ada in Rome", "m2": "Bo in Oslo"}


@every_dialect
def test_fault_3_two_updates_of_one_entry_leave_one_and_the_last_text(dialect: Any) -> None:
    episode = two_entries(dialect.name)
    target = TARGETS[dialect.name].format(1)
    play(episode, *(Operation(OperationKind.UPDATE, text, target) for text in ("Ada in Paris", "Ada in Bern")))
    assert texts(episode) == {"m1": "Ada in Bern", "m2": "Bo in Oslo"}


@every_dialect
def test_fault_3_names_are_those_of_the_observation_whatever_the_reply_does_first(dialect: Any) -> None:
    episode = two_entries(dialect.name)
    one, two = (TARGETS[dialect.name].format(index) for index in (1, 2))
    result = play(
        episode,
        Operation(OperationKind.DELETE, target=one),
        Operation(OperationKind.UPDATE, "Bo in Bergen", two),
        Operation(OperationKind.UPDATE, "nobody", one),
    )
    assert [item.fault for item in result.results] == [None, None, Fault.UNKNOWN_ID]
    assert texts(episode) == {"m2": "Bo in Bergen"}


# ------------------------------------------------------------------------------------------------- showing and explaining

HEADS = {"tags": r"(m[0-9]+): ", "public_code": r"Memory ([0-9]+): ?", "tool_calls": r"(m[0-9]+): "}


@every_dialect
@given(
    texts=st.lists(
        st.lists(st.sampled_from(["m8: ", "Memory 2: ", *"\n\r\v\f\x1c\x85\u2028 a:"])).map("".join), max_size=4
    )
)
def test_an_entry_cannot_pass_for_two(dialect: Any, texts: list[str]) -> None:
    entries = [Entry(f"m{7 + 2 * index}", text.strip()) for index, text in enumerate(texts)]
    shown = dialect.show(entries)
    heads = [match[1] for line in shown.splitlines() if (match := re.match(HEADS[dialect.name], line))]
    assert [dialect.entry_id(head, [entry.id for entry in entries]) for head in heads] == [
        entry.id for entry in entries
    ]
    squeezed = "".join(shown.split())
    assert all("".join(entry.text.split()) in squeezed for entry in entries)


def test_public_code_shows_plain_entries_as_that_code_does() -> None:
    entries = [Entry("m7", "first\n- a line"), Entry("m2", "second\nMemory 9: forged")]
    assert PUBLIC.show(entries) == "Memory 1: first\n- a line\nMemory 2: second\n    Memory 9: forged"


@every_dialect
@given(
    names=st.sets(st.sampled_from(["create", "read", "update", "delete"])),
    scratchpad=st.booleans(),
)
def test_the_description_names_what_exists_and_nothing_else(dialect: Any, names: set[str], scratchpad: bool) -> None:
    settings = EpisodeSettings(operations=tuple(names), scratchpad=scratchpad)
    exist = {*names, "answer", *(["scratchpad"] if scratchpad else [])}
    text = dialect.describe(settings)
    assert {kind.value for kind, name in zip(ORDER, NAMES[dialect.name], strict=True) if name in text} == exist
    if dialect is CALLS:
        named = [tool["function"]["name"] for tool in schemas(settings)]
        assert named == [name for kind, name in zip(ORDER, NAMES["tool_calls"], strict=True) if kind.value in exist]


@every_dialect
def test_what_the_description_shows_can_be_read(dialect: Any) -> None:
    example = dialect.describe(EpisodeSettings())
    example = example.replace("Memory i", "Memory 2").replace("id: text", "m1: text")
    parsed = dialect.parse(example)
    assert {item.kind for item in parsed if isinstance(item, Operation)} == set(OperationKind)
    assert not [item for item in parsed if isinstance(item, OperationResult) and item.kind is not None]


@every_dialect
def test_the_oracle_does_as_well_as_with_tags(dialect: Any) -> None:
    def played(name: str, index: int) -> tuple[float, int, dict[str, str], str]:
        settings = EpisodeSettings(dialect=name, chunk_tokens=256)
        task = make_source("synthetic", num_docs=40, questions=2).task(index, 5)
        policy = load_policy("oracle", settings)
        act: Any = policy.begin(0, task)
        episode = Episode(task, settings, seed=0)
        while episode.stop_reason is None:
            result = play(episode, act(episode.observe()))
            assert not [item for item in result.results if item.fault]
        return episode.reward, episode.steps, texts(episode), episode.query

    for index in range(3):
        assert played(dialect.name, index) == played("tags", index)
        assert played(dialect.name, index)[0] == 1.0


# -------------------------------------------------------------------------------------------------------- one dialect each


def test_public_code_reads_tags_in_any_case_and_with_attributes_and_no_thoughts() -> None:
    reply = (
        "<think>I could <add_memory>this</add_memory></think>\n<Add_Memory n='1'>kept</ADD_MEMORY>"
        "<delete_memory>Memory 3: the old text</delete_memory><final_anſwer>no tag</final_anſwer>"
    )
    assert PUBLIC.parse(reply) == [Operation(OperationKind.CREATE, "kept"), Operation(OperationKind.DELETE, target="3")]
    assert PUBLIC.parse("<think>cut <add_memory>kept</add_memory>") == [Operation(OperationKind.CREATE, "kept")]


def test_public_code_turns_the_page_when_an_entry_was_written_if_so_set() -> None:
    task = make_source("synthetic", num_docs=12).task(0, 0)
    episode = Episode(task, EpisodeSettings(dialect="public_code", advance="on_write", chunk_tokens=40), seed=0)
    first = episode.observe()["chunk"]
    assert play(episode, "<update_query>Ada</update_query>").observation["chunk"] == first
    second = play(episode, "<add_memory>Ada in Rome</add_memory>").observation["chunk"]
    assert second != first
    assert play(episode, "<modify_memory>Memory 1: Ada in Bern</modify_memory>").observation["chunk"] != second


def openai_call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def test_tool_calls_reads_openais_form() -> None:
    calls = [
        openai_call("create_memory", {"text": "</tool_call> \ud83d\ude00"}),
        openai_call("delete_memory", {"id": "m1"}),
    ]
    create, delete = Operation(OperationKind.CREATE, "</tool_call> 😀"), Operation(OperationKind.DELETE, target="m1")
    message = {"role": "assistant", "content": "<tool_call>", "tool_calls": calls}
    assert CALLS.parse(json.dumps(calls[1])) == [delete]
    assert CALLS.parse("\n" + json.dumps(calls)) == [create, delete]
    assert CALLS.parse(json.dumps(message)) == [create, delete]
    assert CALLS.parse(json.dumps({**message, "tool_calls": None})) == []
    assert CALLS.parse("[a note] " + CALLS.write(delete)) == [delete]
    assert CALLS.parse("I have nothing to keep.") == []


@pytest.mark.parametrize(
    ("call", "detail"),
    [
        ('{"name": "create_memory", "arguments": {"text": "a"}', "JSON like"),
        ('"create_memory"', "JSON like"),
        ("", "JSON like"),
        ("[" * 100_000, "JSON like"),
        ("1" * 100_000, "JSON like"),
        ('{"name": ["create_memory"], "arguments": {"text": "a"}}', "JSON like"),
        ('{"name": "forget", "arguments": {"text": "a"}}', "no function 'forget'"),
        ('{"name": "\\ud800", "arguments": {}}', r"no function '\\ud800'"),
        ('{"name": "create_memory"}', "the arguments text, as strings"),
        ('{"name": "create_memory", "arguments": {}}', "the arguments text"),
        ('{"name": "create_memory", "arguments": {"text": "a", "id": "m1"}}', "no others"),
        ('{"name": "create_memory", "arguments": {"text": ["a"]}}', "as strings"),
        ('{"name": "create_memory", "arguments": "a"}', "as strings"),
        ('{"name": "update_memory", "arguments": {"id": 3, "text": "a"}}', "id and text, as strings"),
        ('{"name": "create_memory", "name": "create_memory", "arguments": {"text": "a"}}', "same key twice"),
        ('{"name": "create_memory", "arguments": {"text": "a", "text": "b"}}', "same key twice"),
        ('{"name": "create_memory", "arguments": {"text": "\\ud800"}}', "cannot be stored"),
        ('{"name": "delete_memory", "arguments": {"id": "m1\\u0000"}}', "cannot be stored"),
    ],
)
def test_tool_calls_says_what_is_wrong_with_a_call_and_reads_the_others(call: str, detail: str) -> None:
    other = CALLS.write(Operation(OperationKind.READ, "q"))
    first, fault, last = CALLS.parse(f"{other}<tool_call>{call}</tool_call>{other}")
    assert first == last == Operation(OperationKind.READ, "q")
    assert isinstance(fault, OperationResult)
    assert fault.fault is Fault.MALFORMED
    assert re.search(re.escape(detail).replace(r"\\\\", r"\\"), fault.detail), fault.detail


def test_schemas_are_what_openai_and_chat_templates_take() -> None:
    pydantic = pytest.importorskip("pydantic")
    openai_types = pytest.importorskip("openai.types.chat")
    templates = pytest.importorskip("transformers.utils.chat_template_utils")
    tools = schemas(EpisodeSettings())
    adapter = pydantic.TypeAdapter(openai_types.ChatCompletionToolParam)
    assert [adapter.validate_python(tool, strict=True)["function"]["name"] for tool in tools] == list(
        NAMES["tool_calls"]
    )
    (text,), _ = templates.render_jinja_template(
        [[{"role": "user", "content": "Go on."}]],
        tools=tools,
        chat_template="{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}",
    )
    assert [json.loads(line) for line in text.splitlines()] == tools
    for kind, tool in zip(ORDER, tools, strict=True):
        call = json.loads(CALLS.write(Operation(kind, "text", "m1")).splitlines()[1])
        assert call["name"] == tool["function"]["name"]
        assert list(call["arguments"]) == tool["function"]["parameters"]["required"]


def test_an_openai_response_is_a_reply() -> None:
    openai_types = pytest.importorskip("openai.types.chat")
    broken = {
        "id": "call_2",
        "type": "function",
        "function": {"name": "create_memory", "arguments": '{"text": "cut by'},
    }
    calls = [openai_call("create_memory", {"text": "</tool_call>"}), broken, openai_call("read_memory", {"query": 1})]
    message = openai_types.ChatCompletionMessage.model_validate(
        {"role": "assistant", "content": None, "tool_calls": calls}
    )
    for reply in (reply_of(message.tool_calls), reply_of(calls)):
        first, *faults = CALLS.parse(reply)
        assert first == Operation(OperationKind.CREATE, "</tool_call>")
        assert [(item.kind, item.fault) for item in faults if isinstance(item, OperationResult)] == [
            (OperationKind.CREATE, Fault.MALFORMED),
            (OperationKind.READ, Fault.MALFORMED),
        ]
    assert reply_of(None) == ""


def test_an_unknown_dialect_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingError, match=r"public_code, tags, tool_calls, .*'xml'"):
        get_dialect("xml")
