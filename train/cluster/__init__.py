"""Training on a cluster: OpenRLHF with DeepSpeed, vLLM and Ray, for an agent whose context is written anew each turn.

OpenRLHF is an unmodified dependency of one version (`recipe.VERSION`). What it is told is a recipe (`recipe.py`). What must be
right before anything starts is checked (`preflight.py`); `launch.py` starts everything and follows it. Inside the job (`job.py`),
`executor.py` plays episodes in the engines' actors, and `extension.py` trains every turn of a rollout with the rollout's
advantage, from the same functions as on one machine.
"""
