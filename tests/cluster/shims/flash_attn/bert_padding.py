"""Rows without their padding, and back."""

import torch
from einops import rearrange

__all__ = ["index_first_axis", "pad_input", "rearrange", "unpad_input"]


def index_first_axis(rows, indices):
    return rows[indices]


def unpad_input(hidden, attention_mask):
    """hidden [B, T, …] → [N, …] of the places where the mask is 1, and where they were."""
    lengths = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = attention_mask.flatten().nonzero().flatten()
    offsets = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return rearrange(hidden, "b s ... -> (b s) ...")[indices], indices, offsets, int(lengths.max()), lengths


def pad_input(hidden, indices, batch, seqlen):
    """The inverse; zeros where there was padding."""
    padded = hidden.new_zeros(batch * seqlen, *hidden.shape[1:])
    padded[indices] = hidden
    return rearrange(padded, "(b s) ... -> b s ...", b=batch)
