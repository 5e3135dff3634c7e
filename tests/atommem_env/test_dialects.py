import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atommem_env.dialects import get_dialect
from atommem_env.errors import SettingError
from atommem_env.types import Entry, EpisodeSettings, Fault, Operation, OperationKind, OperationResult

TAGS = get_dialect("tags")
CONTENT = st.text(min_size=1).map(str.strip).filter(lambda text: text and "<" not in text and "\\boxed" not in text)


def test_a_reply_is_read_in_the_order_written() -> None:
    reply = (
        "I keep this. <create_memory> Ada lives in Rome. </create_memory> and <delete_memory>m2</delete_memory>"
        "<update_memory>m1: Bo: a cook</update_memory><read_memory>Ada</read_memory>"
        "<update_scratchpad></update_scratchpad><final_answer>It is \\boxed{Rome}.</final_answer>"
    )
    assert TAGS.parse(reply) == [
        Operation(OperationKind.CREATE, "Ada lives in Rome."),
        Operation(OperationKind.DELETE, target="m2"),
        Operation(OperationKind.UPDATE, "Bo: a cook", "m1"),
        Operation(OperationKind.READ, "Ada"),
        Operation(OperationKind.SCRATCHPAD, ""),
        Operation(OperationKind.ANSWER, "Rome"),
    ]


def test_fault_2_a_malformed_update_does_not_drop_the_rest_of_the_reply() -> None:
    first, second = TAGS.parse("<update_memory>no colon</update_memory><create_memory>kept</create_memory>")
    assert isinstance(first, OperationResult)
    assert first.fault is Fault.MALFORMED
    assert second == Operation(OperationKind.CREATE, "kept")


@pytest.mark.parametrize(
    "reply",
    [
        "<create_memory>a<read_memory>q</read_memory>",
        "<create_memory>a<read_memory>q</read_memory></create_memory>",
        "<read_memory>q</read_memory><create_memory>cut by the len",
    ],
)
def test_an_unclosed_tag_is_one_fault_and_nothing_else_is_lost(reply: str) -> None:
    found = TAGS.parse(reply)
    assert [item.fault for item in found if isinstance(item, OperationResult)] == [Fault.MALFORMED]
    assert [item for item in found if isinstance(item, Operation)] == [Operation(OperationKind.READ, "q")]


@given(st.sampled_from(list(OperationKind)), CONTENT, st.from_regex(r"m[1-9][0-9]{0,3}", fullmatch=True))
def test_what_is_written_is_read_back(kind: OperationKind, text: str, target: str) -> None:
    operation = Operation(
        kind,
        "" if kind is OperationKind.DELETE else text,
        target if kind in (OperationKind.UPDATE, OperationKind.DELETE) else "",
    )
    assert TAGS.parse("thinking" + TAGS.write(operation) + "done") == [operation]


@given(st.lists(st.sampled_from([*"<>/{}: \nm1", "<create_memory>", "</create_memory>", "<final_answer>", "\\boxed{"])))
def test_any_text_is_read_and_no_operation_comes_from_outside_of_tags(pieces: list[str]) -> None:
    found = TAGS.parse("".join(pieces))
    assert len(found) <= pieces.count("<create_memory>") + pieces.count("<final_answer>")


@pytest.mark.parametrize(
    "piece", ["<create_memory>", "</create_memory>", "<create_memory>a</create_memory>", "\\boxed{", "a"]
)
def test_reading_is_linear_in_the_length(piece: str) -> None:
    def seconds(length: int) -> float:
        reply = "<final_answer>" + piece * (length // len(piece)) + "</final_answer>"
        start = time.perf_counter()
        TAGS.parse(reply)
        return time.perf_counter() - start

    # 16 times the text in far less than 16² times the time; the best of three, so that a busy machine does not matter.
    assert min(seconds(1_600_000) for _ in range(3)) < 100 * max(min(seconds(100_000) for _ in range(3)), 1e-3)


def test_an_entry_cannot_pass_for_two() -> None:
    shown = TAGS.show([Entry("m7", "first\nm8: not an entry"), Entry("m9", "second")])
    assert [line.split(":")[0] for line in shown.splitlines() if not line.startswith(" ")] == ["m7", "m9"]


def test_the_description_names_what_exists_and_nothing_else() -> None:
    text = TAGS.describe(EpisodeSettings(operations=("create", "read"), scratchpad=False))
    assert "<create_memory>" in text
    assert "<final_answer>" in text
    for absent in ("update_memory", "delete_memory", "update_scratchpad"):
        assert absent not in text


def test_an_unknown_dialect_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingError, match=r"\['tags'\].*'xml'"):
        get_dialect("xml")
