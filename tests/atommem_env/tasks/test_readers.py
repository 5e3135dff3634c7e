"""What a reader sees of a file: its text, never its source."""

from __future__ import annotations

import csv
import io
import sys
import zipfile
from pathlib import Path

import pytest

from atommem_env.errors import MissingDependency
from atommem_env.tasks.file_types import UnreadableFile
from atommem_env.tasks.readers import read_documents, read_table
from atommem_env.types import Document

PAGE = """<!DOCTYPE html>
<html><head><title>The  house</title><style>p {color: red}</style><script>var x = "<p>no</p>"</script></head>
<body><p>Read <b>this</b>
first.<h1>Safety</h1><div>In short: <i>run</i>.<br>Then wait.</div>
<!-- not this --><h2>Fire <em>drill</em></h2><ul><li>One</li><li>Two &amp; &eacute;</ul>
<table><tr><th>Name</th><th>City</th></tr><tr><td>Ada</td><td>Rome</td></tr></table>
<pre>x = 1
  y = 2</pre><noscript>Switch it on</noscript></body></html>"""


def test_html_is_its_text_in_sections(tmp_path: Path) -> None:
    pytest.importorskip("lxml")
    (tmp_path / "a.html").write_text(PAGE)
    assert read_documents("a.html", tmp_path / "a.html") == [
        Document("a.html", "The house\n\nRead this first."),
        Document("a.html: Safety", "In short: run.\nThen wait."),
        Document("a.html: Safety › Fire drill", "One\nTwo & é\n\nName | City\nAda | Rome\n\nx = 1\n  y = 2"),
    ]


@pytest.mark.parametrize("content", ["<script>alert(1)</script>", "<html><body> </body></html>", "<!DOCTYPE html>"])
def test_html_without_text_is_rejected(tmp_path: Path, content: str) -> None:
    pytest.importorskip("lxml")
    (tmp_path / "a.html").write_text(content)
    with pytest.raises(UnreadableFile, match="no text in it"):
        read_documents("a.html", tmp_path / "a.html")


def test_word_is_its_text_in_sections(tmp_path: Path) -> None:
    docx = pytest.importorskip("docx")
    document = docx.Document()
    document.add_paragraph("Read this first.")
    document.add_heading("Safety", 1)
    paragraph = document.add_paragraph("Run, ")
    paragraph.add_run("then\twait").bold = True
    document.add_heading("Fire", 2)
    table = document.add_table(2, 2)
    for cell, text in zip(
        (cell for row in table.rows for cell in row.cells), ("Name", "City", "Ada", "Rome"), strict=True
    ):
        cell.text = text
    document.add_paragraph("After the table.")
    namespace = docx.oxml.ns.nsdecls("w")
    for xml in (
        f"<w:p {namespace}><w:del><w:r><w:delText>no</w:delText></w:r></w:del><w:ins><w:r><w:t>new</w:t></w:r></w:ins></w:p>",
        f"<w:sdt {namespace}><w:sdtContent><w:p><w:r><w:t>in a control</w:t></w:r></w:p></w:sdtContent></w:sdt>",
    ):
        document.element.body.insert(-1, docx.oxml.parse_xml(xml))
    document.save(tmp_path / "a.docx")
    assert read_documents("a.docx", tmp_path / "a.docx") == [
        Document("a.docx", "Read this first."),
        Document("a.docx: Safety", "Run, then\twait"),
        Document("a.docx: Safety › Fire", "Name | City\nAda | Rome\n\nAfter the table.\n\nnew\n\nin a control"),
    ]


def bomb(path: Path, member: str, size: int) -> Path:
    """A Word document in which one part is `size` spaces, packed to a thousandth."""
    docx = pytest.importorskip("docx")
    whole = io.BytesIO()
    docx.Document().save(whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target:
        for name in source.namelist():
            if name != member:
                target.writestr(name, source.read(name))
        with target.open(member, "w") as part:
            for _ in range(size >> 20):
                part.write(b" " * (1 << 20))
    return path


@pytest.mark.parametrize(("member", "size"), [("word/document.xml", 33 << 20), ("word/media/image1.png", 257 << 20)])
def test_a_word_document_that_unpacks_to_too_much_is_rejected(tmp_path: Path, member: str, size: int) -> None:
    path = bomb(tmp_path / "a.docx", member, size)
    assert path.stat().st_size < 3 << 20
    with pytest.raises(UnreadableFile, match="a Word document that unpacks to"):
        read_documents("a.docx", path)


def test_a_damaged_word_document_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="a damaged Word document"):
        read_documents("a.docx", bomb(tmp_path / "a.docx", "word/document.xml", 1 << 20))


