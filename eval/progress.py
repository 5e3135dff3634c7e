"""Progress bars of runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import fmean

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text


@dataclass(slots=True)
class EpisodeBar:
    """Counts episodes, and shows the number of replies and the mean reward beside."""

    display: Progress
    bar: TaskID
    rewards: list[float]
    replies: int = 0

    def ended(self, reward: float) -> None:
        self.rewards.append(reward)
        self.show()

    def replied(self, times: int = 1) -> None:
        self.replies += times
        self.show()

    def show(self) -> None:
        reward = f", reward {fmean(self.rewards):.3f}" if self.rewards else ""
        self.display.update(self.bar, completed=len(self.rewards), status=f"{self.replies} replies{reward}")


@contextmanager
def episode_bar(
    console: Console | None, progress: Progress | None, name: str, episodes: int, rewards: Sequence[float] = ()
) -> Iterator[EpisodeBar]:
    """A bar for some episodes more than those with `rewards`, in `progress` where that is running."""
    with nullcontext(progress) if progress else step_progress(console or Console(stderr=True)) as display:
        bar = display.add_task(name, total=len(rewards) + episodes, status="")
        shown = EpisodeBar(display, bar, list(rewards))
        shown.show()
        try:
            yield shown
        finally:
            if progress:
                progress.remove_task(bar)


class _Description(ProgressColumn):
    """What is counted; its end is left out where the line is too short for all of it."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


def step_progress(console: Console) -> Progress:
    """A bar with a count, times and a text: its tasks have the field `status`.

    Where the terminal is narrow, the bar shrinks, then the description; the others stay whole.
    """

    def whole() -> Column:
        return Column(no_wrap=True)

    return Progress(
        _Description(),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        MofNCompleteColumn(table_column=whole()),
        TimeElapsedColumn(table_column=whole()),
        TimeRemainingColumn(table_column=whole()),
        TextColumn("{task.fields[status]}", markup=False, table_column=whole()),
        console=console,
        expand=True,
    )
