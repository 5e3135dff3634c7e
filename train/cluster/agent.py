"""What `--train.agent_func_path` names. OpenRLHF runs this file by its path, as no module, so all that it has is a name."""

from train.cluster.executor import AgentExecutor

__all__ = ["AgentExecutor"]
