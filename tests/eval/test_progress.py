"""Progress bars in narrow terminals."""

import io

import pytest
from rich.console import Console

from eval.progress import step_progress

LONG = "rag@Qwen3-8B-Instruct-2507 (BM25) on AtomMem-2WikiMultiHopQA, 200 documents [dev]"


def rendered(width: int, description: str, status: str) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    progress = step_progress(console)
    progress.add_task(description, total=1000, completed=123, status=status)
    console.print(progress.get_renderable())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("description", ["oracle", LONG])
@pytest.mark.parametrize(
    ("width", "status"),
    [
        (64, "12345 replies, reward 0.123"),
        (80, "12345 replies, reward 0.123"),
        (80, "reward 0.123, best held-out EM 0.456"),
    ],
)
def test_count_times_and_status_are_whole_in_a_narrow_terminal(width: int, status: str, description: str) -> None:
    line = rendered(width, description, status)
    assert line.endswith(f" 123/1000 0:00:00 -:--:-- {status}\n"), "nothing is cut, and nothing is on a second line"
    assert len(line) <= width + 1
    assert line.startswith(description[:7])


def test_the_bar_shrinks_before_the_description() -> None:
    assert LONG in rendered(160, LONG, "12 replies")
    assert "━" in rendered(60, "oracle", "12 replies")
    shown, cut, _ = rendered(60, LONG, "12 replies").partition("…")
    assert cut
    assert LONG.startswith(shown)
