"""Checkpoints of a training run: resumed after a kill, it continues as if it had never been stopped.

A checkpoint holds tensors, numbers and text, and is read without unpickling (PyTorch's `weights_only=True`): a run's folder that
came from someone else cannot run code of theirs.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from atommem_env.errors import CheckpointError, SettingError

_FORMAT = 2  # 1 held NumPy arrays, which have to be unpickled


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes; of a model with adapters, the adapters."""
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Sets the weights that `trained_weights` gave.

    Raises:
        CheckpointError: they are those of another model.
    """
    own = trained_weights(model)
    if {name: weight.shape for name, weight in own.items()} != {name: weight.shape for name, weight in weights.items()}:
        raise CheckpointError("The checkpoint is of another model. Start with the same --model, or with a new --out.")
    for name, weight in own.items():
        weight.copy_(weights[name])


def random_state() -> dict[str, Any]:
    """The state of every global random generator that a model, a library or a user's code may draw from."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 (a library's draws, not ours)
    name, key, *position = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (name, key.tolist(), *position),  # an array would have to be unpickled
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undoes what was drawn since `random_state`."""
    random.setstate(state["python"])
    name, key, *position = state["numpy"]
    np.random.set_state((name, np.array(key, np.uint32), *position))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def check_disk(folder: Path, needed: int) -> None:
    """Whether a run's folder has room for its checkpoints, of `needed` bytes each.

    Raises:
        SettingError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < 2 * needed:  # the checkpoint before stays until the next is complete
        raise SettingError(
            f"Checkpoints need about {2 * needed / 1e9:.1f} GB (two of {needed / 1e9:.1f} GB at the moment of a change); "
            f"{free / 1e9:.1f} GB are free in {folder}. Make room, or choose another --out."
        )


def save(path: Path, state: dict[str, Any]) -> None:
    """Replaces `path` by `state`: a run that is killed meanwhile, or runs out of disk, still has the file from before.

    Raises:
        CheckpointError: it could not be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save({"format": _FORMAT, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        free = 0
        if path.parent.is_dir():
            partial.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free
        before = "The one before is intact" if path.exists() else "There is none from before"
        raise CheckpointError(
            f"The checkpoint {path} could not be written ({error}); {free / 1e6:,.0f} MB are free there. {before}. "
            "Make room, then resume the run with --resume."
        ) from error


def load(path: Path) -> dict[str, Any]:
    """What `save` was given.

    Raises:
        CheckpointError: there is no checkpoint, it cannot be read, or only by unpickling, which is not done.
    """
    if not path.is_file():
        raise CheckpointError(f"Nothing to resume: {path} does not exist. Leave --resume out to start.")
    try:
        if not zipfile.is_zipfile(path):  # so PyTorch wrote no such file, or not all of it
            raise ValueError("it is not a whole file of PyTorch's")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was written by an earlier version of AtomMem, or by someone who put code into it: reading it could run that "
            "code, so it was not read. Finish the run with the version that began it, or start a new one with another --out."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Start a new run with another --out.") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} is no checkpoint of format {_FORMAT}, which this version reads. Start a new run with another --out."
        )
    state: dict[str, Any] = checkpoint["state"]
    return state
