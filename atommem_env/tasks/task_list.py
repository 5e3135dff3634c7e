"""A list of tasks as a task source."""

from __future__ import annotations

from collections.abc import Sequence

from atommem_env.errors import SettingError
from atommem_env.types import Task


class TaskList:
    """The tasks of a list, in its order; seeds have no effect.

    >>> TaskList([Task.of(["Ada moved to Rome."], [("Where does Ada live?", "Rome")])]).task(0, seed=1).documents[0].text
    'Ada moved to Rome.'

    Raises:
        SettingError: the list is empty, or an item of it is not a task.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        wrong = next((task for task in tasks if not isinstance(task, Task)), None)
        if wrong is not None or not tasks:
            raise SettingError(f"Expected a list of at least one atommem_env.Task, got {wrong if tasks else tasks!r}.")
        self._tasks = tuple(tasks)
        self.dataset = tasks[0].dataset

    def __len__(self) -> int:
        return len(self._tasks)

    def task(self, index: int, seed: int) -> Task:
        """The task at `index`."""
        if not 0 <= index < len(self):
            raise SettingError(f"index must be from 0 to {len(self) - 1}, got {index}.")
        return self._tasks[index]
