"""Every command and every piece of code in the README is run."""

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
WITH_WEIGHTS = ("atommem models get", "smollm2")  # run where ATOMMEM_TEST_SMOLLM2 is set


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    assert all(line.startswith(("make ", "pip install ", "atommem ")) for line in lines), lines
    return [line for line in lines if line.startswith("atommem ")]


def write_question_files(folder: Path) -> None:
    """HotpotQA files under the README's names: 60 questions on 250 little documents."""
    documents = [(f"Person {number}", f"Person {number} was born in Town {number}.") for number in range(250)]
    rows = [
        {
            "_id": f"q{number}",
            "question": f"Where was Person {number} born?",
            "answer": f"Town {number}",
            "type": "bridge",
            "level": "easy",
            "supporting_facts": [[documents[number][0], 0]],
            "context": [[title, [text]] for title, text in documents[number : number + 3]],
        }
        for number in range(60)
    ]
    corpus = [{"title": title, "text": text} for title, text in documents]
    for name, lines in (("hotpotqa_dev", rows), ("hotpotqa_corpus", corpus)):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def write_own_files(folder: Path) -> None:
    """A little handbook, and questions about it."""
    (folder / "handbook").mkdir()
    (folder / "handbook" / "safety.md").write_text("# Fire\nLeave by the north door.\n# Water\nCall Ada Brook.\n")
    lines = [
        {"question": "Which door in a fire?", "answer": "north"},
        {"question": "Who is called about water?", "answer": "Ada Brook"},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.xdist_group("slow")
def test_the_readmes_commands_and_code_do_what_they_say(tmp_path: Path) -> None:
    write_question_files(tmp_path)
    write_own_files(tmp_path)
    python = blocks("python")
    modules = {code: code.split()[1] for code in python if code.startswith("# my_")}
    for code, name in modules.items():
        (tmp_path / name).write_text(code)
    shell = "import sys; from atommem_env.cli import main; main()"
    with_weights = bool(os.environ.get("ATOMMEM_TEST_SMOLLM2"))
    for command in commands():
        if any(word in command for word in WITH_WEIGHTS) and not with_weights:
            continue
        ran = subprocess.run(
            [sys.executable, "-c", shell, *shlex.split(command)[1:]], cwd=tmp_path, capture_output=True, text=True
        )
        assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
    for code in python:
        if code not in modules:
            ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
            assert ran.returncode == 0, f"{code}\n{ran.stderr}"
            assert ran.stdout.strip(), code
