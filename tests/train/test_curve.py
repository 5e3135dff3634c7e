"""The picture of a run."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

matplotlib = pytest.importorskip("matplotlib")

from atommem_env.errors import DataError  # noqa: E402
from eval.run_folder import to_jsonl  # noqa: E402
from train.curve import draw_curve  # noqa: E402

STEP = {"reward": 0.25, "operations": {"create": 0.5, "answer": 0.1}, "faults": 1.5}
EVALUATION = {"eval_em": 0.3, "eval_em_ci95": [0.2, 0.4]}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(map(to_jsonl, lines)), encoding="utf-8")
    return path


@pytest.mark.parametrize("evaluated", [True, False])
def test_the_picture_is_a_png_that_shows_the_lines(evaluated: bool, tmp_path: Path) -> None:
    rows = [{"step": step, **STEP} for step in (1, 2, 3)]
    if evaluated:
        rows = [{"step": 0, **EVALUATION}, *rows[:2], {**rows[2], **EVALUATION}]
    draw_curve(write(tmp_path / "metrics.jsonl", rows), tmp_path / "curve.png")
    data = (tmp_path / "curve.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (910, 1040)
    pixels = matplotlib.image.imread(tmp_path / "curve.png")[:, :, :3]
    for colour in ((214, 39, 40), (31, 119, 180)):  # of the faults, of what is created
        assert (abs(255 * pixels - colour) < 0.5).all(-1).sum() > 100


def test_a_run_without_a_step_has_no_picture(tmp_path: Path) -> None:
    for lines in ([], [{"step": 0, **EVALUATION}]):
        with pytest.raises(DataError, match="at least one step"):
            draw_curve(write(tmp_path / "metrics.jsonl", lines), tmp_path / "curve.png")
    with pytest.raises(DataError, match="at least one step"):
        draw_curve(tmp_path / "none.jsonl", tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()
