"""Where data, models and memories live on this machine."""

import os
from pathlib import Path

import platformdirs


def data_folder(*parts: str) -> Path:
    """The folder `ATOMMEM_DATA`, or `atommem` in the user's cache folder, joined with `parts`; not created here."""
    root = os.environ.get("ATOMMEM_DATA")
    return (Path(root) if root else platformdirs.user_cache_path("atommem", appauthor=False)).joinpath(*parts)
