"""Embeddings from a service that speaks the OpenAI API: vLLM on your own GPU, for example."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atommem_env.background import in_background_blocking
from atommem_env.errors import EmbeddingError, SettingError
from atommem_env.openai_client import (
    Malformed,
    Rejected,
    Service,
    Unavailable,
    describe_answer,
    import_openai,
    sentence,
)
from atommem_env.service_words import is_too_long, prompt_lengths
from atommem_env.types import EmbeddingKind

# Beginning of a model's own name → what stands before a query; as published with the model.
_QUERY_PREFIXES = {
    "Qwen3-Embedding": "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
}
# vLLM's: as many first tokens as the model reads. With its `truncation_side` the tokens that end a text would be dropped as well.
# base64 is exact, and a third of the size of decimal numbers.
_OPTIONS: dict[str, object] = {"truncate_prompt_tokens": -1, "encoding_format": "base64"}
_MAX_CHARACTERS = 32_768  # of a text that are sent: a text of megabytes would keep the service from all others
_BATCH = 32  # texts of a request, or as many as the service takes
_SHORTEST = 64  # characters below which a text is not shortened any further
_BLANKS = " ", "."  # what is sent for an empty text: the first that the service takes
_CONCURRENT = 8  # requests
_PATIENCE = 30.0  # seconds of an outage in which requests are tried again; after that once each, until one is answered
_PAUSES = 0.25, 2.0  # seconds after the first failure, doubled with each further one, and the longest


class OpenAIEmbedder:
    """The embedding model that the service at OPENAI_BASE_URL calls `model`; OPENAI_API_KEY where it asks for a key.

        vllm serve Qwen/Qwen3-Embedding-0.6B --runner pooling
        OPENAI_BASE_URL=http://localhost:8000/v1 atommem eval … --embedder openai:Qwen/Qwen3-Embedding-0.6B

    Where another service has the chat model, and OPENAI_BASE_URL, this one's address is OPENAI_EMBEDDING_BASE_URL.

    A model whose name, after its last slash, begins with "Qwen3-Embedding" reads the instruction that was published with it
    before each query. Other models embed queries as documents are. An empty text is sent as a space, or as a full stop to a
    service that rejects blank texts.

    Of a text longer than 32,768 characters the first 32,768 count, and of these, with vLLM, as many of the first tokens as the
    model reads. A service that does not know vLLM's parameter for that truncates longer texts by its own rule; where it rejects
    them, their ends are left out until it does not. Each text is shortened by itself, so that its vector depends on no other.

    Fields that the service rejects, and more texts in a request than it takes, are left out from then on; warnings list them.

    A text's vector can differ in its last bits with the texts that the service happens to embed beside it, unless the service
    rules that out: runs with one seed can then differ where two entries are nearly as close to a query.

    Raises:
        MissingDependency: the extra `openai` is not installed.
        SettingError: neither address is set, or it is none.
        EmbeddingError: as in `embed`; the dimension is asked for at once.
    """

    def __init__(self, model: str) -> None:
        import_openai(f"The embedder 'openai:{model}'")
        setting = "OPENAI_EMBEDDING_BASE_URL" if os.environ.get("OPENAI_EMBEDDING_BASE_URL") else "OPENAI_BASE_URL"
        url = os.environ.get(setting)
        if not url:
            raise SettingError(
                f"The embedder 'openai:{model}' needs the address of a service in OPENAI_BASE_URL, for example "
                f"http://localhost:8000/v1 after `vllm serve {model} --runner pooling`, or in OPENAI_EMBEDDING_BASE_URL where "
                "another service has the chat model; neither is set."
            )
        self.name = f"openai:{model}"
        self._model = model
        # The patience covers the wait for an answer as well: an environment's step must not hang for long.
        self._service = Service(
            self.name,
            url,
            os.environ.get("OPENAI_API_KEY"),
            setting=setting,
            patience=_PATIENCE,
            pauses=_PAUSES,
            timeout=_PATIENCE,
            timed_from_sending=True,
        )
        own_name = model.rpartition("/")[2]
        self._query_prefix = next((text for start, text in _QUERY_PREFIXES.items() if own_name.startswith(start)), "")
        self._options = _OPTIONS
        self._batch, self._blank = _BATCH, _BLANKS[0]
        self._replaced = 0  # texts that were sent in another form
        self.dimension = in_background_blocking(self._first_vectors(["dimension"])).shape[1]

    def embed(self, texts: Sequence[str], kind: EmbeddingKind) -> NDArray[np.float32]:
        """The unit vectors [len(texts), D] of `texts`, in order.

        Raises:
            EmbeddingError: the service did not answer for 30 seconds, rejected a text, or sent something else.
        """
        prefix = self._query_prefix if kind == "query" else ""
        vectors = in_background_blocking(self._embed([prefix + text[:_MAX_CHARACTERS] for text in texts]))
        if vectors.shape[1] != self.dimension:
            raise self._error(f"sent vectors of {vectors.shape[1]} numbers, and {self.dimension} before")
        return vectors

    async def _embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """`embed`, several requests at a time."""
        gate = asyncio.Semaphore(_CONCURRENT)

        async def one(batch: Sequence[str]) -> NDArray[np.float32]:
            async with gate:
                return await self._vectors(batch)

        batches = [texts[start : start + self._batch] for start in range(0, len(texts), self._batch)]
        tasks = [asyncio.ensure_future(one(batch)) for batch in batches]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        sizes = {vectors.shape[1] for vectors in answers} or {self.dimension}
        if len(sizes) > 1:
            raise self._error(f"sent vectors of {' and of '.join(map(str, sorted(sizes)))} numbers")
        return np.concatenate([np.empty((0, sizes.pop()), dtype=np.float32), *answers])

    async def _first_vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """`_vectors` of the first request, which determines the options that the service knows."""
        tried = [self._options]
        while True:
            try:
                vectors = await self._request(texts)
                break
            except Rejected as rejection:
                named = rejection.names(self._options)
                without = {name: value for name, value in self._options.items() if name not in named}
                # Where it names none, the one that only vLLM knows goes first.
                fewer = [without, dict(list(self._options.items())[1:])]
                untried = [options for options in fewer if options not in tried]
                if not rejection.is_of_form or not untried:
                    raise self._rejection_error(texts, rejection) from None
                self._options = untried[0]
                tried.append(self._options)
        if "encoding_format" not in self._options:
            self._service.note("encoding", "does not accept encoding_format: vectors are sent as it prefers.")
        return vectors

    async def _vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The unit vectors [len(texts), D], from as few requests as the service accepts; raises `EmbeddingError`."""
        texts = [text or self._blank for text in texts]
        try:
            return await self._request(texts)
        except Rejected as rejection:
            if not (rejection.is_of_form or rejection.status == 413 or is_too_long(rejection.said)):
                raise self._rejection_error(texts, rejection) from None
            if len(texts) == 1:
                return await self._vectors_of_one(texts[0], rejection)
            half, replaced = (len(texts) + 1) // 2, self._replaced
            halves = [await self._vectors(texts[:half]), await self._vectors(texts[half:])]
            # Where a text in it was rejected alone as well, the number of texts was not what it was rejected for.
            if self._replaced == replaced and half < self._batch:
                self._batch = half
                self._service.note("batch", f"does not take {len(texts)} texts in a request: {rejection.reason}")
            return np.concatenate(halves)

    async def _vectors_of_one(self, text: str, rejection: Rejected) -> NDArray[np.float32]:
        """The unit vector [1, D] of a text that was rejected: of its replacement if it is blank, of its beginning if too long."""
        if not text.strip():
            vectors = await self._request_or_error([_BLANKS[1]])
            self._blank = _BLANKS[1]
            self._replaced += 1
            self._service.note("blank", "does not take blank texts: a full stop is sent for each.")
            return vectors
        while is_too_long(rejection.said) and len(text) > _SHORTEST:
            tokens, room = prompt_lengths(rejection.said, 0)
            fits = int(0.95 * len(text) * room / tokens) if tokens and room and room < tokens else len(text) // 2
            text = text[: max(fits, _SHORTEST)]
            try:
                vectors = await self._request([text])
            except Rejected as again:
                rejection = again
            else:
                self._replaced += 1
                self._service.note(
                    "shortened", f"rejects long texts; their beginnings are embedded: {rejection.reason}"
                )
                return vectors
        raise self._rejection_error([text], rejection)

    async def _request_or_error(self, texts: Sequence[str]) -> NDArray[np.float32]:
        try:
            return await self._request(texts)
        except Rejected as rejection:
            raise self._rejection_error(texts, rejection) from None

    async def _request(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The unit vectors [len(texts), D] of one request.

        Raises:
            Rejected: the service does not accept the request.
            EmbeddingError: it is out of reach, or sent something else.
        """
        body = {"model": self._model, "input": list(texts), **self._options}
        try:
            return await self._service.ask("/embeddings", body, lambda answer: _unit_vectors(answer, texts))
        except (Unavailable, Malformed) as error:
            raise self._error(str(error)) from None

    def _rejection_error(self, texts: Sequence[str], rejection: Rejected) -> EmbeddingError:
        return self._error(rejection.clause(_described(texts)))

    def _error(self, what: str) -> EmbeddingError:
        return EmbeddingError(
            f"The embedding service at {self._service.address} {sentence(what)} Check that it runs and serves this "
            f"model: vllm serve {self._model} --runner pooling"
        )


def _unit_vectors(answer: Any, texts: Sequence[str]) -> NDArray[np.float32]:
    """The unit vectors [len(texts), D] in the parsed JSON of an answer; raises `Malformed`."""
    items = answer.get("data") if isinstance(answer, Mapping) else None
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise Malformed(f"sent no embeddings for {_described(texts)} but {describe_answer(answer)}")
    try:
        if any(item.get("index") is not None for item in items):  # else they are in the order of the texts
            items = sorted(items, key=lambda item: item["index"])
            indices = [item["index"] for item in items]
        else:
            indices = list(range(len(items)))
        vectors = np.array([_decode(item["embedding"]) for item in items])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise Malformed(f"sent no embeddings for {_described(texts)} but {describe_answer(answer)}") from None
    if indices != list(range(len(texts))) or vectors.ndim != 2 or not vectors.size:
        raise Malformed(f"sent an array of shape {vectors.shape} and the indices {indices[:9]} for {_described(texts)}")
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and lengths.all()):
        raise Malformed(f"sent a vector that is not finite, or zero, for {_described(texts)}")
    unit: NDArray[np.float32] = (vectors / lengths).astype(np.float32)
    return unit


def _described(texts: Sequence[str]) -> str:
    return f"{len(texts)} texts, the longest of {max(map(len, texts))} characters"


def _decode(embedding: str | list[float]) -> NDArray[np.float64]:
    """The numbers of an embedding, in base64 as asked for, or as a list, from services that know nothing else.

    >>> _decode("AACAPwAAAEA=").tolist(), _decode([1, 2]).tolist()
    ([1.0, 2.0], [1.0, 2.0])
    """
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), dtype="<f4").astype(np.float64)
    return np.array(embedding, dtype=np.float64)
