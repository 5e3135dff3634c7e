"""A model for the tests of training: tiny, and with something to gain."""

from __future__ import annotations

from pathlib import Path

import pytest

REPLIES = (
    "<final_answer>unknown</final_answer>",
    "<final_answer>Rome</final_answer>",
    "<create_memory>Rome unknown</create_memory>",
    "<read_memory>unknown</read_memory>",
)


@pytest.fixture(scope="session")
def undecided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Qwen3 of 2 layers and width 32 that gives one of `REPLIES`, whatever it reads, each about as often.

    So it is right in some rollouts of an unanswerable task and wrong in others, and never right in an answerable one.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from train.tiny_base import build_tokenizer

    folder = tmp_path_factory.mktemp("undecided")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    begin, end = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    replies = [torch.tensor([begin, *tokenizer.encode(reply), end]) for reply in REPLIES]
    ids, labels = torch.zeros(32, 72, dtype=torch.long), torch.zeros(32, 72, dtype=torch.long)
    for _ in range(60):
        ids.random_(len(tokenizer))
        labels.fill_(-100)
        for row, start in enumerate(torch.randint(5, 64, (len(ids),)).tolist()):
            reply = replies[row % len(replies)]
            ids[row, start : start + len(reply)] = reply
            labels[row, start + 1 : start + len(reply)] = reply[1:]
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder
