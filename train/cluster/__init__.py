"""Training on a cluster: OpenRLHF with DeepSpeed, vLLM and Ray, for an agent whose context is written afresh each turn.

OpenRLHF is an unmodified dependency of one version (`recipe.VERSION`). A recipe (`recipe.py`) becomes its flags. What must be
right before anything starts is checked (`preflight.py`), on the machines that there are (`machines.py`); `launch.py` starts
processes and jobs (`jobs.py`) and follows them. Inside the job (`job.py`), `executor.py` plays episodes in the engines' actors,
and `extension.py` trains every turn of a rollout with the rollout's advantage (`experience.py`), from the same functions as on
one machine; `metrics.py` logs it. `sft.py` is supervised fine-tuning.
"""
