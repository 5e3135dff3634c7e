"""Ray workers that play a run's episodes, on one or many machines: `atommem eval … --workers N`.

Each worker prepares environment and policy as the command itself would, and plays many episodes at the same time, so that a
model's batches stay full. The command distributes the episodes, collects their records and is the only one to write the run's
files; each worker writes its memories itself. A worker that dies is replaced, and its unfinished episodes are played again.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from agents.rollout import EpisodeSpec
from atommem_env.errors import JobFailed, MissingDependency, ReplyRefused, SettingError
from atommem_env.packages import check_packages
from atommem_env.tokens import get_tokenizer
from eval.metrics import episode_cost, episode_record
from eval.options import EvalConfig
from eval.players import OnFinished, PreparedRun, prepare_evaluation
from eval.run_folder import Record

T = TypeVar("T")

_log = logging.getLogger(__name__)
_VARIABLES = ("ATOMMEM_", "HF_", "OMP_NUM_THREADS", "OPENAI_", "VLLM_")  # prefixes of the variables passed to workers


class Worker:
    """A worker with the command's working folder, `sys.path` and variables; it plays one run at a time.

    The variables are an argument because Ray exposes those of a `runtime_env`, API keys included, to everyone.
    """

    def __init__(self, folder: str, path: Sequence[str], variables: Mapping[str, str]) -> None:
        os.environ.update(variables)
        sys.path += [entry for entry in path if entry not in sys.path]
        self._folder = folder
        self._close_store: Callable[[], None] = lambda: None
        self._playing: set[asyncio.Task[Any]] = set()

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls a function in this worker; returns or raises what it does."""
        try:
            os.chdir(self._folder)
            return function(*arguments)
        except Exception as error:
            error.add_note(f"on machine {platform.node()}, in {self._folder}, which all machines must have")
            raise

    async def open(self, config: EvalConfig) -> PreparedRun:
        """Prepares a run, after closing the one before: see `Workers.open`."""
        await self.close()
        self._driver, self._policy, prepared = await self.call(prepare_evaluation, config)
        self._close_store = self._driver.store.close
        self._tokenizer = get_tokenizer(self._driver.settings.tokenizer)
        return prepared

    async def play(self, number: int, spec: EpisodeSpec) -> tuple[Record, Record]:
        """Plays an episode; returns its record and its cost."""
        task, started = asyncio.current_task(), time.perf_counter()
        assert task is not None
        self._playing.add(task)
        task.add_done_callback(self._playing.discard)
        rollout = await self._driver.play(spec, self._policy)
        cost = episode_cost(number, rollout, time.perf_counter() - started)
        return episode_record(number, rollout, self._tokenizer), cost

    async def close(self) -> None:
        """Closes the run; stops the episodes being played."""
        for task in self._playing:
            task.cancel()
        await asyncio.gather(*self._playing, return_exceptions=True)
        self._close_store()
        self._close_store = lambda: None


