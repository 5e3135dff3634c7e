"""A run's episodes played by processes of Ray's, on one or many machines: `atommem eval … --workers N`.

Each worker prepares environment and policy as the command itself would, and plays many episodes at the same time, so that a
model's batches stay full. The command hands episodes out, gets their records and alone writes the run's files; the memories
a worker writes itself. In the place of a worker that dies comes another, and what it was playing is played once more.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import platform
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from agents.policy import Policy
from agents.rollout import Driver, EpisodeSpec
from atommem_env.env import AtomMemEnv
from atommem_env.errors import JobFailed, MissingDependency, SettingError
from atommem_env.packages import check_packages
from atommem_env.tokens import get_tokenizer
from eval.metrics import episode_cost, episode_record

T = TypeVar("T")
Prepare = Callable[[Any], tuple[AtomMemEnv, Policy, dict[str, Any]]]
Record = dict[str, Any]

_log = logging.getLogger(__name__)
_VARIABLES = ("ATOMMEM_", "HF_", "OMP_NUM_THREADS", "OPENAI_", "VLLM_")  # how the names of what is passed on begin


class Player:
    """A worker, which has the command's working folder, `sys.path` and variables; it plays one run at a time.

    The variables come as an argument because Ray shows those of a `runtime_env` to all, keys too.
    """

    def __init__(self, folder: str, path: Sequence[str], variables: Mapping[str, str]) -> None:
        os.environ.update(variables)
        sys.path += [entry for entry in path if entry not in sys.path]
        self._folder = folder
        self._leave: Callable[[], None] = lambda: None
        self._playing: set[asyncio.Task[Any]] = set()

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What a function returns or raises here."""
        try:
            os.chdir(self._folder)
            return function(*arguments)
        except Exception as error:
            error.add_note(f"on machine {platform.node()}, in {self._folder}, which all machines must have")
            raise

    async def open(self, prepare: Prepare, config: Any) -> tuple[Record, bool, int]:
        """Gets ready for a run, after leaving the one before: see `Workers.open`."""
        await self.close()
        env, self._policy, resolved_config = await self.call(prepare, config)
        self._leave, self._driver = env.close, Driver.of(env)
        self._tokenizer = get_tokenizer(env.settings.tokenizer)
        return resolved_config, self._policy.privileged, len(env.source)

    async def play(self, position: int, spec: EpisodeSpec) -> tuple[Record, Record]:
        """An episode's record, and its cost."""
        task, began = asyncio.current_task(), time.perf_counter()
        assert task is not None
        self._playing.add(task)
        task.add_done_callback(self._playing.discard)
        rollout = await self._driver.play(spec, self._policy)
        cost = episode_cost(position, rollout, time.perf_counter() - began)
        return episode_record(position, rollout, self._tokenizer), cost

    async def close(self) -> None:
        """Leaves the run; what is being played is stopped."""
        for task in self._playing:
            task.cancel()
        await asyncio.gather(*self._playing, return_exceptions=True)
        self._leave()
        self._leave = lambda: None


