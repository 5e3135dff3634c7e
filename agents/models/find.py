"""Where the models on this machine are; nothing is fetched."""

from __future__ import annotations

import re
from pathlib import Path

from atommem_env.errors import MissingDependency, ModelNotFound
from atommem_env.paths import data_folder
from atommem_env.plugins import suggest

# Endings of the files that a model is made of.
WEIGHTS = (".safetensors", ".bin", ".gguf", ".model", ".json", ".jinja", ".txt")
TINY = Path(__file__).parent / "tiny"  # a base model of the synthetic world, made by train/tiny_base.py


def find_model(name_or_path: str) -> Path:
    """The folder of a model on this machine; nothing is fetched.

    Args:
        name_or_path: A folder that holds a `config.json`; `tiny`, which is shipped; the name of a fetched model; or a name of
            the Hugging Face Hub (`Qwen/Qwen3-0.6B`) that is in its cache.

    Raises:
        ModelNotFound: none of these; the message names the command that fetches it.
    """
    if (Path(name_or_path) / "config.json").is_file():
        return Path(name_or_path)
    if name_or_path == "tiny":
        return TINY
    if name_or_path == "smollm2":
        folder = data_folder("models", name_or_path)
        if (folder / "config.json").is_file():
            return folder
        raise ModelNotFound(f"The model 'smollm2' is not in {folder}. Fetch it: atommem models get smollm2")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name_or_path):
        return _find_in_cache(name_or_path)
    raise ModelNotFound(
        f"Expected the folder of a Hugging Face model (with a config.json), 'tiny' or 'smollm2', got {name_or_path!r}"
        f"{suggest(name_or_path, ('tiny', 'smollm2')) or '.'}"
    )


def _find_in_cache(name: str) -> Path:
    """The snapshot of a model of the Hub in Hugging Face's own cache."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise MissingDependency(f"A local model needs {error.name!r}: pip install 'atommem[local]'.") from error
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        folder = None
    if folder and (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return folder
    raise ModelNotFound(
        f"{name} is neither a folder with a config.json nor, with its weights, in Hugging Face's cache. "
        f"Fetch it: hf download {name}"
    )


def model_label(name: str) -> str:
    """What tables call a model on this machine: its name, or its folder's; of `…/grpo/model`, as training writes it, `grpo`.

    >>> model_label("runs/grpo/model"), model_label("Qwen/Qwen3-8B"), model_label("tiny")
    ('grpo', 'Qwen3-8B', 'tiny')
    """
    path = Path(name).resolve()  # not the folder that was found: one of the cache is called by a commit
    return path.parent.name if path.name == "model" and path.parent.name else path.name
