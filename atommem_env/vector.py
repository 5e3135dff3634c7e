"""A vector environment: each step embeds the texts of all its environments in one batch, and stores them in one commit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import iterate
from numpy.typing import ArrayLike

from atommem_env.embedders import Embedder, embed, get_embedder
from atommem_env.env import AtomMemEnv, open_store, split_options
from atommem_env.store.memory_store import MemoryStore
from atommem_env.store.recorder import Recorder
from atommem_env.tasks import Source, make_source
from atommem_env.types import TaskSource


class AtomMemVectorEnv(SyncVectorEnv):
    """`num_envs` environments that share a task source, an embedder and a store: `gym.make_vec(id, num_envs=N)`.

    Spaces, seeds, options, autoreset, `info` and return values are, byte for byte, those of `gymnasium.vector.SyncVectorEnv`:
    texts are tuples of N, numbers arrays [N]. The difference is speed. A step calls the embedder once for each kind of text,
    with the texts of all N, and commits once; reset draws each environment's task by its seed.

    With 64 environments and the embedder "hashing" steps were 6 times as fast, with `durability="step"` 20 times
    (`eval/benchmarks/environment.py`, one core).

    A step whose embedding fails leaves all environments unchanged and can be repeated.

    Args:
        source: as for `AtomMemEnv`.
        num_envs: N, at least 1.
        autoreset_mode: "NextStep", "SameStep", "Disabled", or the `AutoresetMode`.
        embedder, store, durability, render_mode, options: as for `AtomMemEnv`.
    """

    envs: list[_Member]  # type: ignore[assignment]

    def __init__(
        self,
        source: Source | None = None,
        *,
        num_envs: int = 1,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        embedder: str | Embedder = "hashing",
        store: str | Path | MemoryStore | None = None,
        durability: str = "episode",
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        _, source_options = split_options(source, options)
        assert source is not None  # or split_options would have said so
        shared = make_source(source, **source_options)
        settings = {name: value for name, value in options.items() if name not in source_options}
        self.embedder = get_embedder(embedder) if isinstance(embedder, str) else embedder
        self.store = open_store(store, durability)
        self._owns_store = self.store is not store
        self._to_write: dict[Recorder, None] = {}  # an ordered set

        def member() -> _Member:
            return _Member(
                self._to_write, shared, embedder=self.embedder, store=self.store, render_mode=render_mode, **settings
            )

        super().__init__([member] * num_envs, autoreset_mode=autoreset_mode)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "spec" and value is not None:  # set by `gym.make_vec`; the store records its id as `env_id`
            for env in self.envs:
                env.spec = gym.spec(value.id)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        over = self._autoreset_envs if self.autoreset_mode is AutoresetMode.NEXT_STEP else [False] * self.num_envs
        requests = {
            env: env.submit(action)
            for env, action, resets in zip(self.envs, iterate(self.action_space, actions), over, strict=True)
            if not resets
        }
        vectors = embed(self.embedder, [request for batch in requests.values() for request in batch])
        start = 0
        for env, batch in requests.items():
            env.vectors = vectors[start : start + len(batch)]
            start += len(batch)
        result = super().step(actions)
        self._write()
        return result

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        result = super().reset(**kwargs)
        self._write()
        return result

    def close_extras(self, **kwargs: Any) -> None:
        super().close_extras(**kwargs)
        self._write()
        if self._owns_store:
            self.store.close()

    def _write(self) -> None:
        """Commits what the members have buffered; after an error it stays buffered, and the next call commits it."""
        self.store.write(list(self._to_write))
        self._to_write.clear()


class _Member(AtomMemEnv):
    """An environment for which the vector environment embeds and writes."""

    def __init__(self, to_write: dict[Recorder, None], source: TaskSource, **kwargs: Any) -> None:
        super().__init__(source, **kwargs)
        self.vectors: ArrayLike = []  # of the action submitted last
        self._to_write = to_write

    def step(self, action: str) -> Any:
        return self.resolve(action, self.vectors)

    def _write(self, recorder: Recorder) -> None:
        self._to_write[recorder] = None
