"""Benchmarks: speed against a baseline, on this machine; `python -m eval.benchmarks.NAME`.

They are programs that nothing imports.
"""

from __future__ import annotations

import json
from pathlib import Path


def write_figures(out: Path | None, figures: object) -> None:
    """Writes the measurements as JSON, if a file is given."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
