"""Downloads a dataset's published file on request, and keeps it only if its SHA-256 is the known one.

A broken download is resumed, also by a later call, if the server supports it (HTTP `Range`) and still has the same file
(`ETag` and length); else it starts from the beginning.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import importlib.metadata
import json
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Protocol

from atommem_env.errors import DataError, DatasetNotFound, SettingError
from atommem_env.redaction import without_secrets
from atommem_env.tasks.catalogue import sha256_of

PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds before each retry
TIMEOUT = 30.0  # seconds without a byte after which a connection counts as broken
_PIECE = 1 << 18  # most bytes read at a time
_RESERVE = 1 << 30  # bytes of the disk that a file of unknown size leaves free; half of what is free where that is less
_SLOW = 60.0, 60 * 1024  # a connection that brings fewer bytes in so many seconds counts as broken
_PROGRESS = 1 << 20  # new bytes after which the retries start over: the connection is bad, but it makes progress
_CONNECTION_ERRORS = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)
_RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)  # statuses of temporary errors


@dataclass(frozen=True, slots=True)
class Published:
    """A published file with its known size and hash."""

    url: str
    bytes: int
    sha256: str


# Several independent public sources agree on these hashes and sizes. MuSiQue's are the files of the official archive (a shared
# folder without stable links), 2WikiMultiHopQA's a conversion, both at fixed revisions of the Hugging Face hub.
_HUB = "https://huggingface.co/datasets"
_HOTPOTQA = "http://curtis.ml.cmu.edu/datasets/hotpot"
_MUSIQUE = f"{_HUB}/dgslibisey/MuSiQue/resolve/c8f4f8c9465fb69d31a8eae894c3fd509c4ca321"
_TWOWIKI = f"{_HUB}/xanhho/2WikiMultihopQA/resolve/612bc5039a457880d9e7d84c3b0a4cf154b70e4f"
PUBLISHED = {
    ("hotpotqa", "train"): Published(
        f"{_HOTPOTQA}/hotpot_train_v1.1.json",
        566_426_227,
        "26650cf50234ef5fb2e664ed70bbecdfd87815e6bffc257e068efea5cf7cd316",
    ),
    ("hotpotqa", "dev"): Published(
        f"{_HOTPOTQA}/hotpot_dev_distractor_v1.json",
        46_320_117,
        "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
    ),
    ("musique", "train"): Published(
        f"{_MUSIQUE}/musique_ans_v1.0_train.jsonl",
        241_046_755,
        "83a75b1e11e4e9bb8f8308e72ac40ca617ae4431b3a0d955b61cab259248490a",
    ),
    ("musique", "dev"): Published(
        f"{_MUSIQUE}/musique_ans_v1.0_dev.jsonl",
        30_439_728,
        "15fa63794d18a94ce12411aca6e2327e65b6e83b0b1490efab3f1962e48abf3b",
    ),
    ("2wikimultihopqa", "dev"): Published(
        f"{_TWOWIKI}/dev.parquet",
        30_056_098,
        "c0d8b60b9026b728fb07ad74c5252a0f188f6942e8ba5c02df4dfa369502ea8d",
    ),
}
HOMEPAGES = {
    "hotpotqa": "https://hotpotqa.github.io",
    "2wikimultihopqa": "https://github.com/Alab-NII/2wikimultihop",
    "musique": "https://github.com/StonyBrookNLP/musique",
}


class Progress(Protocol):
    """Called regularly during a download."""

    def __call__(self, done: int, total: int | None) -> object:
        """`done` bytes of `total` are here; None: the server did not report the total."""
        ...


def find_published(
    dataset: str, split: str, url: str | None = None, sha256: str | None = None
) -> tuple[str, str, int | None]:
    """(URL, SHA-256, bytes if known) of a split's file: the published one, or the given one.

    A URL alone is a mirror of the published file. Nothing is downloaded without a known hash.

    Raises:
        SettingError: `sha256` is not a hash, is given without `url`, or `url` is not of HTTP or HTTPS.
        DatasetNotFound: no published file is known for the split; the message says how to import one by hand.
    """
    shown = None if url is None else without_secrets(url)
    if sha256 is not None and (url is None or not re.fullmatch("[0-9a-fA-F]{64}", sha256)):
        raise SettingError(f"sha256 must be 64 hexadecimal digits and goes with url, got {sha256!r} and url {shown!r}.")
    if url is not None and urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise SettingError(f"url must begin with http:// or https://, got {shown!r}.")
    if url and sha256:
        return url, sha256.lower(), None
    known = PUBLISHED.get((dataset, split))
    if known is None:
        splits = ", ".join(name for of, name in PUBLISHED if of == dataset)
        raise DatasetNotFound(
            f"No file with a known checksum is published for {dataset} and the split {split!r} (only for: {splits}). "
            f"Download the official file by hand, from {HOMEPAGES[dataset]}, unpack it, and run: "
            f"atommem data import {dataset} --split {split} FILE. Or, if you know its checksum: "
            f"atommem data get {dataset} --split {split} --url URL --sha256 HEX"
        )
    return url or known.url, known.sha256, known.bytes


def download(
    url: str, target: Path, sha256: str, size: int | None = None, progress: Progress = lambda done, total: None
) -> Path:
    """Downloads a file unless it is there already; returns `target`.

    Args:
        url: of the file.
        target: its path, by one rename once it is complete and verified. Until then it is `.NAME.part` in the same folder.
        sha256: that it must have, in lower-case hexadecimal.
        size: in bytes that it must have, if known.
        progress: called regularly.

    Raises:
        DatasetNotFound: the server rejects the request, cannot be reached after several retries, or the disk is full: nearly so
            where the server does not report the size.
        DataError: the server sent another file; nothing of it is kept.
    """
    if target.is_file() and sha256_of(target) == sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    shown = without_secrets(url)
    part = _Part(target.with_name(f".{target.name}.part"), url)
    most, retries = len(part), 0
    while True:
        try:
            _fetch(url, part, size, progress)
            break
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
                if error.code not in _RETRIED_STATUS:
                    raise DatasetNotFound(
                        f"{shown}: the server responded {error.code} {error.reason}. {_HINT}"
                    ) from error
            if not isinstance(error, _CONNECTION_ERRORS):  # an error of the disk
                raise
            retries = 0 if len(part) >= most + _PROGRESS else retries
            most = max(most, len(part))
            if retries == len(PAUSES):
                reason = getattr(error, "reason", None) or error
                raise DatasetNotFound(
                    f"{shown} could not be downloaded in {retries + 1} attempts: {reason}. "
                    f"{len(part):,} bytes are saved to resume from. {_HINT}"
                ) from error
            time.sleep(PAUSES[retries])
            retries += 1
    actual = sha256_of(part.path)
    if actual != sha256:
        length = len(part)
        part.remove()
        raise DataError(
            f"{shown}: expected the SHA-256 {sha256}, got {actual} ({length:,} bytes"
            + (f", expected {size:,}" if size is not None else "")
            + f"). Nothing of it is kept. The file was damaged in transit, or is another one. {_HINT}"
        )
    os.replace(part.path, target)
    part.remove()
    return target


_HINT = "Try again, give another address of the same file (--url URL), or download it by hand and run `atommem data import`."


class _Part:
    """A partial download, with the server's `ETag` for the complete file in a file next to it."""

    def __init__(self, path: Path, url: str) -> None:
        self.path, self._url = path, url
        self._url_hash = hashlib.sha256(url.encode()).hexdigest()  # written instead of it: it may hold a password
        self._origin = path.with_name(f"{path.name}.json")

    def __len__(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def etag(self) -> str | None:
        """The strong `ETag` of a partial download from this URL; None if it cannot be resumed."""
        if not len(self) or not self._origin.is_file():
            return None
        origin = json.loads(self._origin.read_text(encoding="utf-8"))
        return origin["etag"] if origin["url"] in (self._url_hash, self._url) else None

    def begin(self, etag: str | None) -> None:
        """Removes the partial download, and saves the `ETag` of a new one."""
        self.remove()
        if etag and not etag.startswith("W/"):
            self._origin.write_text(json.dumps({"url": self._url_hash, "etag": etag}), encoding="utf-8")

    def remove(self) -> None:
        self._origin.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def _fetch(url: str, part: _Part, size: int | None, progress: Progress) -> None:
    """Completes `part` in one connection.

    Raises:
        OSError, http.client.HTTPException: the connection broke, or the server rejected it; what was received is in `part`.
        DataError: the server has a file of another size than `size`; nothing is kept.
        DatasetNotFound: the disk is full.
    """
    headers = {"User-Agent": f"atommem/{importlib.metadata.version('atommem')}", "Accept-Encoding": "identity"}
    etag = part.etag()
    if etag:
        headers |= {"Range": f"bytes={len(part)}-", "If-Range": etag}
    try:
        response = urllib.request.urlopen(_request(url, headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        error.close()
        part.remove()  # it is at least as long as the server's file
        raise ConnectionError("the partial download is as long as the server's file; it is downloaded again") from error
    with response:
        total = _total(response.headers)
        if response.status != 206 or not _continues(response.headers, etag, len(part)):
            if response.status == 206:
                part.remove()
                raise ConnectionError(
                    f"the server sent another range than requested ({response.headers['Content-Range']})"
                )
            part.begin(response.headers["ETag"])
        if size is not None and total is not None and total != size:
            part.remove()
            raise DataError(
                f"{without_secrets(url)}: expected a file of {size:,} bytes, the server has one of {total:,}. {_HINT}"
            )
        whole = size if total is None else total
        _check_room(part.path.parent, (whole or 0) - len(part))
        free = shutil.disk_usage(part.path.parent).free
        most = len(part) + free - min(_RESERVE, free // 2) if whole is None else whole
        began, before = time.monotonic(), len(part)
        with part.path.open("ab") as file:
            # read1: bytes are saved as they arrive, in case the connection breaks
            while piece := response.read1(_PIECE):
                file.write(piece)
                progress(file.tell(), whole)
                if file.tell() > most:
                    break  # without a Content-Length it might never end
                seconds, least = _SLOW
                if (now := time.monotonic()) - began > seconds:
                    if file.tell() - before < least:
                        raise ConnectionError(f"only {file.tell() - before:,} bytes came in {now - began:.0f} s")
                    began, before = now, file.tell()
        if whole is None and len(part) > most:
            length = len(part)
            part.remove()
            raise DatasetNotFound(
                f"{without_secrets(url)}: the server did not report the file's size, and sent more than the {length:,} bytes "
                f"that the disk of {part.path.parent} has room for. Nothing of it is kept. {_HINT}"
            )
        if whole is not None and len(part) < whole:
            raise ConnectionError(f"the connection ended after {len(part):,} of {whole:,} bytes")


def _request(url: str, headers: dict[str, str]) -> urllib.request.Request:
    """A request; name and password in the address become a header, which does not follow to where the server redirects."""
    parts = urllib.parse.urlsplit(url)
    userinfo, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers=headers)
    if userinfo:
        credentials = base64.b64encode(urllib.parse.unquote(userinfo).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {credentials}")
    return request


def _total(headers: Message) -> int | None:
    """Bytes of the complete file according to the response's headers.

    >>> headers = Message()
    >>> headers["Content-Length"] = "40"
    >>> _total(headers)
    40
    >>> headers["Content-Range"] = "bytes 60-99/100"
    >>> _total(headers)
    100
    """
    whole = re.fullmatch(r"bytes \d+-\d+/(\d+)", headers["Content-Range"] or "")
    length = whole[1] if whole else headers["Content-Length"]
    return int(length) if length and length.isdecimal() else None


def _continues(headers: Message, etag: str | None, start: int) -> bool:
    """Whether a partial response is of the same file and begins at byte `start`."""
    begins = re.match(r"bytes (\d+)-", headers["Content-Range"] or "")
    return begins is not None and int(begins[1]) == start and headers["ETag"] in (None, etag)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DatasetNotFound(
            f"The file needs {needed:,} more bytes, but the disk of {folder} has {free:,} free. Free some space, or set "
            "ATOMMEM_DATA to a folder on another disk."
        )
