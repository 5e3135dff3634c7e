"""What pytest leaves out where the cluster's packages are not installed: `make test-cluster` has them."""

from importlib.util import find_spec

collect_ignore = (
    []
    if find_spec("openrlhf")
    else ["train/cluster/agent.py", "train/cluster/executor.py", "train/cluster/extension.py", "tests/cluster"]
)
collect_ignore += ["tests/cluster/shims", "tests/cluster/one_step.py"]
