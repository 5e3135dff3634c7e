"""Benchmarks: what is fast, against which baseline, on the machine at hand; `python -m eval.benchmarks.NAME`.

They are programs that nothing imports, and so alone may import what stands above `eval`.
"""

from __future__ import annotations

import json
from pathlib import Path


def write_figures(out: Path | None, figures: object) -> None:
    """Writes what was measured as JSON, where a file is named."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
