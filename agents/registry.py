"""Policies by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from agents.baselines import oracle, planner, sanity, world_reader
from agents.baselines.append_all import append_all
from agents.baselines.full_context import full_context
from agents.baselines.memagent import memagent
from agents.baselines.no_memory import no_memory
from agents.baselines.rag import rag
from agents.chat_policy import GREEDY, ChatPolicy, Sampling
from agents.models.load import MODELS, is_model, load_model
from agents.policy import Policy, as_policy
from agents.prompting import Method, PromptedPolicy
from atommem_env.errors import PolicyError
from atommem_env.plugins import is_target, load_attribute, suggest
from atommem_env.types import EpisodeSettings

# name → how it is made, and what it does; a star marks the privileged, which are given the golds.
POLICIES: dict[str, tuple[Callable[[EpisodeSettings], Policy], str]] = {
    "oracle": (
        lambda settings: oracle.PerfectReader("oracle", settings, oracle.keep_evidence),
        "* stores the evidence; gives the gold when all of it is in view: what a perfect memory reaches",
    ),
    "perfect-rag": (
        lambda settings: oracle.PerfectReader("perfect-rag", settings, oracle.keep_everything, "question"),
        "* stores every document, searches for the question, gives the gold when the evidence is in view: what RAG can reach",
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
    "silent": (sanity.Silent, "says nothing"),
    "constant": (sanity.Constant, "answers 'yes' to everything; constant=TEXT answers TEXT"),
    "random": (sanity.Random, "random operations with random words of what it sees"),
    "spam": (sanity.Spam, "floods the memory and answers in every turn"),
}
# name → the method, which a model is put behind: `rag@smollm2`
METHODS: dict[str, tuple[Method, str]] = {
    "no-memory": (no_memory, "asks the question alone: what the model knows by itself"),
    "full-context": (
        full_context,
        "asks with the whole document, without its middle where the model's window is too short",
    ),
    "rag": (
        rag,
        "stores every document, searches for the question, asks with what is found; --set retrieval=bm25 or hybrid",
    ),
    "append-all": (append_all, "stores every chunk whole, searches for the question, asks with what is found"),
    "memagent": (memagent, "MemAgent: the model writes one memory anew with every chunk, and answers from it"),
}


def load_policy(
    name: str, settings: EpisodeSettings, sampling: Sampling = GREEDY, layout: str = "shared_prefix"
) -> Policy:
    """The policy called `name`, for episodes with these settings.

    Args:
        name: one of

            - `NAME`, one of `POLICIES`, or `constant=TEXT`;
            - `MODEL`, one of `agents.models.load.MODELS`: that model as an AtomMem agent;
            - `METHOD@MODEL`, one of `METHODS` with any model behind it;
            - `module:attribute`, a function or `Policy` of yours; `module:attribute@MODEL`, a method of yours
              (`agents.prompting.Method`) with any model behind it. The module is looked for in the working folder first.
        settings: the dynamics of the episodes; a policy writes in their dialect.
        sampling: how a language model samples; nothing to other policies.
        layout: how a model that is the agent is shown an observation, see `atommem_env.prompts`; nothing to other policies.

    Raises:
        PolicyError: there is none of that name.
        PluginError: `module:attribute` names nothing, or the module cannot be imported.
        ModelNotFound: there is no such model, or it was not fetched yet.
        SettingError: a method cannot work with these settings.
    """
    if name.startswith("constant="):
        return sanity.Constant(settings, name.removeprefix("constant="))
    if name in POLICIES:
        return POLICIES[name][0](settings)
    if is_model(name) or ("/" in name and ":" not in name and "@" not in name):
        return ChatPolicy(load_model(name), settings, sampling, layout)
    left, at, model_name = name.partition("@")
    if left in POLICIES and left not in METHODS:
        raise PolicyError(f"{left} takes no model; call it {left!r}, got {name!r}. Methods are {', '.join(METHODS)}.")
    if left in METHODS:
        method = METHODS[left][0]
    elif is_target(left):
        found = load_attribute(left)
        takes = _parameters(found)
        if not at:
            if takes == 2:
                raise PolicyError(
                    f"{left} takes two arguments, as a method (settings, ask) does: write {left}@smollm2."
                )
            return as_policy(found, left)
        if takes != 2:
            raise PolicyError(
                f"A method is a function (settings, ask) -> act, got {found!r} for {left!r}. A policy takes no model: {left}."
            )
        method = found
    else:
        near = suggest(left, METHODS if at else [*POLICIES, *MODELS, *METHODS]) or "."
        raise PolicyError(
            f"No policy is called {name!r}{near} There are {', '.join([*POLICIES, *MODELS])}, METHOD@MODEL with a METHOD of "
            f"{', '.join(METHODS)}, module:attribute, and module:attribute@MODEL."
        )
    if not model_name:
        raise PolicyError(f"{left} needs a model: {left}@smollm2. Models are {', '.join(MODELS)}.")
    model = load_model(model_name)
    return PromptedPolicy(f"{left}@{model.name}", method, model, settings, sampling)


def _parameters(found: Any) -> int | None:
    """How many arguments a function must be given; None: it is no function."""
    if not inspect.isroutine(found):
        return None
    given = inspect.signature(found).parameters.values()
    return sum(
        one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in given
    )