class Workers:
    """`count` workers on a running Ray cluster (RAY_ADDRESS), else on a local one that ends with them.

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
        sys.path += [
            folder for folder in (str(Path.cwd()),) if folder not in sys.path
        ]  # to unpickle a policy's own errors
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # about future GPU behaviour
                ray.init(ignore_reinit_error=True, logging_level=logging.WARNING)
        except (ConnectionError, ValueError) as error:
            raise SettingError(f"No Ray answers at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: {error}") from error
        machines = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
        gpus = gpus_per_worker(machines, count)
        # A worker without GPUs reserves no CPU either, so that Ray would put all on one machine.
        self._kind = ray.remote(Worker).options(scheduling_strategy="SPREAD", **({"num_gpus": gpus} if gpus else {}))
        self._workers = [self._start() for _ in range(count)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            self._ray.kill(worker)
        if self._owns_ray:
            self._ray.shutdown()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls a function in a worker; returns or raises what it does."""
        return self._result(self._workers[0].call.remote(function, *arguments))

    @contextmanager
    def open(self, config: EvalConfig) -> Iterator[PreparedRun]:
        """Lets the workers prepare a run, see `eval.players.Player`; they close it at the end in any case."""
        self._config = config
        self._opening = {worker.open.remote(config): worker for worker in self._workers}
        try:
            (first, *_), _ = self._ray.wait([*self._opening])
            self._prepared: PreparedRun = self._result(first)
            yield self._prepared
        finally:
            self._close()

    def play(
        self, specs: Mapping[int, EpisodeSpec], in_flight: int, finished: OnFinished, replied: Callable[[int], None]
    ) -> None:
        """See `eval.players.Player`; `in_flight` is per worker.

        Raises:
            JobFailed: a worker died before it was ready, or two died at the same episode.
            Exception: the first one of the policy, the embedder or the store; the other episodes are stopped.
        """
        waiting, lost = deque(specs), set[int]()
        most = min(in_flight, math.ceil(len(specs) / len(self._workers)))
        free: list[Any] = []  # each worker once for every episode that it can take
        playing: dict[Any, tuple[Any, int]] = {}
        while waiting or playing:
            while waiting and free:
                worker, number = free.pop(0), waiting.popleft()
                playing[worker.play.remote(number, specs[number])] = worker, number
            (ended, *_), _ = self._ray.wait([*self._opening, *playing])
            if ended in self._opening:
                if self._result(ended) != self._prepared:
                    raise SettingError("The workers prepared different runs; all machines must have the same data.")
                free += [self._opening.pop(ended)] * most
                continue
            worker, number = playing.pop(ended)
            try:
                record, cost = self._result(ended)
            except _WorkerDied as error:
                if number in lost:
                    error.add_note(f"at episode {number}, as one before it")
                    raise
                lost.add(number)
                waiting.append(number)
                if worker in self._workers:
                    _log.warning("A worker died. A new one replaces it and plays its episodes again.")
                    free = [one for one in free if one != worker]
                    new = self._replace(worker)
                    self._opening[new.open.remote(self._config)] = new
            except ReplyRefused as error:
                _log.warning("Episode %d stays unscored: %s", number, error)
                free += [worker] * (worker in self._workers)
            else:
                replied(record["steps"])
                finished(record, cost)
                free += [worker] * (worker in self._workers)

    def _close(self) -> None:
        opening = [*self._opening.values()]
        for worker in [one for one in self._workers if one not in opening]:
            try:
                self._result(worker.close.remote())
            except _WorkerDied:  # its finished episodes are saved
                self._replace(worker)

    def _start(self) -> Any:
        variables = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
        return self._kind.remote(str(Path.cwd()), sys.path, variables)

    def _replace(self, worker: Any) -> Any:
        self._ray.kill(worker)  # it may only be unreachable
        self._workers[self._workers.index(worker)] = new = self._start()
        return new

    def _result(self, reference: Any) -> Any:
        died = (self._ray.exceptions.RayActorError, self._ray.exceptions.ObjectLostError)
        try:
            return self._ray.get(reference)
        except died as error:
            raise _WorkerDied(f"A worker died; resume the run with --resume. Ray reports: {error}") from error
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error


class _WorkerDied(JobFailed):
    pass


def gpus_per_worker(machines: Sequence[int], workers: int) -> float:
    """The GPUs of each worker: equal shares, each of which must be on one machine.

    Args:
        machines: number of GPUs of each machine.

    >>> gpus_per_worker([8, 8], 4), gpus_per_worker([8, 8], 3), gpus_per_worker([2], 3), gpus_per_worker([0], 2)
    (4, 4, 0.5, 0)
    """
    for share in range(max(machines, default=0), 0, -1):
        if sum(gpus // share for gpus in machines) >= workers:
            return share
    return 1 / math.ceil(workers / sum(machines)) if sum(machines) else 0
