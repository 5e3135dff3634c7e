"""Files as documents: the text that a reader sees, in pages, sections, tables and parts."""

from __future__ import annotations

import csv
import importlib
import io
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from atommem_env.errors import MissingDependency
from atommem_env.tasks.file_types import LARGEST, FileType, UnreadableFile, file_type, read_text, unreadable
from atommem_env.types import Document

_LONGEST_PART = 8_000  # characters, about 1,600 tokens: several parts fit into a chunk of the default size
_LONGEST_HEADING = 200  # characters of one that is repeated in titles; a longer one is text
_LONGEST_FIRST_ROW = 2_000  # characters of one that is repeated in every part of a table
_MOST_DOCUMENTS = 100_000  # of a file
_LARGEST_XML = 1 << 25  # bytes in a Word document; its tree takes about 20 times as many
_LARGEST_PACKAGE = 1 << 28  # bytes of a Word document with its pictures, unpacked
_MOST_PAGES = 10_000
_GAP = re.compile(r"\n\s*\n")  # between two paragraphs
_HEADING = re.compile(r"(#{1,6})\s+")
_FENCE = re.compile(r"\s{0,3}(```|~~~)")
_SEPARATOR = re.compile(r"sep=(.)\n")  # the first line, by which spreadsheets name the separator

Block = tuple[int, str]  # the level of a heading, and its text; or 0, and text below the last heading
Titled = tuple[str, str]


def read_documents(name: str, path: Path) -> list[Document]:
    """The documents of a file.

    Args:
        name: of the file in their titles.
        path: the file.

    Raises:
        UnreadableFile: it is of no readable type, damaged, too large, or without text.
        MissingDependency: its type needs the extra `files`, which is not installed.
    """
    kind = file_type(path)
    documents = [Document(*titled) for titled in islice(_READERS[kind](name, path), _MOST_DOCUMENTS + 1)]
    if len(documents) > _MOST_DOCUMENTS:
        raise unreadable(path, f"more than {_MOST_DOCUMENTS:,} pages, sections or parts; split the file")
    if not documents:
        pictures = "; the pages may be pictures: recognise their text (OCR) first" if kind == "pdf" else ""
        raise unreadable(path, f"no text in it{pictures}")
    return documents


def _read_plain(name: str, path: Path) -> Iterator[Titled]:
    text = read_text(path)
    return _parts_of(_paged(name, text.split("\f")) if "\f" in text else [(name, text)])


def _read_markdown(name: str, path: Path) -> Iterator[Titled]:
    return _parts_of(_sections(name, _markdown_blocks(read_text(path))))


def _read_html(name: str, path: Path) -> Iterator[Titled]:
    return _parts_of(_sections(name, _html_blocks(path)))


def _read_docx(name: str, path: Path) -> Iterator[Titled]:
    return _parts_of(_sections(name, _docx_blocks(path)))


def _read_pdf(name: str, path: Path) -> Iterator[Titled]:
    return _parts_of(_paged(name, _pdf_pages(path)))


