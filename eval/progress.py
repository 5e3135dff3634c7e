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
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@dataclass(slots=True)
class EpisodeBar:
    """Counts episodes, and tells of replies and of the mean reward beside."""

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
        em = f", EM {fmean(self.rewards):.3f}" if self.rewards else ""
        self.display.update(self.bar, completed=len(self.rewards), told=f"{self.replies} replies{em}")


@contextmanager
def episode_bar(
    console: Console | None, progress: Progress | None, name: str, episodes: int, rewards: Sequence[float] = ()
) -> Iterator[EpisodeBar]:
    """A bar for some episodes more than those with `rewards`, in `progress` where that is running."""
    with nullcontext(progress) if progress else step_progress(console or Console(stderr=True)) as display:
        bar = display.add_task(name, total=len(rewards) + episodes, told="")
        shown = EpisodeBar(display, bar, list(rewards))
        shown.show()
        try:
            yield shown
        finally:
            if progress:
                progress.remove_task(bar)


def step_progress(console: Console) -> Progress:
    """A bar that counts, and tells of more beside: its tasks have the field `told`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[told]}"),
        console=console,
    )
