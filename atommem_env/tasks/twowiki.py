"""Rows of 2WikiMultiHopQA (Ho et al., COLING 2020, arXiv 2011.01060).

The form is HotpotQA's, with up to four supporting documents. Known problems of the official files, repaired and counted as
`Record.repairs`: some supporting facts name a sentence beyond the document's end, and some rows have a null `_id`. Some
contexts contain a document twice; the haystack uses it once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atommem_env.tasks import hotpotqa
from atommem_env.tasks.records import Record


def parse(record: Mapping[str, Any]) -> Record:
    """One official row as a `Record`; `hops` is the number of supporting documents. Raises `DataError`."""
    return hotpotqa.parse(record)
