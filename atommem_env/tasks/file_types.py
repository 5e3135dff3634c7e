"""What a file is, by its content and its name; what is no readable type is rejected under its own name."""

from __future__ import annotations

import codecs
import re
import zipfile
from pathlib import Path
from typing import Literal

from atommem_env.errors import DataError

FileType = Literal["text", "markdown", "html", "pdf", "docx", "table"]
SUFFIXES: dict[str, FileType] = {
    ".txt": "text",
    ".text": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
    ".docx": "docx",
    ".csv": "table",
    ".tsv": "table",
}
READABLE = "text, Markdown, HTML, PDF, Word (.docx), CSV and TSV"
LARGEST = 1 << 26  # bytes of a file that is read as text
OTHER_DOCUMENTS: dict[str, str] = {  # by suffix: documents that a reader of a folder would miss
    ".doc": "an old Word document",
    ".docm": "a Word document with macros",
    ".dot": "a Word template",
    ".dotx": "a Word template",
    ".epub": "an e-book (EPUB)",
    ".mobi": "an e-book (Mobipocket)",
    ".azw3": "an e-book (Kindle)",
    ".fb2": "an e-book (FictionBook)",
    ".djvu": "a DjVu document",
    ".mht": "a web archive",
    ".mhtml": "a web archive",
    ".odp": "an OpenDocument presentation",
    ".ods": "an OpenDocument spreadsheet",
    ".odt": "an OpenDocument text",
    ".pages": "a Pages document",
    ".ppt": "an old PowerPoint presentation",
    ".pptx": "a PowerPoint presentation",
    ".ps": "a PostScript document",
    ".rtf": "an RTF document",
    ".xls": "an old Excel workbook",
    ".xlsm": "an Excel workbook",
    ".xlsx": "an Excel workbook",
}
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"II*\0", "a TIFF picture"),
    (b"MM\0*", "a TIFF picture"),
    (b"RIFF", "a picture, sound or video (RIFF)"),
    (b"ID3", "a sound (MP3)"),
    (b"OggS", "a sound or video (Ogg)"),
    (b"fLaC", "a sound (FLAC)"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"BZh", "a bzip2 archive; unpack it"),
    (b"\xfd7zXZ\0", "an xz archive; unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"Rar!", "a rar archive; unpack it"),
    (
        b"\xd0\xcf\x11\xe0",
        "an old Office document (.doc, .xls, .ppt), or one with a password; save it as .docx without one",
    ),
    (b"AT&TFORM", "a DjVu document; save it as PDF"),
    (b"PAR1", "a parquet table"),
    (b"SQLite format 3", "a SQLite database"),
    (b"\x7fELF", "a program"),
)
_SOURCES: tuple[tuple[str, str], ...] = (  # text, which no reader wants to see
    ("{\\rtf", "an RTF document; save it as .docx"),
    ("%!PS", "a PostScript document; save it as PDF"),
)
_ZIPPED: tuple[tuple[str, str], ...] = (  # a member's name, or what the member `mimetype` says
    ("xl/workbook.xml", "an Excel workbook; save its sheets as CSV"),
    ("xl/workbook.bin", "an Excel workbook; save its sheets as CSV"),
    ("ppt/presentation.xml", "a PowerPoint presentation; save it as PDF"),
    ("application/epub+zip", "an e-book (EPUB)"),
    ("application/vnd.oasis.opendocument.text", "an OpenDocument text; save it as .docx"),
    ("application/vnd.oasis.opendocument", "an OpenDocument file; save it as PDF or CSV"),
    ("Index/Document.iwa", "a Pages or Numbers document; save it as .docx or CSV"),
)
_MARKS: tuple[tuple[bytes, str], ...] = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_PDF = re.compile(rb"%PDF-\d")
_HTML = re.compile(
    r"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!doctype\s+html|<(html|head|body)[\s>])", re.IGNORECASE | re.DOTALL
)
_XML = re.compile(r"\s*<(\?xml|!doctype|svg)\b", re.IGNORECASE)
_MIME = re.compile(r"^mime-version:|^content-type:\s*multipart/", re.IGNORECASE | re.MULTILINE)
_CONTROLS = re.compile(r"[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]")  # not those of printers and of coloured logs
_CHARSET = re.compile(rb"charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)


class UnreadableFile(DataError):
    """A file cannot be shown to a reader.

    Attributes:
        what: what it is instead, in a few words.
    """

    what: str = ""


def file_type(path: Path) -> FileType:
    """How a file is read.

    Raises:
        UnreadableFile: it is no readable type; the message says what it is.
    """
    with path.open("rb") as file:
        start = file.read(4096)
        file.seek(max(0, path.stat().st_size - 2048))
        end = file.read()
    named = SUFFIXES.get(path.suffix.lower())
    header = _PDF.search(start[:1024])
    # A header further on can also be that of a text about PDF.
    if header and (header.start() == 0 or named == "pdf" or b"startxref" in end or b"%%EOF" in end):
        return "pdf"
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        what = zip_content(path)
        if what == "docx":
            return "docx"
        raise unreadable(path, what)
    beginning = _decoded_start(start)
    what = next((name for sign, name in _SOURCES if beginning.startswith(sign)), "")
    if not what:
        binary = _CONTROLS.search(beginning)  # else it is a text that begins with "RIFF", for example
        what = next((name for magic, name in _MAGIC if start.startswith(magic) and (binary or not magic.isascii())), "")
    if start[4:8] == b"ftyp":
        what = "a video or picture (MP4, HEIC)"
    if not what and _HTML.match(beginning):
        return "html"
    if not what and _XML.match(beginning) and named != "html":
        what = "an XML file"
    if not what and _MIME.search(beginning.partition("\n\n")[0]):
        what = "an e-mail or a web archive (MIME)"
    if not what and named in ("pdf", "docx"):
        what = f"no {'PDF' if named == 'pdf' else 'Word document'}, though it is named so"
    if not what and path.suffix.lower() in OTHER_DOCUMENTS:
        what = f"{OTHER_DOCUMENTS[path.suffix.lower()]} by its name"
    if what:
        raise unreadable(path, what)
    return named or "text"


def zip_content(path: Path) -> str:
    """What a file that begins as a zip archive is: "docx", or a description of another kind."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            if "mimetype" in names:
                with archive.open("mimetype") as member:
                    names.add(member.read(200).decode("ascii", "replace").strip())
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError, ValueError) as error:
        return f"a damaged or encrypted zip archive or Office document ({error})"
    if "word/document.xml" in names:
        return "docx"
    return next(
        (what for mark, what in _ZIPPED if any(name.startswith(mark) for name in names)), "a zip archive; unpack it"
    )


def unreadable(path: Path, what: str) -> UnreadableFile:
    """The error of a file that cannot be read: what it is, what was seen, and what is read; at most 300 characters."""
    with path.open("rb") as file:
        start = file.read(6)
    what = " ".join(what.split())
    what = what if len(what) <= 90 else what[:89] + "…"
    seen = f"begins {start!r}, named {path.suffix[-12:] or 'without suffix'}"
    error = UnreadableFile(f"{short_path(path)}: {what} ({seen}). Read are {READABLE}.")
    error.what = what
    return error


def short_path(path: Path) -> str:
    """The path, or its end where it is long.

    >>> short_path(Path("/a/b.txt")), len(short_path(Path("/a" * 100, "b.txt")))
    ('/a/b.txt', 80)
    """
    return str(path) if len(str(path)) <= 80 else "…" + str(path)[-79:]


def read_text(path: Path, *, html: bool = False) -> str:
    r"""The text of a file, its lines ended by "\n".

    It is UTF-8, or what its byte order mark says; of HTML also what the page declares.

    Raises:
        UnreadableFile: it is not text, of another encoding, or larger than `LARGEST`.
    """
    size = path.stat().st_size
    if size > LARGEST:
        raise unreadable(path, f"{size:,} bytes, but at most {LARGEST:,} of a file are read as text; split the file")
    data = path.read_bytes()
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", "utf-8"))
    data = data[len(mark) :]
    if not mark and b"\0" in data:
        rest = data[: 1 << 12]
        wide = max(rest[::2].count(0), rest[1::2].count(0)) * 4 > len(rest)
        what = "UTF-16 without a byte order mark; save it as UTF-8" if wide else f"a zero byte at {data.index(0)}"
        raise unreadable(path, f"not a text file: {what}")
    try:
        text = data.decode(encoding)
        declared = _declared(data) if html and not mark else ""
        if declared in ("iso2022_jp", "hz"):  # whose bytes are all ASCII
            text = data.decode(declared)
    except UnicodeDecodeError as error:
        declared = _declared(data) if html and not mark else ""
        if not declared:
            raise unreadable(
                path, f"not {encoding.upper()} text (at byte {error.start}: {error.reason}); save it as UTF-8"
            ) from error
        try:
            text = data.decode(declared)
        except (UnicodeError, LookupError) as other:  # a name of Python's that is no encoding of text
            raise unreadable(path, f"neither UTF-8 nor {declared}, which it declares") from other
    if len(_CONTROLS.findall(text)) * 100 > len(text):
        raise unreadable(path, "not a text file: it is full of control characters")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decoded_start(start: bytes) -> str:
    """The beginning of a file as text, however little of one it is."""
    mark, encoding = next(((mark, name) for mark, name in _MARKS if start.startswith(mark)), (b"", "latin-1"))
    return start[len(mark) :].decode(encoding, "replace").replace("\r\n", "\n")


def _declared(data: bytes) -> str:
    """The encoding that a page declares, as Python calls it; "" for none that Python has."""
    match = _CHARSET.search(data[:4096])
    try:
        name = codecs.lookup(match[1].decode()).name if match else ""
    except LookupError:
        return ""
    return "cp1252" if name in ("iso8859-1", "ascii") else name  # as browsers do
