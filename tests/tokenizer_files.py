"""Tokenizers by a file whose tokens are not words: parts of characters, white space, pieces of words."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

import agents.models
from atommem_env.tokens import Tokenizer, get_tokenizer

NAMES = ["bytes", "merged", "lower", "tiny"]
TRICKY = [
    "Ada",
    "lives",
    "in",
    "Rome.",
    "Why?",
    "é–中",
    "东京都港区",
    "\U0001f469\u200d\U0001f467",
    "\U0001f1eb\U0001f1f7",
]
TRICKY += ["...", "\n\n", "\t", "  ", "a.b", "\ufb01", "<s>", "\ud800"]
texts = st.lists(st.sampled_from([*TRICKY, "\n", " "]), max_size=25).map("".join)


@cache
def made(name: str) -> str:
    """The path of a `tokenizer.json`, for the setting `tokenizer`."""
    if name == "tiny":
        return str(Path(agents.models.__file__).parent / "tiny" / "tokenizer.json")
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend: Any = Backend(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=name == "lower")
    if name == "lower":  # which changes the text, and counts what no text has
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        backend.enable_truncation(4)
        backend.enable_padding(length=99, pad_id=0, pad_token=alphabet[0])
    if name != "bytes":
        trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"])
        backend.train_from_iterator(
            ["Ada lives in Rome. Why? Rome lives.\n\n 东京都 \U0001f469\u200d\U0001f467"] * 9, trainer
        )
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    path = Path(folder) / "tokenizer.json"
    backend.save(str(path))
    return str(path)


def load(name: str) -> Tokenizer:
    return get_tokenizer(made(name) if name != "builtin" else name)
