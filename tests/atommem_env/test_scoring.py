"""Answers are scored as the datasets' own scripts do."""

from __future__ import annotations

import gzip
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atommem_env.errors import DataError, SettingError
from atommem_env.scoring import RULES, holds, rule_of, score
from atommem_env.types import Score, Task


def test_equals_the_official_scripts_on_every_row(shared_data: Path) -> None:
    with gzip.open(shared_data / "official_scores.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 6000
    for row in rows:
        ours = score(row["prediction"], row["golds"], row["dataset"])
        for metric in ("em", "f1", "precision", "recall"):
            if row[metric] is not None:
                assert getattr(ours, metric) == row[metric], (metric, row)


@pytest.mark.parametrize("dataset", sorted(RULES))
@pytest.mark.parametrize(("prediction", "em"), [("The Paris", 1), ("Paris.", 1), ("paris", 1), ("PA RIS", 0), ("", 0)])
def test_fault_6_articles_and_punctuation_are_folded_and_inner_spaces_are_not(
    dataset: str, prediction: str, em: float
) -> None:
    assert score(prediction, ["Paris"], dataset).em == em


@pytest.mark.parametrize("dataset", sorted(RULES))
def test_fault_6_aliases_count(dataset: str) -> None:
    assert score("NYC", ["New York City", "NYC"], dataset) == Score(1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("dataset", sorted(RULES))
def test_fault_5_the_gold_of_another_question_is_worth_nothing(dataset: str) -> None:
    golds_of_four_questions = [["yes"], ["Ada Byron"], ["1907"], ["no"]]
    assert [score("yes", golds, dataset).em for golds in golds_of_four_questions] == [1, 0, 0, 0]


def test_yes_and_no_are_right_as_a_whole_or_not_at_all_but_for_musique() -> None:
    for dataset in ("hotpotqa", "2wikimultihopqa", "synthetic"):
        assert score("yes it is", ["yes"], dataset) == Score(0, 0, 0, 0)
        assert score("no", ["no other"], dataset) == Score(0, 0, 0, 0)
    assert score("yes it is", ["yes"], "musique") == Score(0, 0.5, 1 / 3, 1)


def test_texts_of_which_nothing_is_left_match_exactly_and_only_musique_gives_them_f1() -> None:
    for dataset in ("hotpotqa", "2wikimultihopqa", "synthetic"):
        assert score("a!", ["The"], dataset) == Score(1, 0, 0, 0)
    assert score("a!", ["The"], "musique") == Score(1, 1, 1, 1)
    assert score("", ["Bern"], "musique") == Score(0, 0, 0, 0)


def test_each_metric_takes_its_own_maximum() -> None:
    best = score("red blue", ["red", "red blue green grey black"], "2wikimultihopqa")
    assert (best.precision, best.recall) == (1, 1)  # of different golds
    assert best.em == 0
    assert best.f1 == pytest.approx(2 / 3)


def test_a_rule_that_does_not_exist_is_named() -> None:
    known = "hotpotqa, 2wikimultihopqa, musique, synthetic, files"
    says = f"A scoring rule must be one of {known}, module:attribute, or a function (prediction, golds) -> Score, got "
    for rule, rest in (("squad", "'squad'."), ("hotpot", "'hotpot'; did you mean hotpotqa?"), (7, "7.")):
        with pytest.raises(SettingError, match=f"^{re.escape(says)}") as wrong:
            score("Paris", ["Paris"], rule)  # type: ignore[arg-type]
        assert str(wrong.value).removeprefix(says).replace("'hotpotqa'", "hotpotqa") == rest


def first_letter(prediction: str, golds: Sequence[str]) -> Score:
    return Score.exact(float(prediction[:1] == golds[0][:1]))


def test_a_rule_of_your_own_is_an_object_or_a_name_of_one() -> None:
    for rule in (first_letter, "test_scoring_rule:first_letter"):
        sys.modules["test_scoring_rule"] = sys.modules[__name__]
        assert score("Rhine", ["Rome"], rule) == Score(1, 1, 1, 1)
    del sys.modules["test_scoring_rule"]
    with pytest.raises(SettingError, match=r"must return an atommem_env\.Score, got 1\.0 for 'Rhine'\.$"):
        score("Rhine", ["Rome"], lambda prediction, golds: 1.0)  # type: ignore[arg-type,return-value]


def test_the_rule_of_a_task_is_its_own_else_its_datasets_else_that_of_hotpotqa() -> None:
    def of(dataset: str, scoring: Any = None) -> Any:
        return rule_of(Task.of(["Ada"], ["Who?"], dataset=dataset, scoring=scoring))

    assert (of("musique"), of("files"), of("riddles")) == ("musique", "files", "hotpotqa")
    assert (of("musique", "files"), of("riddles", first_letter)) == ("files", first_letter)


@pytest.mark.parametrize("golds", [[], (), "Paris"])
def test_golds_must_be_answers(golds: list[str]) -> None:
    with pytest.raises(DataError, match="at least one answer"):
        score("Paris", golds, "hotpotqa")


@given(st.text(), st.lists(st.text(), min_size=1, max_size=3), st.sampled_from(sorted(RULES)))
def test_any_text_has_a_score_between_0_and_1(prediction: str, golds: list[str], dataset: str) -> None:
    result = score(prediction, golds, dataset)
    assert all(0 <= value <= 1 for value in (result.em, result.f1, result.precision, result.recall))
    assert score(golds[0], golds, dataset).em == 1


@pytest.mark.parametrize(
    ("text", "passage", "held"),
    [
        ("Turin lies\n\tin  Italy.", "Turin lies in Italy.", True),
        ("Turin lies in Italy.", " lies  in ", True),
        ("Turin lies in Italy.", "turin lies", False),
        ("Turin lies in Italy.", "Turin in Italy", False),
        ("Turinlies", "Turin lies", False),
        ("", "Turin", False),
        ("He wrote < b>x<  /b> there.", "wrote <b>x</b>", True),  # as `render_reply` stores it
        ("He wrote <b>x</b> there.", "wrote < b>x", True),
        ("He wrote < b>x", "wrote <c>x", False),
        ("wrote b x", "wrote <b x", False),
    ],
)
def test_holds_folds_whitespace_and_keeps_case(text: str, passage: str, held: bool) -> None:
    assert holds(text, passage) is held


words = st.text(alphabet="ab \n\t\u00a0", max_size=12)


@given(words, words)
def test_holds_is_containment_of_the_folded_texts(text: str, passage: str) -> None:
    assert holds(text, passage) == (" ".join(passage.split()) in " ".join(text.split()))


def test_holds_is_quick_on_long_texts() -> None:
    text = "Ada was born in Turin.\n" * 200_000  # 4.6 MB
    start = time.process_time()
    for _ in range(5):
        assert not holds(text, "Ada was born in Bern.")
        assert holds(text, "Turin. Ada was")
    assert time.process_time() - start < 5