class Workers:
    """`count` players on the Ray that runs (RAY_ADDRESS), else on one of this machine that ends with them.

    Raises:
        MissingDependency: Ray is not installed.
        SettingError: `count` is below 1, or no Ray answers at RAY_ADDRESS.
        ShadowedPackage: the working folder has an `agents` or `eval` of its own, which workers would import.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise SettingError(f"workers must be at least 1, got {count}.")
        check_packages("eval", Path.cwd())  # which Ray puts before all else on the path of its workers
        try:
            import ray
        except ImportError as error:
            raise MissingDependency(
                "--workers needs 'ray' on each machine: pip install 'ray[default]', or 'atommem[cluster]'."
            ) from error
        self._ray, self._owns_ray = ray, not ray.is_initialized()
        sys.path += [folder for folder in (str(Path.cwd()),) if folder not in sys.path]  # for errors of a policy's own
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of what is true of GPUs later
                ray.init(ignore_reinit_error=True, logging_level=logging.WARNING)
        except (ConnectionError, ValueError) as error:
            raise SettingError(f"No Ray answers at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: {error}") from error
        machines = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
        gpus = gpus_each(machines, count)
        # A worker without GPUs holds no CPU either, so that Ray would put all on one machine.
        self._kind = ray.remote(Player).options(scheduling_strategy="SPREAD", **({"num_gpus": gpus} if gpus else {}))
        self._players = [self._start() for _ in range(count)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for player in self._players:
            self._ray.kill(player)
        if self._owns_ray:
            self._ray.shutdown()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What a function returns or raises in a worker."""
        return self._result(self._players[0].call.remote(function, *arguments))

    def open(self, prepare: Prepare, config: Any) -> tuple[Record, bool, int]:
        """Lets the workers prepare a run: what tells it from others, whether its policy is privileged, how many tasks."""
        self._asked = prepare, config
        self._opening = {player.open.remote(prepare, config): player for player in self._players}
        (first, *_), _ = self._ray.wait([*self._opening])
        self._told: tuple[Record, bool, int] = self._result(first)
        return self._told

    def play(
        self, specs: Mapping[int, EpisodeSpec], in_flight: int, finished: Callable[[Record, Record], None]
    ) -> None:
        """Plays episodes of the run that was opened, at most `in_flight` at a time in each worker.

        Args:
            specs: by position in the run.
            finished: called with the record and the cost of each episode, in the order in which they end.

        Raises:
            JobFailed: a worker died before it was ready, or two at the same episode.
            Exception: whatever policy, embedder or store raised first; the other episodes are stopped.
        """
        waiting, lost = deque(specs), set[int]()
        most = min(in_flight, math.ceil(len(specs) / len(self._players)))
        free: list[Any] = []  # each player as often as it can take an episode
        playing: dict[Any, tuple[Any, int]] = {}
        try:
            while waiting or playing:
                while waiting and free:
                    player, position = free.pop(0), waiting.popleft()
                    playing[player.play.remote(position, specs[position])] = player, position
                (ended, *_), _ = self._ray.wait([*self._opening, *playing])
                if ended in self._opening:
                    if self._result(ended) != self._told:
                        raise SettingError("The workers prepared different runs. Do all machines have the same data?")
                    free += [self._opening.pop(ended)] * most
                    continue
                player, position = playing.pop(ended)
                try:
                    finished(*self._result(ended))
                except _WorkerDied as error:
                    if position in lost:
                        error.add_note(f"at episode {position}, as one before it")
                        raise
                    lost.add(position)
                    waiting.append(position)
                    if player in self._players:
                        _log.warning("A worker died. Another takes its place, and what it was playing is played anew.")
                        free = [one for one in free if one != player]
                        new = self._replace(player)
                        self._opening[new.open.remote(*self._asked)] = new
                else:
                    free += [player] * (player in self._players)
        finally:
            self._close()

    def _close(self) -> None:
        opening = [*self._opening.values()]
        for player in [one for one in self._players if one not in opening]:
            try:
                self._result(player.close.remote())
            except _WorkerDied:  # what it had finished is kept
                self._replace(player)

    def _start(self) -> Any:
        variables = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
        return self._kind.remote(str(Path.cwd()), sys.path, variables)

    def _replace(self, player: Any) -> Any:
        self._ray.kill(player)  # it may only be out of reach
        self._players[self._players.index(player)] = new = self._start()
        return new

    def _result(self, reference: Any) -> Any:
        gone = (self._ray.exceptions.RayActorError, self._ray.exceptions.ObjectLostError)
        try:
            return self._ray.get(reference)
        except gone as error:
            raise _WorkerDied(f"A worker died; --resume goes on from here. Ray says: {error}") from error
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error


class _WorkerDied(JobFailed):
    pass


def gpus_each(machines: Sequence[int], workers: int) -> float:
    """An equal share for each worker of the GPUs of all machines, where one machine has to have all of a share.

    >>> gpus_each([8, 8], 4), gpus_each([8, 8], 3), gpus_each([2], 3), gpus_each([0], 2)
    (4, 4, 0.5, 0)
    """
    for share in range(max(machines, default=0), 0, -1):
        if sum(gpus // share for gpus in machines) >= workers:
            return share
    return 1 / math.ceil(workers / sum(machines)) if sum(machines) else 0
