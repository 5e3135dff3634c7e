"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agents.baselines import oracle, planner, sanity, world_reader
from agents.baselines.append_all import append_all
from agents.baselines.full_context import full_context
from agents.baselines.memagent import memagent
from agents.baselines.no_memory import no_memory
from agents.baselines.rag import rag
from agents.chat_policy import GREEDY, ChatModel, ChatPolicy, Sampling
from agents.models.find import find_model
from agents.models.load import MODELS, as_model, is_model, load_model
from agents.policy import Act, Policy, as_policy, is_method, name_of_function
from agents.prompting import Method, PromptedPolicy
from atommem_env.errors import PluginError, PolicyError
from atommem_env.plugins import is_target, load_attribute, suggest
from atommem_env.prompts import Layout
from atommem_env.types import EpisodeSettings

# name → its factory, and what it does; a star marks the privileged, which are given the golds.
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
        "synthetic tasks only: stores facts of the relations that the question names, about anything",
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
# name → the method, which is given a model: `rag@smollm2`
METHODS: dict[str, tuple[Method, str]] = {
    "no-memory": (no_memory, "asks the question alone: what the model knows by itself"),
    "full-context": (
        full_context,
        "asks with the whole document, without its middle where the model's window is too short",
    ),
    "rag": (
        rag,
        "stores every document, searches for the question, asks with the matches; --set retrieval=bm25 or hybrid",
    ),
    "append-all": (append_all, "stores every chunk whole, searches for the question, asks with the matches"),
    "memagent": (memagent, "MemAgent: the model rewrites one memory with every chunk, and answers from it"),
}


def load_policy(
    policy: str | Policy | Act | ChatModel | Method,
    settings: EpisodeSettings,
    sampling: Sampling = GREEDY,
    layout: str | Layout = "shared_prefix",
    *,
    model: ChatModel | str | None = None,
) -> Policy:
    """The policy that a name or an object stands for, for episodes with these settings.

    Args:
        policy: an object, or a name. An object is

            - a function observation → text, plain or asynchronous, or a `Policy`: itself;
            - a `ChatModel`: that model as an AtomMem agent;
            - a method (`agents.prompting.Method`), a function (settings, ask) → act: with `model` behind it.

            A name is

            - `NAME`, one of `POLICIES`, or `constant=TEXT`;
            - `MODEL`, one of `agents.models.load.MODELS`: that model as an AtomMem agent;
            - `METHOD@MODEL`, one of `METHODS` with any model behind it; or `METHOD` alone, and `model`;
            - `module:attribute`, any of the objects above; `module:attribute@MODEL`, your own method with any model behind
              it. The module is looked for in the working folder first, and nothing that it holds is called.
        settings: the dynamics of the episodes; a policy writes in their dialect.
        sampling: how a language model samples; nothing to other policies.
        layout: how a model that is the agent is shown an observation, see `atommem_env.prompts`; nothing to other policies.
        model: behind a method, where its name does not hold one: an object or a name.

    Raises:
        PolicyError: there is none of that name; it is no policy; a method lacks a model, or another policy was given one.
        ModelNotFound: there is no such model, or it was not fetched yet.
        SettingError: a method cannot work with these settings.
    """
    part: Any = policy
    label = None
    if isinstance(policy, str):
        part, label, model_name = _find(policy, settings)
        if model_name is not None and model is not None:
            raise PolicyError(f"{policy} names its model already; leave out model=.")
        model = model_name if model is None else model
    if is_method(part):
        return _with_model(part, label or name_of_function(part), settings, sampling, model)
    if model is not None:
        raise PolicyError(
            f"A method is a function (settings, ask) -> act, got {part!r}{f' for {label!r}' if label else ''}. "
            f"A policy takes no model{f': {label}' if label else ''}."
        )
    if isinstance(part, ChatModel) and not isinstance(part, Policy | type):
        return ChatPolicy(part, settings, sampling, layout)
    return as_policy(part, label)


def _with_model(
    method: Method, label: str, settings: EpisodeSettings, sampling: Sampling, model: ChatModel | str | None
) -> Policy:
    if not model:
        raise _lacks_model(label)
    loaded = as_model(model)
    return PromptedPolicy(f"{label}@{loaded.name}", method, loaded, settings, sampling)


def _lacks_model(label: str) -> PolicyError:
    return PolicyError(f"{label} needs a model: {label}@smollm2, or model=… in Python. Models are {', '.join(MODELS)}.")


def check_policy_name(name: str, *, complete: bool = True) -> None:
    """Whether `load_policy` can be meant by a name; no model is loaded or looked for, and no module imported.

    Args:
        complete: whether the name of a method must hold its model.

    Raises:
        PolicyError: it cannot.
        ModelNotFound: it is a method with a model that cannot be.
    """
    if name.startswith("constant=") or name in POLICIES or _is_model_name(name):
        return
    left, at, model = name.partition("@")
    if left in POLICIES:
        raise PolicyError(f"{left} takes no model; call it {left!r}, got {name!r}. Methods are {', '.join(METHODS)}.")
    if not (left in METHODS or is_target(left)):
        hint = suggest(left, [*POLICIES, *METHODS, *MODELS])
        raise PolicyError(
            f"No policy is called {name!r}{hint or '.'} There are {', '.join([*POLICIES, *MODELS])}, METHOD@MODEL with a METHOD "
            f"of {', '.join(METHODS)}, module:attribute, and module:attribute@MODEL."
        )
    if left in METHODS and not model and (complete or at):
        raise _lacks_model(left)
    if model and not (_is_model_name(model) or is_target(model)):
        find_model(model)  # says what it could be


def _is_model_name(name: str) -> bool:
    """Whether a name is a model's, on this machine or not."""
    return is_model(name) or ("/" in name and ":" not in name and "@" not in name)


def _find(name: str, settings: EpisodeSettings) -> tuple[Any, str | None, str | None]:
    """What a name stands for, as an object; what tables call that, where the object does not say; the model named with it."""
    check_policy_name(name, complete=False)
    if name.startswith("constant="):
        return sanity.Constant(settings, name.removeprefix("constant=")), None, None
    if name in POLICIES:
        return POLICIES[name][0](settings), name, None
    if _is_model_name(name):
        return load_model(name), name, None
    left, at, model_name = name.partition("@")
    if left in METHODS:
        part: Any = METHODS[left][0]
    else:
        try:
            part = load_attribute(left)
        except PluginError as error:
            raise PolicyError(f"The policy {name!r} cannot be loaded: {error}") from error
    return part, left, model_name if at else None
