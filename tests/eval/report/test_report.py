import csv
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from agents.registry import METHODS
from atommem_env.cli import main as atommem
from atommem_env.errors import SettingError
from eval.metrics import summarise
from eval.options import EvalConfig
from eval.report import plots
from eval.report.report import ReportConfig, find_runs, group, main, read_published
from eval.report.tables import csv_text, latex, markdown
from eval.run import evaluate
from eval.run_folder import read_jsonl


def run(folder: Path, policy: str, environment: str = "Easy 10", **changes: Any) -> Path:
    options = {
        "env_id": "AtomMem-Synthetic",
        "episodes": 3,
        "questions": 1,
        "num_docs": 10,
        "durability": "off",
        **changes,
    }
    evaluate(EvalConfig(out=folder, policy=policy, environment=environment, **options))
    return folder


def table(text: str, heading: str) -> list[dict[str, str]]:
    """The first table after a heading of report.md."""
    lines = text[text.index(heading) :].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return [dict(zip(rows[0], cells, strict=True)) for cells in rows[2:]]


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a recipe leaves it: two environments, three policies and an ablation, one of them with two seeds, one unfinished."""
    root = tmp_path_factory.mktemp("tree")
    for seed in (0, 1):
        run(root / "10" / "perfect-rag" / f"seed-{seed}", "perfect-rag", seed=seed)
    run(root / "10" / "yes" / "seed-0", "constant=yes", label="100 % y_e$ {&}|\\")
    run(root / "10" / "spam" / "seed-0", "spam")
    run(root / "10" / "no-update" / "seed-0", "spam", set=("ablation=no_update",))
    run(root / "20" / "perfect-rag" / "seed-0", "perfect-rag", "Easy 20", num_docs=20)
    run(root / "20" / "spam" / "seed-0", "spam", "Easy 20", num_docs=20)
    (run(root / "30" / "spam" / "seed-0", "spam", "Easy 30", num_docs=30) / "summary.json").unlink()
    return root


@pytest.fixture(scope="module")
def written(tree: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_DPI", 20)
        main(ReportConfig(runs=(tree,)))
    return tree / "report"


def test_seeds_are_pooled_and_everything_else_has_a_row_of_its_own(tree: Path, written: Path) -> None:
    rows = table((written / "report.md").read_text(encoding="utf-8"), "## Easy 10")
    names = [row["policy"] for row in rows]
    assert len(rows) == 4
    assert names[-1] == r"perfect-rag\*", "who knows the golds comes last"
    assert [name for name in names if name.startswith("spam")] == ["spam", "spam (ablation=no\\_update)"]
    folders = [tree / "10" / "perfect-rag" / f"seed-{seed}" for seed in (0, 1)]
    pooled = summarise([record for folder in folders for record in read_jsonl(folder / "episodes.jsonl")])
    assert rows[-1]["n"] == "6"
    assert rows[-1]["EM"] == f"{100 * pooled['em']:.1f}"
    assert rows[-1]["95 % CI"] == "–".join(f"{100 * end:.1f}" for end in pooled["em_ci95"])
    assert rows[-1]["in view"] == f"{100 * pooled['evidence_recall']['retrieved']:.1f}"
    assert rows[-1]["tokens in"] == f"{pooled['tokens']['prompt']:,.0f}"


def test_tables_are_called_by_their_environments_label_where_it_names_one(tree: Path, tmp_path: Path) -> None:
    for number in (10, 20):
        shutil.copytree(tree / str(number) / "spam", tmp_path / str(number))
    assert titles(tmp_path) == ["Easy 10", "Easy 20"]
    relabel(tmp_path / "20", "Easy 10")
    assert titles(tmp_path) == ["Easy 10 (num_docs=10)", "Easy 10 (num_docs=20)"]
    shutil.copytree(tree / "10" / "perfect-rag", tmp_path / "also")
    relabel(tmp_path / "also", "Other")
    assert titles(tmp_path) == ["AtomMem-Synthetic", "Easy 10"]


def titles(folder: Path) -> list[str]:
    return [environment.title for environment in group(find_runs([folder])[0])]


def relabel(folder: Path, environment: str) -> None:
    for path in folder.rglob("summary.json"):
        summary = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**summary, "environment": environment}), encoding="utf-8")


def test_what_was_run_is_said_in_full(tree: Path, written: Path) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    section = text[text.index("## What was run") :]
    shared = {row["setting"]: row["value"] for row in table(section, "Settings of all runs")}
    rows = table(section, "Easy 10: num\\_docs = 10")
    assert [row["seeds"] for row in rows if row["policy"] == "perfect-rag"] == ["0, 1"]
    assert {row["other settings"] for row in rows} >= {"ablation = no\\_update, operations = create, read, delete"}
    assert len(table(section, "Easy 20: num\\_docs = 20")) == 2
    # Every setting of every run is in one of the three tables.
    for path in tree.rglob("config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        for name in {**config["options"], **config["settings"], **config["sampling"]}:
            assert name.replace("_", "\\_") in shared or name in ("num_docs", "operations", "ablation", "durability")


def test_the_csv_has_every_number_of_every_run(tree: Path, written: Path) -> None:
    rows = lines(written / "results.csv")
    assert len(rows) == 7
    for row in rows:
        summary = json.loads((tree.parent / row["folder"] / "summary.json").read_text(encoding="utf-8"))
        assert row["label"] == summary["label"]
        assert float(row["f1"]) == summary["f1"]
        assert json.loads(row["em_ci95"]) == summary["em_ci95"]
        assert float(row["tokens.prompt"]) == summary["tokens"]["prompt"]
        assert row["settings.top_k"] == "6"


def test_the_latex_has_whole_rows_and_no_character_that_latex_reads(written: Path) -> None:
    text = (written / "results.tex").read_text(encoding="utf-8")
    assert text.count(r"\begin{table*}") == text.count(r"\end{table*}") == 2
    assert r"100 \% y\_e\$ \{\&\}\textbar{}\textbackslash{}" in text
    for body in re.findall(r"\\begin\{tabular\}\{(l+r+)\}\n\\toprule\n(.*?)\\bottomrule", text, re.DOTALL):
        rows = [line for line in body[1].splitlines() if line != r"\midrule"]
        assert len(rows) in (3, 5)
        for row in rows:
            assert row.endswith(r" \\")
            assert len(re.findall(r"(?<!\\)&", row)) == len(body[0]) - 1
            bare = re.sub(r"\\([&%$#_{}]|textbar\{\}|textbackslash\{\})", "", row.removesuffix(r" \\"))
            assert not re.search(r"[%$#_{}~^\\]", bare)


def test_pictures_come_with_the_numbers_that_they_show(written: Path) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^]]*\]\(plots/([a-z0-9-]+)\.png\)", text)
    assert len(pictures) == len(set(pictures)) == 1 + 2 * 5
    assert {path.stem for path in (written / "plots").iterdir()} == set(pictures)
    for name in pictures:
        assert (written / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    by_documents = lines(written / "plots" / "em-by-documents-atommem-synthetic.csv")
    assert {line["documents"] for line in by_documents} == {"10", "20"}
    assert len({line["row"] for line in by_documents}) == 4
    memory = lines(written / "plots" / "memory-easy-10.csv")
    entries = [float(line["entries"]) for line in memory if line["row"] == "perfect-rag*"]
    assert entries == sorted(entries)
    assert entries[-1] == 10, "one entry for each document"


def test_operations_over_steps_add_up_to_those_of_an_episode(tree: Path, written: Path) -> None:
    drawn = lines(written / "plots" / "operations-easy-10.csv")
    records = [record for seed in (0, 1) for record in read_jsonl(tree / f"10/perfect-rag/seed-{seed}/episodes.jsonl")]
    for kind, mean in summarise(records)["operations"].items():
        of_kind = [float(line["mean"]) for line in drawn if line["row"] == "perfect-rag*" and line["kind"] == kind]
        assert sum(of_kind) == pytest.approx(mean, abs=1e-2)


def test_the_same_runs_give_the_same_bytes(tree: Path, written: Path) -> None:
    again = group(find_runs([tree / "20", tree, tree / "10" / "spam"])[0])  # in another order, and some of them twice
    pictures = plots.draw(again)
    assert markdown(again, [f"{tree.name}/30/spam/seed-0"], pictures) == (written / "report.md").read_text(
        encoding="utf-8"
    )
    assert latex(again) == (written / "results.tex").read_text(encoding="utf-8")
    for plot in pictures:
        assert csv_text(plot.data) == (written / "plots" / f"{plot.name}.csv").read_text(encoding="utf-8")


def test_runs_that_cannot_be_pooled_are_refused(tree: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(tree / "10" / "spam" / "seed-0", tmp_path / name)
    (environment,) = group(find_runs([tmp_path])[0])
    assert len(environment.rows[0].runs) == 1, "the same episodes twice are no more evidence than once"
    path = tmp_path / "b" / "episodes.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"reward": 0.0', '"reward": 1.0'), encoding="utf-8")
    with pytest.raises(SettingError, match="cannot be pooled"):
        group(find_runs([tmp_path])[0])


def test_unfinished_runs_are_named_and_left_out(tree: Path, written: Path, tmp_path: Path) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    assert f"not finished: `{tree.name}/30/spam/seed-0`" in text
    assert "Easy 30" not in text
    for folders in ((tree / "30",), (tree / "10", tmp_path / "nowhere"), ()):
        with pytest.raises(SettingError, match=r"No finished run|no folder|got none"):
            main(ReportConfig(runs=folders, out=tmp_path / "other"))


def test_a_judges_pass_rate_stands_beside_exact_match(tree: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tree / "10" / "spam" / "seed-0", tmp_path / "run")
    result = {"model": "openai:j", "prompt_version": 1, "pass": 1, "fail": 3, "unclear": 2, "pass_rate": 0.25}
    (folder / "judge.json").write_text(json.dumps({**result, "pass_rate_ci95": [0, 1]}), encoding="utf-8")
    text = markdown(group(find_runs([folder])[0]), [], [])
    assert table(text, "## Easy 10")[0]["judge"] == "16.7"  # what is unclear has not passed
    assert "openai:j, prompt 1" in text


@pytest.mark.parametrize(("other", "rate"), [(1, "25.0"), (2, "–")])
def test_verdicts_of_different_prompts_are_not_pooled(other: int, rate: str, tree: Path, tmp_path: Path) -> None:
    for seed, version in ((0, 1), (1, other)):
        folder = shutil.copytree(tree / "10" / "perfect-rag" / f"seed-{seed}", tmp_path / f"seed-{seed}")
        result = {"model": "openai:j", "prompt_version": version, "pass": 1, "fail": 2, "unclear": 1}
        (folder / "judge.json").write_text(json.dumps(result), encoding="utf-8")
    text = markdown(group(find_runs([tmp_path])[0]), [], [])
    assert table(text, "## Easy 10")[0].get("judge", "–") == rate


POLICIES = """
class Mine:
    privileged = False

    def __init__(self, name):
        self.name = name

    def begin(self, seed, task):
        return lambda observation: "<final_answer>Town 1</final_answer>"