@pytest.mark.parametrize(("name", "package"), [("a.html", "lxml.etree"), ("a.docx", "docx"), ("a.pdf", "pypdf")])
def test_a_missing_package_is_named_with_the_extra(
    tmp_path: Path, name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bomb(tmp_path / "b.docx", "word/document.xml", 0).read_bytes() if name == "a.docx" else b"%PDF-1.4"
    (tmp_path / name).write_bytes(b"<html>Text" if name == "a.html" else content)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingDependency, match=r"which needs '(lxml|python-docx|pypdf)': pip install 'atommem\[files\]'"
    ):
        read_documents(name, tmp_path / name)


def test_a_pdf_whose_pages_unpack_to_too_much_is_rejected(tmp_path: Path) -> None:
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter()
    page = writer.add_blank_page(100, 100)
    stream = pypdf.generic.StreamObject()
    stream.set_data(b" " * (1 << 20))
    page[pypdf.generic.NameObject("/Contents")] = writer._add_object(stream.flate_encode())
    for _ in range(69):
        writer.add_page(page)
    writer.write(tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").stat().st_size < 300_000
    with pytest.raises(UnreadableFile, match="a PDF whose pages unpack to more than 67,108,864 bytes"):
        read_documents("a.pdf", tmp_path / "a.pdf")


@pytest.mark.parametrize(
    "content", ["Name;City\nAda;Rome\n", "sep=;\nName;City\n\n;\nAda;Rome", "Name\tCity\nAda\tRome"]
)
def test_a_table_is_its_rows(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    assert read_documents("a.csv", tmp_path / "a.csv") == [Document("a.csv", "Name | City\nAda | Rome")]


def test_every_part_of_a_long_table_has_its_first_row(tmp_path: Path) -> None:
    rows = [["Name", "City"], *([f"Name {number}", f'City "{number}",\n' + "x" * 50] for number in range(500))]
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(rows)
    documents = read_documents("a.tsv", tmp_path / "a.tsv")
    assert [document.title for document in documents][:2] == ["a.tsv, rows 2 to 111", "a.tsv, rows 112 to 218"]
    assert all(document.text.startswith("Name | City\nName ") for document in documents)
    assert sum(document.text.count("\n") for document in documents) == 500
    assert max(len(document.text) for document in documents) <= 8000


def test_the_lines_of_a_table_count_all_that_stands_before_them(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('sep=;\nquestion;answer\n\n"Who\nis it?";"Ada; Bo"\n;\nWhy?;So\n')
    assert list(read_table(tmp_path / "a.csv")) == [
        (2, ["question", "answer"]),
        (5, ["Who\nis it?", "Ada; Bo"]),
        (7, ["Why?", "So"]),
    ]


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ("# Fire", "Fire"),
        ("## Fire ##", "Fire"),
        ("# #", "#"),
        ("#\tC# sharp", "C# sharp"),
        ("# ", None),
        ("#Fire", None),
        ("####### Fire", None),
    ],
)
def test_headings_of_markdown(tmp_path: Path, line: str, title: str | None) -> None:
    (tmp_path / "a.md").write_text(f"{line}\nText.")
    (document,) = read_documents("a.md", tmp_path / "a.md")
    assert document.title == ("a.md" if title is None else f"a.md: {title}")


@pytest.mark.parametrize("line", ["# " + "#" * 200_000 + "x", "# a" + " " * 200_000 + "x", "\n" + " " * 200_000 + "x"])
def test_no_line_takes_more_than_linear_time(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.md").write_text(f"{line}\nText.")
    assert sum(len(document.text) for document in read_documents("a.md", tmp_path / "a.md")) >= 200_000


def test_what_is_repeated_is_short(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(f"# {'x' * 201}\n" + "## Part\nText.\n" * 100)
    documents = read_documents("a.md", tmp_path / "a.md")
    assert documents[0] == Document("a.md", "x" * 201)
    assert {document.title for document in documents[1:]} == {"a.md: Part"}
    (tmp_path / "a.csv").write_text("y" * 2001 + "\n" + "row\n" * 4000)
    texts = [document.text for document in read_documents("a.csv", tmp_path / "a.csv")]
    assert sum(text.count("y") for text in texts) == 2001
    assert sum(text.count("row") for text in texts) == 4000


def test_a_file_of_too_many_sections_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# a\nb\n" * 100_001)
    with pytest.raises(UnreadableFile, match="more than 100,000 pages, sections or parts"):
        read_documents("a.md", tmp_path / "a.md")
