"""What a file says of how episodes were played is what is played."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atommem_env.errors import SettingError
from eval.options import EvalConfig
from eval.played_as import (
    CARD,
    PlayRecord,
    eval_command,
    read_card,
    read_record,
    read_run,
    record_of,
    write_card,
)
from eval.run import evaluate

SET = ("hops=[1,2]", "chunk_tokens=64", "capacity=3", "dialect=public_code", "ablation=no_scratchpad")


def config(out: Path, **changes: Any) -> EvalConfig:
    options: dict[str, Any] = {
        "env_id": "AtomMem-Synthetic",
        "num_docs": 6,
        "set": SET,
        "durability": "off",
        "out": out,
    }
    return EvalConfig(**options | {"policy": "random", "episodes": 4, "seed": 3, "layout": "terse"} | changes)


def card_of(folder: Path, trained: EvalConfig, **written: Any) -> PlayRecord:
    """The card of a model that was trained like a run."""
    folder.mkdir(exist_ok=True)
    write_card(folder, record_of(trained), 48, **{"command": "atommem sft", "run": folder} | written)
    card = read_card(str(folder))
    assert card is not None
    return card


def test_a_run_like_another_is_the_same_run(tmp_path: Path) -> None:
    evaluate(config(tmp_path / "run"))
    record = read_run(tmp_path / "run")
    again = EvalConfig(**record.environment() | record.playing(), policy="random", out=tmp_path / "again")
    assert again.num_docs == 6  # a field of its own, where there is one
    assert again.dialect == "public_code"
    assert set(again.set) >= set(SET) - {"dialect=public_code"}
    evaluate(again)
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("run", "again"))
    assert first == second
    assert len({(tmp_path / name / "episodes.jsonl").read_bytes() for name in ("run", "again")}) == 1


def test_settings_whose_defaults_have_changed_since_are_set(tmp_path: Path) -> None:
    evaluate(config(tmp_path / "run", episodes=1))
    path = tmp_path / "run" / "config.json"
    values = json.loads(path.read_text())
    values["settings"]["replies_per_question"] = 2  # as if that had been the default
    path.write_text(json.dumps(values))
    assert "replies_per_question=2" in read_run(tmp_path / "run").environment()["set"]


def test_a_card_says_how_its_model_is_played(tmp_path: Path) -> None:
    card = card_of(tmp_path / "model", config(tmp_path), run=tmp_path / "runs" / "sft", recipe="tiny")
    assert card.values["schema_version"] == 1
    assert card.values["written_by"] == {"command": "atommem sft", "recipe": "tiny", "run": "sft"}
    assert (card.layout, card.dialect, card.max_new_tokens) == ("terse", "public_code", 48)
    assert card.values["settings"]["tokenizer"] == "builtin"
    options = EvalConfig(**card.environment()).env_options()
    assert options.items() >= {"embedder": "hashing", "num_docs": 6, "hops": [1, 2], "capacity": 3}.items()
    assert options["split"] == "test"  # neither trained on, nor was the best model chosen by it
    assert "durability" not in options
    assert eval_command(tmp_path / "model") == f"atommem eval --policy {tmp_path / 'model'}"
    assert eval_command(tmp_path / "other") == f"atommem eval ENV_ID --policy {tmp_path / 'other'}"


def test_what_was_trained_on_is_not_played(tmp_path: Path) -> None:
    rows = [
        {
            "_id": str(number),
            "question": "?",
            "answer": "yes",
            "type": "bridge",
            "level": "hard",
            "supporting_facts": [["a", 0]],
            "context": [["a", [f"text {number}"]]],
        }
        for number in range(3)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    run = config(tmp_path, env_id="AtomMem-HotpotQA", data=tmp_path / "rows.json", split="train", num_docs=1, set=())
    options = card_of(tmp_path / "model", run).values["options"]
    assert not {"data", "split"} & set(options)  # no split `test` is imported here


def test_files_of_ones_own_and_their_questions_are_the_environment(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Rome is a city.")
    (tmp_path / "questions.jsonl").write_text('{"question": "What is Rome?", "answer": "a city"}\n')
    files = {"files": (tmp_path / "notes.txt",), "data": tmp_path / "questions.jsonl"}
    card = card_of(tmp_path / "model", config(tmp_path, env_id="AtomMem-Files", num_docs=None, set=(), **files))
    again = EvalConfig(**card.environment() | card.playing())
    assert (again.files, again.data) == (files["files"], files["data"])
    again.make_env().close()


def test_only_the_folder_of_a_model_has_a_card(tmp_path: Path) -> None:
    card_of(tmp_path / "model", config(tmp_path))
    assert read_card(f"vllm:{tmp_path / 'model'}") is not None
    for policy in ("oracle", "constant=" + 5000 * "x", "constant=\0", str(tmp_path), f"rag@{tmp_path / 'model'}"):
        assert read_card(policy) is None


@pytest.mark.parametrize("values", [{"schema_version": 2}, {}, {"schema_version": 1}])
def test_a_card_of_another_version_says_so(values: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(json.dumps(values))
    with pytest.raises(SettingError, match=r"atommem.json must be of schema 1"):
        read_card(str(tmp_path))


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="--like takes the folder of an evaluation"):
        read_run(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"samples": "runs/samples"}')  # of another command
    with pytest.raises(SettingError, match="--like takes the folder of an evaluation"):
        read_run(tmp_path)
    assert read_record(tmp_path / "config.json") is None
