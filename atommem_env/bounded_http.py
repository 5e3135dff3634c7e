"""An HTTP client whose answers have a limited size and a limited time, and that follows no redirect.

Needs `httpx`, which comes with the package `openai`.
"""

from __future__ import annotations

import asyncio
import ssl
import zlib
from functools import cache
from typing import Any

import httpx

MAX_BYTES = 16 * 2**20  # of an answer, also once it is decompressed
_CONNECTIONS = 100  # most connections; each waits for the next request
_DECODED = "content-encoding", "content-length", "transfer-encoding"  # headers of a body as it was sent


class OversizedBody(httpx.RequestError):
    """An answer is larger than `MAX_BYTES`."""


class UnreadableBody(httpx.RequestError):
    """An answer is compressed in a way that was not asked for, or its compressed data are damaged."""


class BoundedClient(httpx.AsyncClient):
    """A client for answers that are read whole.

    A request's read timeout is the time for the whole answer, headers and body. A redirect is an answer like any other: a key
    must not reach another address.

    Raises:
        OversizedBody, UnreadableBody, httpx.ReadTimeout: in `send`, as soon as it is known.
    """

    def __init__(self) -> None:
        limits = httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS)
        super().__init__(follow_redirects=False, limits=limits, verify=_ssl_context())
        self.headers["Accept-Encoding"] = "identity"

    async def send(self, request: httpx.Request, *, stream: bool = False, **options: Any) -> httpx.Response:
        seconds = request.extensions.get("timeout", {}).get("read")
        try:
            async with asyncio.timeout(seconds):
                return await self._read(request, options)
        except TimeoutError as error:
            raise httpx.ReadTimeout(f"no complete answer within {seconds:g} s", request=request) from error

    async def _read(self, request: httpx.Request, options: dict[str, Any]) -> httpx.Response:
        response = await super().send(request, stream=True, **options)
        try:
            body = _Body(response.headers.get("content-encoding", ""))
            async for piece in response.aiter_raw():
                body.add(piece)
        finally:
            await response.aclose()
        headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in _DECODED]
        return httpx.Response(response.status_code, headers=headers, content=bytes(body.content), request=request)


@cache
def _ssl_context() -> ssl.SSLContext:
    """To read the certificates takes longer than a request does."""
    return httpx.create_ssl_context()


class _Body:
    """A body that is decompressed no further than it may be long."""

    def __init__(self, encoding: str) -> None:
        self.content = bytearray()
        self._decompress = None
        if encoding.strip().lower() in ("gzip", "x-gzip", "deflate"):
            self._decompress = zlib.decompressobj(zlib.MAX_WBITS | 32)  # reads the header of either
        elif encoding.strip().lower() not in ("", "identity"):
            raise UnreadableBody(f"compressed by {encoding[:40]!r}, which was not asked for")

    def add(self, piece: bytes) -> None:
        if self._decompress is not None:
            try:
                piece = self._decompress.decompress(piece, MAX_BYTES + 1)
            except zlib.error as error:
                raise UnreadableBody(f"damaged compressed data ({error})") from error
        self.content += piece
        if len(self.content) > MAX_BYTES:
            raise OversizedBody(f"more than {MAX_BYTES:,} bytes")