def _package(path: Path, kind: str, name: str) -> Any:
    """An optional package; raises `MissingDependency`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = {"docx": "python-docx"}.get(name, name.partition(".")[0])
        raise MissingDependency(f"{path} is {kind}, which needs '{package}': pip install 'atommem[files]'.") from error


# ----------------------------------------------------------------------------------------------- pages, sections, parts


def _paged(name: str, pages: Iterable[str]) -> Iterator[Titled]:
    return ((f"{name}, page {number}", page) for number, page in enumerate(pages, 1))


def _sections(name: str, blocks: Iterable[Block]) -> Iterator[Titled]:
    """(title, text) before the first heading, and under each heading.

    >>> list(_sections("a.md", _markdown_blocks("Hello.\\n# Safety\\n## Fire\\nRun.\\n# End\\nBye.")))
    [('a.md', 'Hello.\\n'), ('a.md: Safety', ''), ('a.md: Safety › Fire', 'Run.\\n'), ('a.md: End', 'Bye.')]
    """
    path: list[tuple[int, str]] = []  # (level, heading) from the top to the current section
    texts = io.StringIO()  # where millions of lines take no object each

    def section() -> Titled:
        return name + (": " + " › ".join(heading for _, heading in path) if path else ""), texts.getvalue()

    for level, text in blocks:
        if level and len(text) <= _LONGEST_HEADING:
            yield section()
            path, texts = [item for item in path if item[0] < level], io.StringIO()
            path.append((level, text))
        else:
            texts.write(f"{text}\n\n" if level else text)
    yield section()


def _parts_of(pieces: Iterable[Titled]) -> Iterator[Titled]:
    return (part for title, text in pieces for part in _parts(title, text))


def _parts(title: str, text: str) -> Iterator[Titled]:
    """(title, text) of the parts of a text; none of a blank one. A paragraph that is too long is not split."""
    number = 0
    for part in _joined_paragraphs(text):
        if part.strip():
            number += 1
            yield title if number == 1 else f"{title} ({number})", part.strip("\n")


def _joined_paragraphs(text: str) -> Iterator[str]:
    """As many paragraphs at a time as a part has room for, at least one."""
    part: list[str] = []
    length = begin = 0
    for end, following in chain(((gap.start(), gap.end()) for gap in _GAP.finditer(text)), [(len(text), 0)]):
        if part and length + 2 + end - begin > _LONGEST_PART:
            yield "\n\n".join(part)
            part, length = [], 0
        length += end - begin + (2 if part else 0)
        part.append(text[begin:end])
        begin = following
    yield "\n\n".join(part)


# ------------------------------------------------------------------------------------------------------------- Markdown


def _markdown_blocks(text: str) -> Iterator[Block]:
    fence = ""
    for line in io.StringIO(text):
        if mark := _FENCE.match(line):
            fence = "" if fence == mark[1] else fence or mark[1]
        start = None if fence else _HEADING.match(line)
        heading = line[start.end() :].rstrip() if start else ""
        yield (len(start[1]), heading.rstrip("#").rstrip() or heading[0]) if start and heading else (0, line)


# ----------------------------------------------------------------------------------------------------------------- HTML

_DROPPED = {"script", "style", "template", "noscript", "iframe", "object", "svg", "canvas"}
_LINES = {"br", "li", "tr", "dt", "dd", "option"}  # each begins a line
_PARAGRAPHS = (
    "address article aside blockquote body details div dl fieldset figcaption figure footer form header hr main nav ol p pre "
    "section summary table title ul h1 h2 h3 h4 h5 h6"
)
_BLOCKS = set(_PARAGRAPHS.split())


def _html_blocks(path: Path) -> Iterator[Block]:
    etree = _package(path, "an HTML page", "lxml.etree")
    page = _Page()
    parser = etree.HTMLParser(target=page, encoding="utf-8")
    text = read_text(path, html=True)
    if not text.strip():
        return  # which the parser would reject
    try:
        for begin in range(0, len(text), 1 << 16):
            parser.feed(text[begin : begin + (1 << 16)].encode())
            yield from page.take_blocks()
        parser.close()
    except etree.LxmlError as error:
        raise unreadable(path, f"a damaged HTML page ({error})") from error
    yield from page.take_blocks()


class _Page:
    """Collects the text of a page from a parser's events; no tree of it is in memory."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._texts: list[str] = []  # since the last block
        self._dropped = 0  # open elements that are not shown
        self._exact = 0  # open elements whose whitespace counts

    def take_blocks(self) -> list[Block]:
        """The blocks since the last call."""
        blocks, self._blocks = self._blocks, []
        return blocks

    def start(self, tag: str, attributes: object) -> None:
        self._dropped += tag in _DROPPED
        if tag in _BLOCKS:
            self._end_block(0)
        elif tag in _LINES:
            self._texts.append("\n")
        elif tag in ("td", "th") and "".join(self._texts[-1:]).strip(" ") not in ("", "\n"):
            self._texts.append(" | ")
        self._exact += tag == "pre"

    def end(self, tag: str) -> None:
        self._dropped -= tag in _DROPPED
        if tag in _BLOCKS:
            self._end_block(int(tag[1]) if tag[1:].isdigit() else 0)
        self._exact -= tag == "pre"

    def data(self, text: str) -> None:
        if not self._dropped:
            self._texts.append(text if self._exact else re.sub(r"[ \t\n\r\f]+", " ", text))

    def close(self) -> None:
        self._end_block(0)

    def _end_block(self, level: int) -> None:
        text = "".join(self._texts)
        self._texts.clear()
        if not self._exact:
            text = "\n".join(filter(None, (re.sub(r" +", " ", line).strip() for line in text.split("\n"))))
        if text.strip():
            self._blocks.append((level, " ".join(text.split())) if level else (0, f"{text}\n\n"))