dense, lexical = Mine("rag@mine"), Mine("rag@mine")
"""


def test_published_figures_stand_beside_the_same_method_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 200 documents of a HotpotQA file."""
    (tmp_path / "reported_policies.py").write_text(POLICIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    documents = [(f"Person {number}", f"Person {number} was born in Town {number}.") for number in range(250)]
    rows = [
        {
            "_id": f"q{number}",
            "question": f"Where was Person {number} born?",
            "answer": f"Town {number}",
            "type": "bridge",
            "level": "easy",
            "supporting_facts": [[documents[number][0], 0]],
            "context": [[title, [text]] for title, text in documents[number : number + 4]],
        }
        for number in range(0, 240, 4)
    ]
    (tmp_path / "dev.json").write_text(json.dumps(rows), encoding="utf-8")
    options = {"env_id": "AtomMem-HotpotQA", "data": tmp_path / "dev.json", "episodes": 1, "num_docs": 200}
    options["environment"] = "HotpotQA"
    run(tmp_path / "runs" / "dense", "reported_policies:dense", **options)
    run(tmp_path / "runs" / "lexical", "reported_policies:lexical", label="BM25", set=("retrieval=bm25",), **options)
    run(tmp_path / "runs" / "oracle", "oracle", **options)
    environments = group(find_runs([tmp_path / "runs"])[0])
    text = markdown(environments, [], [])
    rows = table(text, "## HotpotQA")
    assert {row["policy"]: row["published EM"] for row in rows} == {
        "rag@mine": "67.8 (RAG)",
        "BM25": "",
        r"oracle\*": "",
        "AtomMem without RL (arXiv 2601.08323, Qwen3-8B)": "65.9",
        "AtomMem (arXiv 2601.08323, Qwen3-8B)": "77.8",
    }
    published = table(text, "## Published by others")
    assert {row["model"] for row in published} == {"Qwen3-8B", "Qwen2.5-7B", "Qwen3-4B"}
    assert {row["metric"] for row in published if row["own"]} == {"judge"}
    assert "67.8 (RAG)" in latex(environments)
    (drawn,) = [plot.data for plot in plots.draw(environments) if plot.name == "em-hotpotqa"]
    assert {line["row"]: line["em"] for line in drawn if "published" in line["row"]} == {
        "rag@mine (published)": 67.8,
        "AtomMem without RL (published)": 65.9,
        "AtomMem (published)": 77.8,
    }


def test_published_figures_are_shares_of_the_datasets_that_there_are() -> None:
    (atommem,) = [one for one in read_published("AtomMem-HotpotQA") if one.method == "AtomMem"]
    assert atommem.figures == {"200": 77.8, "800": 72.9}
    assert read_published("AtomMem-Synthetic") == ()
    for env_id in ("AtomMem-HotpotQA", "AtomMem-2WikiMultiHopQA", "AtomMem-MuSiQue"):
        published = read_published(env_id)
        assert published
        for one in published:
            assert one.metric in ("EM", "judge")
            assert one.source.startswith("arXiv ")
            assert one.policy is None or one.policy in METHODS
            assert all(0 < figure < 100 for figure in one.figures.values())


def test_without_matplotlib_there_are_tables_and_a_word_on_plots(
    tree: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["atommem", "report", str(tree), "--out", str(out)])
    atommem()
    (record,) = caplog.records
    assert record.getMessage().startswith("The report has no plots. ")
    assert "pip install 'atommem[plots]'" in record.getMessage()
    assert {path.name for path in out.iterdir()} == {"report.md", "results.csv", "results.tex"}
    for name in ("results.csv", "results.tex"):
        assert (out / name).read_bytes() == (written / name).read_bytes()
    assert "plots/" not in (out / "report.md").read_text()


def test_plots_are_pictures_for_the_web_and_for_papers_and_the_same_bytes_each_time(
    tree: Path, written: Path, tmp_path: Path
) -> None:
    files = {path.name for path in (written / "plots").iterdir()}
    names = {name.partition(".")[0] for name in files}
    assert files == {f"{name}.{form}" for name in names for form in ("csv", "pdf", "png", "svg")}
    for again in (tmp_path / "one", tmp_path / "two"):
        again.mkdir()
        plots.save(plots.draw(group(find_runs([tree])[0]))[0], again)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
