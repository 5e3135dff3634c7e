"""The quick start's parts; CI runs the whole of it (`make quickstart SMOKE=1`)."""

import json
from pathlib import Path

import pytest

from atommem_env.errors import SettingError
from train.quickstart import _configurations, _open, _paired


def test_what_an_earlier_quick_start_left_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    _open(tmp_path / "own")
    (tmp_path / "own" / "sft").mkdir()
    _open(tmp_path / "own")
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["quickstart.json"]
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SettingError, match="something other"):
        _open(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("smoke", [False, True])
def test_each_phase_starts_where_the_one_before_ended(tmp_path: Path, smoke: bool) -> None:
    collecting, fine_tuning, training = _configurations(tmp_path, 5, smoke)
    assert fine_tuning.model == "tiny"
    assert fine_tuning.samples == collecting.out
    assert Path(training.model) == fine_tuning.out / "model"
    assert {collecting.seed, fine_tuning.seed, training.seed} == {5}
    assert (collecting.env_options() | {"split": "train"}) == (training.env_options() | {"split": "train"})


def test_the_gain_is_paired_by_episode(tmp_path: Path) -> None:
    for name, rewards in (("before", [0, 0, 1, 1] * 50), ("after", [1, 0, 1, 1] * 50)):
        (tmp_path / name).mkdir()
        lines = (json.dumps({"reward": reward}) + "\n" for reward in rewards)
        (tmp_path / name / "episodes.jsonl").write_text("".join(lines))
    gain, low, high = _paired(tmp_path / "before", tmp_path / "after")
    assert gain == 0.25
    assert 0.15 < low < 0.25 < high < 0.35
