"""What `--train.agent_func_path` names. OpenRLHF runs this file by its path, as no module, so all that it has is a name."""

from atommem_env.packages import check_packages

check_packages("train")

from train.cluster.executor import AgentExecutor  # noqa: E402

__all__ = ["AgentExecutor"]