# ----------------------------------------------------------------------------------------------------------------- Word

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"  # what is shown otherwise already
_UNSEEN = {_FALLBACK, f"{_W}del", f"{_W}moveFrom", f"{_W}pPr", f"{_W}rPr"}
_CHARACTERS = {f"{_W}tab": "\t", f"{_W}br": "\n", f"{_W}cr": "\n", f"{_W}noBreakHyphen": "-"}


def _docx_blocks(path: Path) -> list[Block]:
    docx = _package(path, "a Word document", "docx")
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {member.filename: member.file_size for member in archive.infolist()}
        whole = sum(sizes.values())
        xml = sum(size for name, size in sizes.items() if name.endswith((".xml", ".rels")))
        if xml > _LARGEST_XML or whole > _LARGEST_PACKAGE:
            raise unreadable(path, f"a Word document that unpacks to {whole:,} bytes, {xml:,} of XML; split it")
        document = docx.Document(str(path))
        levels = {style.style_id: _level(style) for style in document.styles if hasattr(style, "base_style")}
        blocks = list(_word_blocks(document.element.body, levels))
        for relation in document.part.rels.values():
            if relation.reltype.endswith(("/footnotes", "/endnotes")) and not relation.is_external:
                blocks += _word_blocks(docx.oxml.parse_xml(relation.target_part.blob), levels)
        return blocks
    except UnreadableFile:
        raise
    except Exception as error:  # python-docx raises errors of many types on a damaged file
        raise unreadable(path, f"a damaged Word document, or a template ({type(error).__name__}: {error})") from error


def _level(style: Any) -> int:
    """The level of the headings of a style, or of one that it is based on; 0: no heading."""
    for _ in range(10):
        if style is None:
            break
        if match := re.fullmatch(r"heading ([1-9])", style.name or "", re.IGNORECASE):
            return int(match[1])
        style = style.base_style
    return 0


def _word_blocks(parent: Any, levels: dict[str, int]) -> Iterator[Block]:
    """Paragraphs and the rows of tables, also in what stands between them and the document, such as content controls."""
    for element in parent:
        if element.tag == f"{_W}p":
            style = element.find(f"{_W}pPr/{_W}pStyle")
            level = levels.get(style.get(f"{_W}val"), 0) if style is not None else 0
            text = _word_text(element)
            if text.strip():
                yield (level, " ".join(text.split())) if level else (0, f"{text}\n\n")
        elif element.tag == f"{_W}tr":
            cells = [cell for cell in element.iter(f"{_W}tc") if next(cell.iterancestors(f"{_W}tr")) is element]
            texts = [" ".join(text.strip() for _, text in _word_blocks(cell, levels)) for cell in cells]
            if any(texts):
                yield 0, " | ".join(texts) + "\n"
        elif element.tag not in _UNSEEN:
            yield from _word_blocks(element, levels)
            if element.tag == f"{_W}tbl":
                yield 0, "\n"


def _word_text(parent: Any) -> str:
    texts: list[str] = []
    for element in parent:
        if element.tag == f"{_W}t":
            texts.append(element.text or "")
        elif element.tag in _CHARACTERS:
            texts.append(_CHARACTERS[element.tag])
        elif element.tag not in _UNSEEN:
            texts.append(_word_text(element))
            if element.tag == f"{_W}p":  # of a text box
                texts.append("\n")
    return "".join(texts)


