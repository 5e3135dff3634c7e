"""Replays episodes of the store: the task from its seed, with the stored replies and vectors."""

from __future__ import annotations

from collections.abc import Iterator

from atommem_env.episode import Episode
from atommem_env.errors import SettingError, StoreError
from atommem_env.store.memory_store import MemoryStore
from atommem_env.store.recorder import EpisodeRecord
from atommem_env.types import EpisodeSettings, StepResult, TaskSource


def initial_episode(record: EpisodeRecord, source: TaskSource, settings: EpisodeSettings) -> Episode:
    """The episode of `record` before its first reply.

    Raises:
        SettingError: it was played with other settings, or `source` has another task at its index.
    """
    current = settings.record()
    recorded = EpisodeSettings().record() | record.settings  # a setting newer than the record was at its default
    changed = sorted(name for name in current if _as_json(current[name]) != _as_json(recorded[name]))
    if changed:
        raise SettingError(
            f"Episode {record.episode_id} was played with other settings of {', '.join(changed)}; use those."
        )
    task = source.task(record.index, record.task_seed)
    if task.id != record.task_id:
        raise SettingError(f"Episode {record.episode_id} is of task {record.task_id}, not of {task.id}.")
    return Episode(task, settings, record.episode_seed)


def replay(episode: Episode, store: MemoryStore, episode_id: str) -> Iterator[tuple[str, StepResult]]:
    """Replays the stored replies in `episode`, which has had none yet; no embedder is needed.

    Yields:
        Each reply and its result, in order, once `episode` has carried it out.

    Raises:
        StoreError: no such episode, or the replay diverges: it is over before its last reply, or needs a vector that was not
            stored.
    """
    vectors = store.vectors(episode_id)
    for reply in store.replies(episode_id):
        requests = () if episode.stop_reason else episode.submit(reply)
        if episode.stop_reason or any((request.kind, request.text) not in vectors for request in requests):
            raise StoreError(
                f"Reply {episode.steps + 1} of episode {episode_id} in {store.folder} does not fit the episode played again: "
                "replay it with the data and the version of atommem that it was played with."
            )
        yield reply, episode.resolve([vectors[request.kind, request.text] for request in requests])


def _as_json(value: object) -> object:
    """The value after a round trip through JSON: tuples become lists."""
    return [_as_json(item) for item in value] if isinstance(value, (tuple, list)) else value
