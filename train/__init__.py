"""Training: the functions that every trainer of ours shares, and the trainers.

Arrays and tensors name their axes by suffix: `P` problems (a group of rollouts each), `G` rollouts of a group, `B` rows of a
batch, `T` token positions of a row, `N` trained tokens, `V` the vocabulary. `rewards_P_G` is one reward a rollout.
"""

from atommem_env.packages import check_packages

check_packages("train")
