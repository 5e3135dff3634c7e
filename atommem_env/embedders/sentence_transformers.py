"""Embeddings by any model of the library `sentence-transformers`, on this machine and without a network."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atommem_env.errors import MissingDependency, ModelNotFound
from atommem_env.memory import unit
from atommem_env.types import EmbeddingKind

_PAD_TO = 16  # tokens of a row, or a multiple of it
_FORWARD_TOKENS = 8192  # of a forward pass, padding included; at least one row
_CHARACTERS = 64  # tokenized for each token of the window: more than a model reads, and less than a text of megabytes
_LONGEST = 2**21  # characters, where the model has no window, or a very long one
# What models call the text that goes before a query or a document, in the order in which the library looks for it.
_PROMPTS: Mapping[EmbeddingKind, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}


class SentenceTransformerEmbedder:
    """A SentenceTransformer (Reimers and Gurevych 2019): a folder, or a name of the Hugging Face Hub that was fetched before.

        hf download Qwen/Qwen3-Embedding-0.6B
        atommem eval … --embedder st:Qwen/Qwen3-Embedding-0.6B

    Before queries, and before documents, goes what the model's own configuration declares for them in `prompts`; that of
    Qwen3-Embedding holds an instruction for queries and nothing for documents. Of a text longer than the model's window the
    first tokens count. Vectors have the model's dimension, or its `truncate_dim`, and are scaled to length 1.

    On a processor a text has the same vector, bit for bit, whatever texts it is embedded with: rows are padded to a length
    that depends on their own text alone (the next multiple of 16 tokens), and a forward pass takes rows of one length. Shorter
    rows would not do: products of matrices with few rows add up in another order. On a GPU last bits can still differ.

    Args:
        model: the folder or the name.
        device: "cpu", "cuda" …; None: a GPU where there is one.

    Attributes:
        model: the `sentence_transformers.SentenceTransformer`.
        dtype: of weights and activations: "float32" on a processor, on a GPU as they were saved. Vectors are always float32.

    Raises:
        MissingDependency: a package of the extra `local` is not installed.
        ModelNotFound: the model is not on this machine.
    """

    def __init__(self, model: str | Path, *, device: str | None = None) -> None:
        try:
            import torch
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingDependency(
                f"The embedder 'st:{model}' cannot be loaded ({error}): pip install 'atommem[local]'."
            ) from error
        self._torch = torch
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        folder = self.folder = _find(str(model))
        # A relative path means something else in another working folder, and a store is looked up by this name.
        self.name = f"st:{folder.resolve() if Path(model).is_dir() else model}"
        try:
            self.model = SentenceTransformer(
                str(folder),
                device=self.device,
                local_files_only=True,
                # Most processors compute bfloat16 slowly.
                model_kwargs={"dtype": "float32" if self.device == "cpu" else "auto"},
            ).eval()
        except OSError as error:
            raise ModelNotFound(f"{folder} cannot be loaded as a SentenceTransformer: {error}") from error
        self.dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        self._prompts = {
            kind: next((prompt for name in names if (prompt := self.model.prompts.get(name))), "")
            for kind, names in _PROMPTS.items()
        }
        self._window = self.model.max_seq_length or math.inf
        self._characters = int(min(_CHARACTERS * self._window, _LONGEST))
        self.dimension = self._forward(self.model.preprocess(["dimension"]), "document").shape[1]

    def embed(self, texts: Sequence[str], kind: EmbeddingKind) -> NDArray[np.float32]:
        """The unit vectors [len(texts), D] of `texts`, in order."""
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        vectors = self._vectors([text[: self._characters] for text in texts], kind)
        vectors[~vectors.any(axis=1), 0] = 1  # no word that the model knows: some direction all the same
        return unit(vectors)

    def _vectors(self, texts: list[str], kind: EmbeddingKind) -> NDArray[np.float32]:
        """What the model makes of `texts`, [len(texts), D], of any length."""
        features = self.model.preprocess(texts, prompt=self._prompts[kind], task=kind)
        mask = features.get("attention_mask")
        if mask is None or len(mask) != len(texts):  # no rows of tokens: bags of words and the like
            return self._forward(features, kind)
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, used in enumerate(mask.sum(1).tolist()):
            by_length[min(-(-max(used, 1) // _PAD_TO) * _PAD_TO, self._window)].append(index)
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        for length, indices in by_length.items():
            most = max(1, _FORWARD_TOKENS // length)
            for start in range(0, len(indices), most):
                batch = indices[start : start + most]
                vectors[batch] = self._forward(self._rows(features, batch, length), kind)
        return vectors

    def _rows(self, features: Mapping[str, Any], batch: list[int], length: int) -> dict[str, Any]:
        """The features of the texts `batch`, those with a number for each token truncated or padded to `length`."""
        left = getattr(self.model.tokenizer, "padding_side", "right") == "left"
        tokens = features["attention_mask"].shape
        rows = dict(features)  # some are of the whole batch: what kind of input it is, how long the prompt
        for name, value in features.items():
            shape = getattr(value, "shape", ())
            if shape[:1] == tokens[:1]:
                rows[name] = value[batch]
            if shape == tokens:
                fill = self.model.tokenizer.pad_token_id if name == "input_ids" else 0
                sides = (_PAD_TO, 0) if left else (0, _PAD_TO)
                wide = self._torch.nn.functional.pad(rows[name], sides, value=fill)
                rows[name] = wide[:, -length:] if left else wide[:, :length]
        return rows

    def _forward(self, features: Mapping[str, Any], kind: EmbeddingKind) -> NDArray[np.float32]:
        """What the model makes of the features of some texts."""
        on_device = {name: value.to(self.device) if hasattr(value, "to") else value for name, value in features.items()}
        with self._torch.inference_mode():
            vectors = self.model(on_device, task=kind)["sentence_embedding"][:, : self.model.truncate_dim]
        embeddings: NDArray[np.float32] = vectors.float().cpu().numpy()
        return embeddings


def _find(model: str) -> Path:
    """The folder of a SentenceTransformer; nothing is fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(model).is_dir():
        folder = Path(model)
    else:
        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError) as error:
            raise ModelNotFound(
                f"{model!r} is neither a folder nor a model in Hugging Face's cache. Fetch one of the Hub by its whole name, "
                "for example: hf download Qwen/Qwen3-Embedding-0.6B"
            ) from error
    if not (folder / "modules.json").is_file():
        raise ModelNotFound(
            f"Expected the folder of a SentenceTransformer, {folder} has no modules.json. If it is a model of the Hub, fetch "
            f"all of it: hf download {model}"
        )
    return folder
