"""An episode while it is played, with the record that the store makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from numpy.typing import ArrayLike

from atommem_env.episode import Episode
from atommem_env.errors import SettingError
from atommem_env.store.memory_store import MemoryStore
from atommem_env.store.recorder import INTERRUPTED, EpisodeRecord, Recorder
from atommem_env.store.replay import initial_episode, replay
from atommem_env.tasks.records import check_range
from atommem_env.types import EpisodeSettings, StepResult, TaskSource


@dataclass(frozen=True, slots=True)
class EpisodeSession:
    """An episode and its recorder, from its beginning to its end or to where it is left.

    What is noted becomes durable by `MemoryStore.write([session.recorder])`, whenever the owner of the session chooses.
    """

    episode: Episode
    recorder: Recorder

    @classmethod
    def begin(
        cls,
        store: MemoryStore,
        source: TaskSource,
        settings: EpisodeSettings,
        *,
        env_id: str,
        index: int,
        task_seed: int,
        episode_seed: int,
    ) -> Self:
        """A new episode of the task at `index`.

        Args:
            env_id: what the store calls the environment.
            task_seed: draws and orders the documents.
            episode_seed: of what the episode itself draws.

        Raises:
            SettingError: `source` has no such index, or what the source itself raises.
            StoreError: a number is not one of 64 bits.
        """
        check_range("index", index, len(source))
        episode = Episode(source.task(index, task_seed), settings, episode_seed)
        recorder = store.begin(
            env_id=env_id,
            task_id=episode.task.id,
            index=index,
            task_seed=task_seed,
            episode_seed=episode_seed,
            settings=settings.record(),
        )
        return cls(episode, recorder)

    @classmethod
    def resume(
        cls, store: MemoryStore, source: TaskSource, settings: EpisodeSettings, episode_id: str
    ) -> tuple[Self, EpisodeRecord]:
        """An interrupted episode as it was left, and its record: the same replies again, with the vectors that were stored.

        Raises:
            SettingError: it is over, was played with other settings, or `source` has another task at its index.
            StoreError: there is no such episode, or its replies lead elsewhere than they did.
        """
        record = store.episode(episode_id)
        if record.status != INTERRUPTED:
            raise SettingError(
                f"Episode {episode_id} is over ({record.status}); only an interrupted one can be resumed."
            )
        episode = initial_episode(record, source, settings)
        for _ in replay(episode, store, episode_id):
            pass
        return cls(episode, store.resume(episode_id)), record

    def resolve(self, reply: str, vectors: ArrayLike) -> StepResult:
        """Carries out `reply`, which was submitted to the episode, and notes it; also the end, if it was the last.

        Args:
            vectors: [requests, D], those that `Episode.submit` asked for.

        Raises:
            EmbeddingError: the vectors are not those asked for; nothing has changed.
        """
        result = self.episode.resolve(vectors)
        self.recorder.record(self.episode.steps, reply, result)
        if self.episode.stop_reason is not None:
            self.recorder.end(self.episode.stop_reason, self.episode.reward, self.episode.memory)
        return result

    def fork(self) -> Self:
        """A copy of the episode that takes its own course, of which nothing is stored.

        Raises:
            EpisodeStateError: a reply is submitted and not resolved.
        """
        return replace(self, episode=self.episode.fork(), recorder=self.recorder.detached())

    def leave(self) -> bool:
        """Notes what an episode that nobody will finish has in memory; returns False where it is over or has not begun."""
        if self.episode.stop_reason is not None or not self.episode.steps:
            return False
        self.recorder.end(INTERRUPTED, 0.0, self.episode.memory)
        return True
