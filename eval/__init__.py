"""Evaluation of policies on environments, as tables that others can reproduce."""

from atommem_env.packages import check_packages

check_packages("eval")
