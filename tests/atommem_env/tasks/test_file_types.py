"""What a file is, whatever it is called: read, or rejected by its name."""

from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path

import pytest

from atommem_env.tasks.file_types import LARGEST, FileType, UnreadableFile, file_type, read_text


def zipped(**members: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


DOCX = zipped(**{"word/document.xml": ""})


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.txt", b"Plain.", "text"),
        ("LICENSE", b"Plain.", "text"),
        ("a.tex", b"\\section{Plain}", "text"),
        ("a.txt", b"A text about %PDF-1.7 and its header.", "text"),
        ("a.txt", b"RIFFs, BMs and ID3 tags.", "text"),
        ("a.log", b"\x1b[31mred\x1b[0m", "text"),
        ("a.md", b"# Head\n<p align=center>", "markdown"),
        ("a.pdf", b"%PDF-1.4 \x00", "pdf"),
        ("a.pdf", b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 900 + b"%PDF-1.4 ", "pdf"),
        ("a.bin", b"\n\n%PDF-1.4\n \x00 \nstartxref\n9\n%%EOF\n", "pdf"),
        ("report", b"\xef\xbb\xbf%PDF-1.4\n%%EOF", "pdf"),
        ("a.html", b"<p>No head", "html"),
        ("page", b"<!-- saved -->\n<!DOCTYPE html>\n<title>", "html"),
        ("a.txt", b"<html lang=en>", "html"),
        ("a.txt", "<!doctype HTML>".encode("utf-16"), "html"),
        ("a.xhtml", b"<?xml version='1.0'?>\n<html xmlns='x'>", "html"),
        ("a.doc", b"<html><body>Saved as .doc by a server", "html"),
        ("a.docx", DOCX, "docx"),
        ("a.txt", DOCX, "docx"),
        ("a.csv", b"a,b\n", "table"),
        ("A.TSV", b"a\tb\n", "table"),
    ],
)
def test_readable_files_are_recognised(tmp_path: Path, name: str, content: bytes, kind: FileType) -> None:
    (tmp_path / name).write_bytes(content)
    assert file_type(tmp_path / name) == kind


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0", "a PNG picture"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "a JPEG picture"),
        (b"\0\0\0\x20ftypheic", "a video or picture"),
        (gzip.compress(b"text"), "a gzip archive; unpack it"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0", "an old Office document (.doc, .xls, .ppt), or one with a password"),
        (b"{\\rtf1\\ansi Hello\\par}", "an RTF document; save it as .docx"),
        (b"\xef\xbb\xbf{\\rtf1 Hello}", "an RTF document; save it as .docx"),
        (b"%!PS-Adobe-3.0\n", "a PostScript document"),
        (b"<?xml version='1.0'?>\n<FictionBook>", "an XML file"),
        (b"<svg xmlns='x'></svg>", "an XML file"),
        (b"From: a\nMIME-Version: 1.0\nContent-Type: multipart/related\n\n--x", "an e-mail or a web archive"),
        (zipped(**{"xl/workbook.xml": ""}), "an Excel workbook; save its sheets as CSV"),
        (zipped(**{"ppt/presentation.xml": ""}), "a PowerPoint presentation"),
        (zipped(mimetype="application/epub+zip"), "an e-book (EPUB)"),
        (zipped(mimetype="application/vnd.oasis.opendocument.text"), "an OpenDocument text; save it as .docx"),
        (zipped(**{"a.txt": "text"}), "a zip archive; unpack it"),
        (DOCX[:40], "a damaged or encrypted zip archive or Office document"),
    ],
    ids=lambda value: value if isinstance(value, str) else "content",  # which holds the time
)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.docx", "unnamed"])
def test_what_is_not_readable_is_called_by_its_name(tmp_path: Path, content: bytes, what: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableFile) as caught:
        file_type(tmp_path / name)
    assert what in str(caught.value)
    assert caught.value.what.startswith(what)
    assert f"begins {content[:6]!r}" in str(caught.value)
    assert "Read are text, Markdown, HTML, PDF" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("a.pdf", "no PDF, though it is named so"),
        ("a.docx", "no Word document, though it is named so"),
        ("a.epub", "an e-book (EPUB) by its name"),
        ("a.doc", "an old Word document by its name"),
    ],
)
def test_text_that_is_named_otherwise_is_rejected(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / name).write_text("Plain text.")
    with pytest.raises(UnreadableFile, match=what.replace("(", r"\(").replace(")", r"\)")):
        file_type(tmp_path / name)


def test_a_message_has_at_most_300_characters(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 200) / ("x" * 150 + "." + "y" * 80)
    path.parent.mkdir()
    path.write_bytes(b"\xff\xd8\xff\xff\xff\xff")
    for action in (file_type, read_text):
        with pytest.raises(UnreadableFile) as caught:
            action(path)
        assert len(str(caught.value)) <= 300


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_of_every_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("Łódź\r\nand 東京\r".encode(encoding))
    assert read_text(tmp_path / "a.txt") == "Łódź\nand 東京\n"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("Frühling".encode("latin-1"), "not UTF-8 text (at byte 2: invalid"),
        ("Frühling".encode("utf-16-le"), "UTF-16 without a byte order mark; save it as UTF-8"),
        ("Frühling".encode("utf-16-be"), "UTF-16 without a byte order mark; save it as UTF-8"),
        (b"\xff\xfea", "not UTF-16-LE text"),
        (b"text \0 more text, much more text", "a zero byte at 5"),
        (b"\x01\x02\x03" * 9, "full of control characters"),
    ],
)
def test_no_other_bytes_are_shown_as_text(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UnreadableFile) as caught:
        read_text(tmp_path / "a.txt")
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("charset", "encoding"),
    [("windows-1251", "cp1251"), ("ISO-8859-1", "cp1252"), ("shift_jis", "shift_jis"), ("iso-2022-jp", "iso2022_jp")],
)
def test_a_page_says_its_encoding(tmp_path: Path, charset: str, encoding: str) -> None:
    word = {"cp1251": "Привет", "cp1252": "“Frühling”"}.get(encoding, "東京")
    (tmp_path / "a.html").write_bytes(f'<meta charset="{charset}">{word}'.encode(encoding))
    assert read_text(tmp_path / "a.html", html=True).endswith(word)
    (tmp_path / "a.html").write_bytes(f'<meta charset="{charset}">'.encode() + b"\xff\xff\x81")
    if encoding != "cp1251":
        with pytest.raises(UnreadableFile, match=f"neither UTF-8 nor {encoding}"):
            read_text(tmp_path / "a.html", html=True)


@pytest.mark.parametrize("charset", ["zip", "undefined", "no-such", "rot13"])
def test_a_page_that_declares_no_encoding_is_rejected(tmp_path: Path, charset: str) -> None:
    (tmp_path / "a.html").write_bytes(f'<meta charset="{charset}">'.encode() + b"\xfc")
    with pytest.raises(UnreadableFile, match="UTF-8"):
        read_text(tmp_path / "a.html", html=True)


def test_a_file_that_is_too_large_is_not_opened(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(LARGEST + 1)  # takes no room on the disk
    with pytest.raises(UnreadableFile, match=r"67,108,865 bytes, but at most 67,108,864"):
        read_text(tmp_path / "a.txt")
