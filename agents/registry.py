"""Policies by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from agents.baselines import cheats, oracle, planner, world_reader
from agents.chat_policy import GREEDY, ChatPolicy, Sampling
from agents.models.download import find_model
from agents.models.transformers_model import TransformersModel
from agents.policy import Policy, as_policy
from atommem_env.errors import PolicyError
from atommem_env.types import EpisodeSettings

# name → how it is made, and what it does; a star marks the privileged, which are given the golds.
POLICIES: dict[str, tuple[Callable[[EpisodeSettings], Policy], str]] = {
    "oracle": (
        lambda settings: oracle.PerfectReader("oracle", settings, oracle.keep_evidence),
        "* stores the evidence; gives the gold when all of it is in view: what a perfect memory reaches",
    ),
    "append-all": (
        lambda settings: oracle.PerfectReader("append-all", settings, oracle.keep_everything, "question"),
        "* stores every document and searches for the question; gives the gold when the evidence is in view",
    ),
    "fixed-position": (
        lambda settings: oracle.PerfectReader("fixed-position", settings, oracle.keep_leaked_positions),
        "* stores the documents at the ten positions that leak in the public code of AtomMem",
    ),
    "random-position": (
        lambda settings: oracle.PerfectReader("random-position", settings, oracle.keep_random_positions),
        "* stores the documents at ten random positions: what fixed-position is to be compared with",
    ),
    "planner": (
        planner.Planner,
        "* synthetic tasks only: does one thing a reply, planned for the operations that there are; foresees no correction",
    ),
    "chain-match": (
        lambda settings: world_reader.WorldReader("chain-match", settings, world_reader.keep_by_chain),
        "synthetic tasks only: stores facts that continue the question's chain, and some of later links",
    ),
    "type-match": (
        lambda settings: world_reader.WorldReader("type-match", settings, world_reader.keep_by_type),
        "synthetic tasks only: stores facts of the relations that the question names, about whomever",
    ),
    "first-link": (
        lambda settings: world_reader.WorldReader("first-link", settings, world_reader.keep_first_link),
        "synthetic tasks only: stores facts of the first relation that the question names, and few of the others",
    ),
    "random-70": (
        lambda settings: world_reader.WorldReader("random-70", settings, world_reader.keep_at_random),
        "synthetic tasks only: stores 70 % of the facts, drawn at random",
    ),
    "store-all": (
        lambda settings: world_reader.WorldReader("store-all", settings, world_reader.keep_all),
        "synthetic tasks only: stores every fact until the memory is full",
    ),
    "silent": (cheats.Silent, "says nothing"),
    "constant": (cheats.Constant, "answers 'yes' to everything; constant=TEXT answers TEXT"),
    "random": (cheats.Random, "random operations with random words of what it sees"),
    "spam": (cheats.Spam, "floods the memory and answers in every turn"),
}
MODELS = {
    "tiny": "a base model of the synthetic world that has yet to learn the game (0.9 million parameters; use --layout terse)",
    "smollm2": "SmolLM2-135M-Instruct, a language model on this machine (first: atommem models get smollm2)",
}


def load_policy(
    name: str, settings: EpisodeSettings, sampling: Sampling = GREEDY, layout: str = "shared_prefix"
) -> Policy:
    """The policy called `name`, for episodes with these settings.

    Args:
        name: one of `POLICIES` or `MODELS`; `constant=TEXT`; the folder of a chat model; or `module:attribute`, a function or
            `Policy` of yours, the module being looked for in the working folder first.
        settings: the dynamics of the episodes; a policy writes in their dialect.
        sampling: how a language model samples; nothing to other policies.
        layout: how it is shown an observation, see `atommem_env.prompts`; nothing to other policies.

    Raises:
        PolicyError: there is none of that name.
        ModelNotFound: the model was not fetched yet.
    """
    if name.startswith("constant="):
        return cheats.Constant(settings, name.removeprefix("constant="))
    if name in POLICIES:
        return POLICIES[name][0](settings)
    if name in MODELS or (Path(name) / "config.json").is_file():
        return ChatPolicy(TransformersModel(find_model(name)), settings, sampling, layout)
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise PolicyError(
            f"No policy is called {name!r}. There are {', '.join([*POLICIES, *MODELS])}, a model's folder, and module:attribute."
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module = importlib.import_module(module_name)
    if not hasattr(module, attribute):
        raise PolicyError(f"Module {module_name!r} ({module.__file__}) has no {attribute!r}.")
    return as_policy(getattr(module, attribute))
