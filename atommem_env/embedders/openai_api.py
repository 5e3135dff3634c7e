"""Embeddings from a service that speaks the OpenAI API: vLLM on your own GPU, for example."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atommem_env.errors import EmbeddingError, SettingError
from atommem_env.openai_client import Attempts, Rejected, Service, Unavailable, import_openai
from atommem_env.types import EmbeddingKind

# Beginning of a model's own name → what stands before a query; as published with the model.
_QUERY_PREFIXES = {
    "Qwen3-Embedding": "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
}
# vLLM's: as many first tokens as the model reads. With its `truncation_side` the tokens that end a text would be dropped as well.
_TRUNCATION: dict[str, object] = {"truncate_prompt_tokens": -1}
_MAX_CHARACTERS = 32_768  # of a text that are sent: a text of megabytes would keep the service from all others
_BATCH = 32  # texts of a request; the most that every common service takes
_CONCURRENT = 8  # requests
_PATIENCE = 30.0  # seconds of an outage in which requests are tried again; after that once each, until one is answered
_LAST_TRY = 5.0  # seconds for an answer to a request that is not tried again
_PAUSES = 0.25, 2.0  # seconds after the first failure, doubled with each further one, and the longest


class OpenAIEmbedder:
    """The embedding model that the service at OPENAI_BASE_URL calls `model`; OPENAI_API_KEY where it asks for a key.

        vllm serve Qwen/Qwen3-Embedding-0.6B --runner pooling
        OPENAI_BASE_URL=http://localhost:8000/v1 atommem eval … --embedder openai:Qwen/Qwen3-Embedding-0.6B

    Where another service has the chat model, and OPENAI_BASE_URL, this one's address is OPENAI_EMBEDDING_BASE_URL.

    A model whose name, after its last slash, begins with "Qwen3-Embedding" reads the instruction that was published with it
    before each query. Other models embed queries as documents are. An empty text is sent as a space, which every service takes.

    Of a text longer than 32,768 characters the first 32,768 count, and of these, with vLLM, as many of the first tokens as the
    model reads. A service that does not know vLLM's parameter for that rejects longer texts, or truncates them by its own rule.

    A text's vector can differ in its last bits with the texts that the service happens to embed beside it, unless the service
    rules that out: runs with one seed can then differ where two entries are nearly as close to a query.

    Raises:
        MissingDependency: the extra `openai` is not installed.
        SettingError: neither address is set.
        EmbeddingError: as in `embed`; the dimension is asked for at once.
    """

    def __init__(self, model: str) -> None:
        openai = import_openai(f"The embedder 'openai:{model}'")
        url = os.environ.get("OPENAI_EMBEDDING_BASE_URL") or os.environ.get("OPENAI_BASE_URL")
        if not url:
            raise SettingError(
                f"The embedder 'openai:{model}' needs the address of a service in OPENAI_BASE_URL, for example "
                f"http://localhost:8000/v1 after `vllm serve {model} --runner pooling`, or in OPENAI_EMBEDDING_BASE_URL where "
                "another service has the chat model; neither is set."
            )
        self.name = f"openai:{model}"
        self._openai, self._model = openai, model
        key = os.environ.get("OPENAI_API_KEY")
        # The patience covers the wait for an answer as well: an environment's step must not hang for long.
        self._service = Service(self.name, url, key, patience=_PATIENCE, pauses=_PAUSES, timed_from_sending=True)
        own_name = model.rpartition("/")[2]
        self._query_prefix = next((text for start, text in _QUERY_PREFIXES.items() if own_name.startswith(start)), "")
        # The package's own retries can take minutes: a service may ask it to wait for one.
        self._client = openai.OpenAI(base_url=url, api_key=self._service.key, max_retries=0)
        self._truncation = _TRUNCATION
        try:
            vectors = self._request(["dimension"])
        except Rejected as rejection:
            if rejection.status not in (400, 422):
                raise self._rejection_error(["dimension"], rejection) from None
            self._truncation = {}  # it may not know how to truncate; if something else is wrong, it says so again
            vectors = self._vectors(["dimension"])
        self.dimension = vectors.shape[1]

    def embed(self, texts: Sequence[str], kind: EmbeddingKind) -> NDArray[np.float32]:
        """The unit vectors [len(texts), D] of `texts`, in order.

        Raises:
            EmbeddingError: the service did not answer for 30 seconds, rejected a text, or sent something else.
        """
        prefix = self._query_prefix if kind == "query" else ""
        sent = [prefix + text[:_MAX_CHARACTERS] or " " for text in texts]
        batches = [sent[start : start + _BATCH] for start in range(0, len(sent), _BATCH)]
        with ThreadPoolExecutor(_CONCURRENT) as pool:
            answers = list(pool.map(self._vectors, batches))
        for vectors in answers:
            if vectors.shape[1] != self.dimension:
                raise self._error(f"sent vectors of {vectors.shape[1]} numbers, and {self.dimension} before")
        return np.concatenate([np.empty((0, self.dimension), dtype=np.float32), *answers])

    def _vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The unit vectors [len(texts), D] of one request; raises `EmbeddingError`."""
        try:
            return self._request(texts)
        except Rejected as rejection:
            raise self._rejection_error(texts, rejection) from None

    def _request(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """`_vectors`, where the caller handles `Rejected`."""
        try:
            answer = self._post(texts)
        except Unavailable as outage:
            raise self._error(str(outage)) from None
        try:
            items = sorted(answer["data"], key=lambda item: item["index"])
            indices = [item["index"] for item in items]
            vectors = np.array([_decode(item["embedding"]) for item in items])
        except (KeyError, TypeError, ValueError):
            shown = self._service.safe(repr(str(answer)[:200]))
            raise self._error(f"sent no embeddings for {_described(texts)}: {shown}") from None
        if indices != list(range(len(texts))) or vectors.ndim != 2:
            raise self._error(
                f"sent an array of shape {vectors.shape} and the indices {indices[:99]} for {_described(texts)}"
            )
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not (np.isfinite(lengths).all() and lengths.all()):
            raise self._error(f"sent a vector that is not finite, or zero, for {_described(texts)}")
        unit: NDArray[np.float32] = (vectors / lengths).astype(np.float32)
        return unit

    def _post(self, texts: Sequence[str]) -> Any:
        """The service's answer, parsed where it is JSON.

        Raises:
            Rejected, Unavailable
        """
        attempts = Attempts(self._service)
        while True:
            left = max(attempts.seconds_left(), _LAST_TRY)
            try:
                response = self._client.embeddings.with_raw_response.create(
                    model=self._model,
                    input=list(texts),
                    encoding_format="base64",  # exact, and a third of the size of decimal numbers
                    extra_body=self._truncation,
                    timeout=self._openai.Timeout(left, connect=min(left, 5.0)),
                )
            except (self._openai.APIStatusError, self._openai.APIConnectionError) as error:
                time.sleep(attempts.pause_after(error))
            else:
                break
        self._service.answered()
        try:
            return response.http_response.json()
        except ValueError:
            return response.http_response.text

    def _rejection_error(self, texts: Sequence[str], rejection: Rejected) -> EmbeddingError:
        return self._error(f"rejected {_described(texts)} with status {rejection.status}: {rejection.reason}")

    def _error(self, what: str) -> EmbeddingError:
        return EmbeddingError(
            f"The embedding service at {self._service.address} {what}. Check that it runs and serves this model: "
            f"vllm serve {self._model} --runner pooling"
        )


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
