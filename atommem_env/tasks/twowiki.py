"""Rows of 2WikiMultiHopQA (Ho et al., COLING 2020, arXiv 2011.01060).

The form is HotpotQA's, with up to four supporting documents. Known quirks of the official files, mended and counted as
`Record.repairs`: some supporting facts name a sentence beyond the document's end, some rows have a null `_id`; and some
contexts hold a document twice, of which the haystack keeps one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atommem_env.tasks import hotpotqa
from atommem_env.tasks.records import Record


def parse(record: Mapping[str, Any]) -> Record:
    """One official row in our form; `hops` is the number of supporting documents. Raises `DataError`."""
    return hotpotqa.parse(record)
