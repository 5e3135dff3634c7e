"""The driver of a cluster job: OpenRLHF's own command line, with our classes in it.

    ATOMMEM_RUN=runs/mine python -P -m train.cluster.job --actor.model_name_or_path … (see `atommem train cluster --dry-run`)

Started by `ray job submit` it joins that cluster; started by hand it starts a Ray of its own, which ends with it.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path

from atommem_env.plugins import MODULES
from train.cluster.recipe import RUN_VARIABLE, read_run


def main() -> None:
    """Runs `openrlhf.cli.train_ppo_ray` with the arguments of this process."""
    from train.cluster.extension import install

    engines = install()
    # Ray puts its driver's working folder before all others on the path of every worker: a `train.py` there would hide ours.
    folder = read_run().out.resolve()
    os.environ.setdefault(MODULES, str(Path.cwd()))
    os.environ[RUN_VARIABLE] = str(folder)
    os.chdir(folder)
    try:
        runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:
        if engines.cause is None:
            raise
        raise engines.cause from None


if __name__ == "__main__":
    main()
