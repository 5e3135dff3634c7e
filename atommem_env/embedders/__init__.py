"""Embedders: they turn texts into the vectors that a memory is searched by."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from atommem_env.errors import EmbeddingError, SettingError
from atommem_env.plugins import is_target, load_part, suggest
from atommem_env.types import EmbeddingKind, EmbeddingRequest, Vector

_CACHED_ENTRIES = 32_768  # about 50 MB of vectors of 384 numbers


class Embedder(Protocol):
    """Turns texts into unit vectors. A text's vector must not depend on the texts it is embedded with."""

    name: str
    dimension: int  # D

    def embed(self, texts: Sequence[str], kind: EmbeddingKind) -> NDArray[np.float32]:
        """The unit vectors [len(texts), D] of `texts`, in order; [0, D] for none."""
        ...


def check_embedder_name(name: str) -> None:
    """Whether `get_embedder` can be meant by a name; nothing is loaded, imported or called.

    Raises:
        SettingError: it cannot.
    """
    kind, _, model = name.partition(":")
    if name in ("hashing", "minilm") or (kind in ("st", "openai") and model) or is_target(name):
        return
    raise SettingError(
        f"embedder must be 'hashing', 'minilm', 'st:MODEL', 'openai:MODEL' or module:attribute, got {name!r}"
        f"{suggest(name, ('hashing', 'minilm')) or '.'}"
    )


@lru_cache(maxsize=8)
def get_embedder(name: str) -> CachedEmbedder:
    """The embedder of the setting `embedder`, with a cache; one per process.

    Args:
        name: "hashing" (no model), "minilm" (all-MiniLM-L6-v2), "st:MODEL" (a SentenceTransformer on this machine: a folder, or
            a name of the Hugging Face Hub), "openai:MODEL" (a service that speaks the OpenAI API, at OPENAI_BASE_URL), or
            `module:attribute` of an object or class of one's own.

    Raises:
        SettingError: `name` is none of these.
        MissingDependency: the embedder's packages are not installed.
        ModelNotFound: the model of "st:MODEL" is not on this machine.
        EmbeddingError: the service of "openai:MODEL" does not answer as it should.
    """
    check_embedder_name(name)
    if name == "hashing":
        from atommem_env.embedders.hashing import HashingEmbedder

        return CachedEmbedder(HashingEmbedder(), _CACHED_ENTRIES)
    if name == "minilm":
        from atommem_env.embedders.minilm import MiniLMEmbedder

        return CachedEmbedder(MiniLMEmbedder(), _CACHED_ENTRIES)
    kind, _, model = name.partition(":")
    if kind == "st" and model:
        from atommem_env.embedders.sentence_transformers import SentenceTransformerEmbedder

        return CachedEmbedder(SentenceTransformerEmbedder(model), _CACHED_ENTRIES)
    if kind == "openai" and model:
        from atommem_env.embedders.openai_api import OpenAIEmbedder

        return CachedEmbedder(OpenAIEmbedder(model), _CACHED_ENTRIES)
    part = load_part(name)
    missing = [needed for needed in ("name", "dimension", "embed") if not hasattr(part, needed)]
    if missing:
        raise SettingError(
            f"An embedder is an object like atommem_env.embedders.Embedder; {name} has no {', '.join(missing)}."
        )
    return CachedEmbedder(part, _CACHED_ENTRIES)


def embed(embedder: Embedder, requests: Sequence[EmbeddingRequest]) -> NDArray[np.float32]:
    """The vectors [len(requests), D] that `requests` ask for, in their order, by one call of the embedder for each kind.

    Raises:
        EmbeddingError: the embedder returned another number of vectors, or of another dimension.
    """
    vectors = np.empty((len(requests), embedder.dimension), dtype=np.float32)
    for kind in get_args(EmbeddingKind):
        indices = [index for index, request in enumerate(requests) if request.kind == kind]
        if not indices:
            continue
        computed = embedder.embed([requests[index].text for index in indices], kind)
        if np.shape(computed) != (len(indices), embedder.dimension):
            raise EmbeddingError(
                f"The embedder {embedder.name!r} must return an array of shape {(len(indices), embedder.dimension)} for "
                f"{len(indices)} texts, got {np.shape(computed)}."
            )
        vectors[indices] = computed
    return vectors


class CachedEmbedder:
    """Caches the vectors of the texts requested last; safe to use from several threads.

    Args:
        embedder: computes what is missing, each text once, in one call.
        entries: most vectors in the cache; the least recently used are dropped first.
    """

    def __init__(self, embedder: Embedder, entries: int) -> None:
        self.name, self.dimension = embedder.name, embedder.dimension
        self.inner = embedder
        self.hits = 0  # texts that were in the cache, or earlier in the same call
        self.misses = 0  # texts that were embedded
        self._entries = entries
        self._vectors: OrderedDict[tuple[str, bytes], Vector] = OrderedDict()
        self._lock = threading.Lock()

    def embed(self, texts: Sequence[str], kind: EmbeddingKind) -> NDArray[np.float32]:
        """The unit vectors [len(texts), D] of `texts`, in order."""
        # Digests as keys: otherwise thousands of texts of any size would stay in memory.
        keys = [(kind, blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()) for text in texts]
        with self._lock:
            missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._vectors}
            # Copies: a view of a row would keep the whole batch in memory.
            computed = [row.copy() for row in self.inner.embed(list(missing.values()), kind)] if missing else []
            self._vectors.update(zip(missing, computed, strict=True))
            self.misses += len(missing)
            self.hits += len(texts) - len(missing)
            vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
            for row, key in zip(vectors, keys, strict=True):
                row[:] = self._vectors[key]
                self._vectors.move_to_end(key)
            while len(self._vectors) > self._entries:
                self._vectors.popitem(last=False)
        return vectors
