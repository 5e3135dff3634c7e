"""The machines that a run can be given, and their GPUs.

python -P -m train.cluster.machines     # those of the Ray that runs here, as JSON in the last line
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from atommem_env.errors import SettingError
from train.cluster.jobs import RayJob, check_running

_POLL = 0.5  # seconds between looks at the job that asks Ray


class Node(NamedTuple):
    """A machine."""

    name: str
    gpus: int
    gpu_memory: int | None  # bytes of its smallest GPU; None: not known


@dataclass(frozen=True, slots=True)
class Machines:
    """What a run can be given."""

    nodes: tuple[Node, ...]

    @classmethod
    def here(cls) -> Machines:
        """This machine.

        Raises:
            SettingError: the GPUs' driver does not answer.
        """
        memory = _gpu_memory()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = len(memory) if visible is None else len([name for name in visible.split(",") if name.strip()])
        return cls((Node(platform.node(), gpus, min(memory, default=None)),))

    @classmethod
    def on_ray(cls) -> Machines:
        """Those of the Ray that this process is connected to.

        Raises:
            SettingError: the driver of some machine's GPUs does not answer.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ask = ray.remote(num_cpus=0)(_gpu_memory)
        alive = [node for node in ray.nodes() if node["Alive"]]
        asked = [
            ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
            for node in alive
        ]
        return cls(
            tuple(
                Node(node["NodeManagerHostname"], int(node["Resources"].get("GPU", 0)), min(memory, default=None))
                for node, memory in zip(alive, ray.get(asked), strict=True)
            )
        )

    @classmethod
    def at(cls, address: str | None) -> Machines:
        """This machine; or those of the Ray with this dashboard, which are looked at by a job of it.

        Raises:
            SettingError: the driver of this machine's GPUs does not answer, or no Ray at the address.
            JobFailed: the job failed; most likely the shell that Ray was started in has another `python`, without atommem.
        """
        if address is None:
            return cls.here()
        handle, log = tempfile.mkstemp(prefix="atommem-machines-", suffix=".log")
        os.close(handle)
        job = RayJob(address, ["python", "-P", "-m", "train.cluster.machines"], {}, Path(log))
        try:
            while check_running("The job that looks at Ray's machines", job):
                time.sleep(_POLL)
        finally:
            job.stop()
        Path(log).unlink()  # else the error has named it
        return cls(tuple(Node(*fields) for fields in json.loads(job.output().splitlines()[-1])))

    @property
    def gpu_memory(self) -> int | None:
        """Bytes of the smallest GPU; None: not known."""
        return min((node.gpu_memory for node in self.nodes if node.gpu_memory is not None), default=None)

    def __str__(self) -> str:
        return ", ".join(f"{node.name}: {node.gpus}" for node in self.nodes) or "no machine"


def _gpu_memory() -> list[int]:
    """Bytes of each GPU of this machine, by its driver: a process to which Ray gave no GPU sees none by CUDA."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise SettingError(
            f"{' '.join(command)} failed on {platform.node()}: {(answer.stdout + answer.stderr).strip()}"
        )
    return [int(line) * 2**20 for line in answer.stdout.split()]


def main() -> None:
    """Prints the machines of the Ray that runs here."""
    import ray

    ray.init(log_to_driver=False)
    print(json.dumps(Machines.on_ray().nodes))


if __name__ == "__main__":
    main()