# ------------------------------------------------------------------------------------------------------------------ PDF


def _pdf_pages(path: Path) -> list[str]:
    pypdf = _package(path, "a PDF", "pypdf")
    try:
        reader = pypdf.PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise unreadable(path, "a PDF with a password; save a copy without one")
        if len(reader.pages) > _MOST_PAGES:
            raise unreadable(path, f"a PDF of {len(reader.pages):,} pages, more than {_MOST_PAGES:,}; split it")
        pages: list[str] = []
        room = LARGEST
        for page in reader.pages:
            contents = page.get_contents()
            room -= len(contents.get_data()) if contents is not None else 0
            # pypdf extracts some glyphs as half a character or as NUL.
            pages.append(page.extract_text().encode("utf-8", "replace").decode().replace("\0", " "))
            room -= len(pages[-1])
            if room < 0:
                raise unreadable(path, f"a PDF whose pages unpack to more than {LARGEST:,} bytes; split it")
        return pages
    except UnreadableFile:
        raise
    except pypdf.errors.DependencyError as error:
        raise MissingDependency(
            f"{path}: the PDF is encrypted, which needs 'cryptography': pip install 'atommem[files]'."
        ) from error
    except pypdf.errors.LimitReachedError as error:
        raise unreadable(path, f"a PDF that unpacks to more than is read ({error})") from error
    except Exception as error:  # pypdf raises errors of many types on a damaged file
        raise unreadable(path, f"the PDF is damaged ({type(error).__name__}: {error})") from error


# --------------------------------------------------------------------------------------------------------------- tables


def read_table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of the rows of a CSV or TSV file that are not empty; the line is where the row ends, from 1.

    The separator is what a first line `sep=;` says; else the one of comma, semicolon and tab that parts the first row into most
    cells.

    Raises:
        UnreadableFile: it is not text, or not CSV.
    """
    text = read_text(path)
    named = _SEPARATOR.match(text)
    if named:
        text = text[named.end() :]
    separator = named[1] if named else max(",;\t", key=lambda mark: len(next(_rows(text, mark), [])))
    reader = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
    lines_before = 1 if named else 0
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield lines_before + reader.line_num, row
    except csv.Error as error:
        raise unreadable(path, f"line {lines_before + reader.line_num}: not CSV ({error})") from error


def _rows(text: str, separator: str) -> Iterator[list[str]]:
    """The rows that are not empty, up to the first that is not CSV."""
    try:
        yield from (row for row in csv.reader(io.StringIO(text), delimiter=separator) if any(map(str.strip, row)))
    except csv.Error:
        return


def _read_table(name: str, path: Path) -> Iterator[Titled]:
    parts = _row_parts(cells for _, cells in read_table(path))
    begun = list(islice(parts, 2))
    for first, last, text in chain(begun, parts):
        yield name if len(begun) == 1 else f"{name}, rows {first} to {last}", text


def _row_parts(rows: Iterable[list[str]]) -> Iterator[tuple[int, int, str]]:
    """(first row, last row, text) of as many rows as a part has room for, each part under the first row of all, row 1."""
    header, lines = "", list[str]()
    first, number, length = 2, 0, 0
    for number, cells in enumerate(rows, 1):
        line = " | ".join(" ".join(cell.split()) for cell in cells)
        if number == 1:
            header = line
        elif number > first and length + 1 + len(line) > _LONGEST_PART:
            yield first, number - 1, "\n".join(lines)
            lines = [header] if len(header) <= _LONGEST_FIRST_ROW else []
            first, length = number, len(header) if lines else 0
        lines.append(line)
        length += 1 + len(line)
    if lines:
        yield first, number, "\n".join(lines)


_READERS: dict[FileType, Callable[[str, Path], Iterator[Titled]]] = {
    "text": _read_plain,
    "markdown": _read_markdown,
    "html": _read_html,
    "docx": _read_docx,
    "pdf": _read_pdf,
    "table": _read_table,
}
