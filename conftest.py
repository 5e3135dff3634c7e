"""What holds for every test; among it what is left out without the cluster's packages, which `make test-cluster` installs."""

import os
from importlib.util import find_spec

if find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
    settings.load_profile("untimed")

# A core each: on as many cores as there are workers, the threads of one would spin while they wait for the other's.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

_CLUSTER = ["agent.py", "executor.py", "experience.py", "extension.py"]
collect_ignore = [] if find_spec("openrlhf") else ["tests/cluster", *(f"train/cluster/{name}" for name in _CLUSTER)]
collect_ignore += ["tests/cluster/shims", "tests/cluster/one_step.py"]
