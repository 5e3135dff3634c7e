"""Model back ends by name."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from agents.chat_policy import ChatModel
from agents.models.find import find_model, model_label
from agents.models.openai_api import OpenAIModel
from agents.models.transformers_model import TransformersModel
from agents.models.vllm_model import VLLMModel
from atommem_env.errors import ModelNotFound, PluginError, PolicyError
from atommem_env.plugins import is_target, load_attribute

MODELS = {
    "tiny": "a base model of the synthetic world that has not learned the task yet (0.9 million parameters; use --layout terse)",
    "smollm2": "SmolLM2-135M-Instruct, a language model on this machine (first: atommem models get smollm2)",
    "FOLDER": "a chat model in Hugging Face's form, on this machine; its name on the Hub where Hugging Face's cache has it",
    "openai:NAME": "what a service that speaks the OpenAI API calls NAME; at OPENAI_BASE_URL, with the key in OPENAI_API_KEY",
    "vllm:MODEL": "one of the first three by vLLM in this process",
    "module:attribute": "your own model object, see agents.chat_policy.ChatModel",
}


def is_model(name: str) -> bool:
    """Whether `load_model` is meant by a name; the model itself may yet be missing.

    >>> is_model("tiny"), is_model("openai:Qwen/Qwen3-8B"), is_model("my_module:policy"), is_model("oracle")
    (True, True, False, False)
    """
    return (
        name in ("tiny", "smollm2") or name.startswith(("openai:", "vllm:")) or (Path(name) / "config.json").is_file()
    )


@cache
def load_model(name: str) -> ChatModel:
    """The model called `name`: one object in a process, whoever asks, so that all share its weights, batches and limits.

    Args:
        name: `tiny`, `smollm2`, or a folder: on this machine, by `transformers`; `openai:NAME`, a service that speaks the OpenAI
            API; `vllm:` before one of the first three, vLLM in this process; `module:attribute`, your own object.

    Raises:
        ModelNotFound: there is none of that name, or it was not fetched yet.
        PolicyError: `module:attribute` names something else than a model.
        MissingDependency: the back end's package is not installed.
        SettingError: a service without an address; no chat model.
    """
    back_end, colon, rest = name.partition(":")
    if colon and rest and back_end == "openai":
        return OpenAIModel(rest)
    if colon and rest and back_end == "vllm":
        return VLLMModel(rest)
    try:
        if is_target(name) and not is_model(name):
            return as_model(load_attribute(name))
        model = TransformersModel(find_model(name))
        model.name = model_label(name)
        return model
    except (ModelNotFound, PluginError) as error:
        raise ModelNotFound(f"{error} There are {', '.join(MODELS)}.") from error


def as_model(model: ChatModel | str) -> ChatModel:
    """`model` itself, or the model of that name.

    Raises:
        PolicyError: it is neither.
        Exception: see `load_model`.
    """
    if isinstance(model, str):
        return load_model(model)
    if isinstance(model, type):
        raise PolicyError(f"A model must be an object, got the class {model.__name__}: give {model.__name__}(…).")
    if not isinstance(model, ChatModel):
        raise PolicyError(
            f"A model is a name or an object with name and complete(), see agents.chat_policy.ChatModel; got {model!r}."
        )
    return model
