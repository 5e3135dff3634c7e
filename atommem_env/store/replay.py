"""Episodes again from the store: the task by its seed, the replies as they were given, the vectors that were kept."""

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
        SettingError: it was played with other settings, or `source` has another task in its place.
    """
    given = settings.record()
    before = EpisodeSettings().record() | record.settings  # a setting that came later was at its default
    changed = sorted(name for name in given if _plain(given[name]) != _plain(before[name]))
    if changed:
        raise SettingError(f"Episode {record.episode_id} was played with other settings of {', '.join(changed)}.")
    task = source.task(record.index, record.task_seed)
    if task.id != record.task_id:
        raise SettingError(f"Episode {record.episode_id} is of task {record.task_id}, not of {task.id}.")
    return Episode(task, settings, record.episode_seed)


def replay(episode: Episode, store: MemoryStore, episode_id: str) -> Iterator[tuple[str, StepResult]]:
    """Gives `episode`, at its first moment, the replies that `store` keeps: each reply with what it led to, in order.

    `episode` has carried a reply out when it is yielded. No embedder is needed.

    Raises:
        StoreError: no such episode, or it goes otherwise than it did: it is over before its last reply, or needs a vector
            that was not kept.
    """
    kept = store.vectors(episode_id)
    for reply in store.replies(episode_id):
        requests = () if episode.stop_reason else episode.submit(reply)
        if episode.stop_reason or any((request.kind, request.text) not in kept for request in requests):
            raise StoreError(
                f"Reply {episode.steps + 1} of episode {episode_id} in {store.folder} does not fit the episode played again: "
                "the data, or the version of atommem, are not those that it was played with."
            )
        yield reply, episode.resolve([kept[request.kind, request.text] for request in requests])


def _plain(value: object) -> object:
    """As it comes back from the store's JSON."""
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
