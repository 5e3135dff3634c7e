"""Logits of all trained tokens of many samples, without padding, and with what the samples of a group share computed once.

The samples of a micro-batch stand end to end in one row of tokens, made of segments. A plain sample is one segment. Samples
that begin alike (the rollouts of a group read the same questions and chunk at the same turn) become one segment for what
they share, computed once, and one for the rest of each, whose queries see the keys and values of the shared segment and,
causally, their own. The shared segment gets its gradient through those keys and values from all of them, so that the update is
that of the padded batch of `train.samples.collate` up to rounding. The output layer is computed at trained positions only.

The attention below is registered with transformers' attention interface and takes the row apart for each layer; everything else
in a decoder treats each token alone. No mask of the row is ever built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from atommem_env.errors import SettingError
from train.samples import Sample, SampleKey

_MIN_PREFIX = 16  # tokens; a shorter prefix saves less than its own attention call costs
_NAME = "atommem_packed"  # in transformers' attention interface
_HARMLESS = {
    "position_ids",
    "use_cache",
    "cache_position",
}  # what else models hand to their attention, without effect here

_HINT = (
    "Packed training knows neither sliding windows, soft caps and sinks nor recurrent layers; Llama and Qwen3 are fine."
)


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of a packed row that attend causally to one another, and all of them to a prefix further left."""

    start: int
    end: int  # exclusive
    prefix: tuple[int, int] = (
        0,
        0,
    )  # from, to (exclusive): the segment that holds the sample's first tokens; empty: none
    key: SampleKey | None = None  # the sample that ends here; None: a prefix, which several samples share


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """A micro-batch as one row. T: its tokens, N: its trained tokens, in the order of the samples and of their tokens.

    A position is an index into the row. Two samples 1 2 3 4 [5] and 1 2 3 6 [7 8], trained tokens in brackets, that share 1 2 3:

        position       0  1  2  3  4  5  6  7
        token_ids      1  2  3  4  5  6  7  8
        position_ids   0  1  2  3  4  3  4  5
        segments       (0, 3)   (3, 5) after (0, 3)   (5, 8) after (0, 3)
        rows           3  5  6      the positions *before* the trained tokens 5 7 8
    """

    token_ids_T: NDArray[np.int64]
    position_ids_T: NDArray[np.int64]  # in the sample: they continue from its prefix
    segments: tuple[Segment, ...]
    rows_N: NDArray[np.int64]  # the position whose output predicts the token
    targets_N: NDArray[np.int64]  # the token
    logprobs_N: NDArray[np.float32]  # the sampler's
    advantages_N: NDArray[np.float32]

    @property
    def keys(self) -> tuple[SampleKey, ...]:
        """`Sample.key` of all samples in it, for `train.samples.check_all_trained`."""
        return tuple(segment.key for segment in self.segments if segment.key)

    @property
    def tokens(self) -> int:
        """T, how many tokens are computed."""
        return len(self.token_ids_T)

    @property
    def sample_tokens(self) -> int:
        """How many tokens its samples have; more than `tokens` by what is shared."""
        return sum(
            segment.end - segment.start + segment.prefix[1] - segment.prefix[0]
            for segment in self.segments
            if segment.key
        )


def pack_samples(samples: Sequence[Sample], max_tokens: int, *, share_prefixes: bool = True) -> list[PackedBatch]:
    """Spreads the samples over micro-batches, each sample whole and in one of them; a function of the samples alone.

    Samples that share a prefix stay together as far as they fit; the micro-batches are filled by first-fit decreasing.

    Args:
        samples: In any order.
        max_tokens: Most tokens of a micro-batch, a shared prefix counted once.
        share_prefixes: Whether samples of a group compute a common beginning of their prompts once.

    Raises:
        SettingError: a sample is longer than `max_tokens`.
    """
    longest = max((len(sample.token_ids) for sample in samples), default=0)
    if longest > max_tokens:
        raise SettingError(
            f"max_tokens must be at least the longest sample's {longest} tokens, got {max_tokens}. Raise it, or make the "
            "environment's chunk_tokens or the policy's max_new_tokens smaller."
        )
    clusters: list[list[Sample]] = [[sample] for sample in samples]
    if share_prefixes:
        by_group = sorted(samples, key=lambda sample: (sample.group, sample.token_ids, sample.key))
        clusters = [
            cluster for _, group in groupby(by_group, lambda sample: sample.group) for cluster in _clusters(list(group))
        ]
    fitting = []  # clusters, the ones too large for a micro-batch split into several
    for cluster in clusters:
        prefix = _shared(cluster)
        sizes = [len(sample.token_ids) - prefix for sample in cluster]
        fitting += [[cluster[index] for index in part] for part in _first_fit(sizes, max_tokens - prefix)]
    sizes = [sum(len(sample.token_ids) for sample in part) - (len(part) - 1) * _shared(part) for part in fitting]
    return [_lay_out([fitting[index] for index in row]) for row in _first_fit(sizes, max_tokens)]


def _first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the sizes in bins that hold `capacity` each, by first-fit decreasing.

    >>> _first_fit([3, 5, 2, 4], 7)
    [[1, 2], [3, 0]]
    """
    bins: list[list[int]] = []
    free: list[int] = []  # in each bin
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        chosen = next((number for number, room in enumerate(free) if room >= sizes[index]), len(bins))
        if chosen == len(bins):
            bins.append([])
            free.append(capacity)
        bins[chosen].append(index)
        free[chosen] -= sizes[index]
    return bins


def _clusters(group: Sequence[Sample]) -> list[list[Sample]]:
    """Splits samples sorted by their tokens where most tokens are saved: (members - 1) × shared prefix, summed over clusters.

    Neighbours share most, so that a cluster is a run of neighbours, and the best splits up to each follow from those before.
    """
    common = [_common(first.token_ids, second.token_ids) for first, second in pairwise(group)]
    best: list[tuple[int, int]] = [(0, 0)]  # up to each position: tokens saved, where its last cluster begins
    for end in range(1, len(group) + 1):
        saved, begin = best[end - 1][0], end - 1
        prefix = _untrained(group[end - 1])
        for start in range(end - 2, -1, -1):
            prefix = min(prefix, common[start], _untrained(group[start]))
            if prefix < _MIN_PREFIX:
                break
            if best[start][0] + (end - start - 1) * prefix > saved:
                saved, begin = best[start][0] + (end - start - 1) * prefix, start
        best.append((saved, begin))
    clusters: list[list[Sample]] = []
    end = len(group)
    while end:
        clusters.append(list(group[best[end][1] : end]))
        end = best[end][1]
    return clusters[::-1]


def _untrained(sample: Sample) -> int:
    """How many of its first tokens may be shared: none trained, nor the one whose output predicts the first that is."""
    return sample.trained[0][0] - 1


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike.

    >>> _common((1, 2, 3, 4), (1, 2, 4)), _common((1, 2), (1, 2, 3))
    (2, 2)
    """
    length = min(len(first), len(second))
    differ = np.flatnonzero(np.array(first[:length]) != np.array(second[:length]))
    return int(differ[0]) if differ.size else length


def _shared(cluster: Sequence[Sample]) -> int:
    """How many tokens the samples of a cluster compute once; none where one is alone."""
    if len(cluster) == 1:
        return 0
    ids = [sample.token_ids for sample in cluster]
    return min(_common(min(ids), max(ids)), *map(_untrained, cluster))


def _lay_out(clusters: Sequence[Sequence[Sample]]) -> PackedBatch:
    """One row of all clusters, each shared prefix before what follows it."""
    token_ids: list[int] = []
    positions: list[NDArray[np.int64]] = []
    segments: list[Segment] = []
    rows: list[NDArray[np.int64]] = []
    samples = [sample for cluster in clusters for sample in cluster]
    for cluster in clusters:
        shared, begin = _shared(cluster), len(token_ids)
        prefix = (begin, begin + shared) if shared else (0, 0)
        if shared:
            token_ids += cluster[0].token_ids[:shared]
            positions.append(np.arange(shared))
            segments.append(Segment(*prefix))
        for sample in cluster:
            start = len(token_ids)
            token_ids += sample.token_ids[shared:]
            positions.append(np.arange(shared, len(sample.token_ids)))
            segments.append(Segment(start, len(token_ids), prefix, sample.key))
            rows += [np.arange(first - 1, last - 1) + start - shared for first, last in sample.trained]
    return PackedBatch(
        token_ids_T=np.array(token_ids, dtype=np.int64),
        position_ids_T=np.concatenate(positions),
        segments=tuple(segments),
        rows_N=np.concatenate(rows),
        targets_N=np.array(
            [token for one in samples for first, last in one.trained for token in one.token_ids[first:last]], np.int64
        ),
        logprobs_N=np.concatenate([one.logprobs for one in samples], dtype=np.float32),
        advantages_N=np.repeat([one.advantage for one in samples], [one.trained_tokens for one in samples]).astype(
            np.float32
        ),
    )


@dataclass(frozen=True, slots=True)
class _Block:
    """Segments that one attention call computes: alike in prefix and about in length, padded on the right to the longest."""

    prefix: tuple[int, int]
    shape: tuple[int, int]  # segments, tokens of the longest
    mask: Tensor | None  # [L, P + L] which keys a query sees; None: no prefix, plainly causal


@dataclass(slots=True)
class _Layout:
    """How the attention takes a row apart, and puts it together again. M: positions in all blocks, padding included."""

    blocks: list[_Block]
    gather_M: Tensor  # the position in the row; for padding that of the segment's last token
    scatter_T: Tensor  # the position in the blocks
    prefixes: Tensor  # the positions in the row of each block's prefix, one after the other
    layers: int = field(default=0, init=False)  # how many attention layers used it


def _layout(segments: Sequence[Segment], device: torch.device) -> _Layout:
    """Blocks of segments with the same prefix; those without are apart by powers of two of length, to pad little.

    >>> layout = _layout([Segment(0, 3), Segment(3, 5, (0, 3)), Segment(5, 8, (0, 3))], torch.device("cpu"))
    >>> [block.shape for block in layout.blocks]
    [(1, 3), (2, 3)]
    >>> layout.gather_M.tolist(), layout.scatter_T.tolist(), layout.prefixes.tolist()
    ([0, 1, 2, 3, 4, 4, 5, 6, 7], [0, 1, 2, 3, 4, 6, 7, 8], [0, 1, 2])
    """

    def kind(segment: Segment) -> tuple[int, int, int]:
        return *segment.prefix, 0 if segment.prefix[1] else (segment.end - segment.start).bit_length()

    blocks: list[_Block] = []
    gather: list[NDArray[np.int64]] = []
    scatter = np.empty(max(segment.end for segment in segments), dtype=np.int64)
    width = 0  # positions in the blocks so far
    for _, members in groupby(sorted(segments, key=kind), kind):
        block = list(members)
        prefix, longest = block[0].prefix, max(segment.end - segment.start for segment in block)
        before = prefix[1] - prefix[0]
        mask = torch.ones(longest, before + longest, dtype=torch.bool, device=device).tril(before) if before else None
        blocks.append(_Block(prefix, (len(block), longest), mask))
        for segment in block:
            gather.append(np.minimum(np.arange(segment.start, segment.start + longest), segment.end - 1))
            scatter[segment.start : segment.end] = np.arange(width, width + segment.end - segment.start)
            width += longest
    prefixes = np.concatenate([np.arange(*block.prefix) for block in blocks])
    return _Layout(blocks, *(torch.from_numpy(at).to(device) for at in (np.concatenate(gather), scatter, prefixes)))


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: _Layout | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention [1, T, H, D] of a packed row from query [1, H, T, D], key and value [1, H_kv, T, D]; without one, `sdpa`'s."""
    if packed is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    strange = [name for name, given in kwargs.items() if not (name in _HARMLESS or given is None or given is False)]
    if strange:
        raise SettingError(
            f"Expected plain causal attention, got {type(module).__name__} with {', '.join(strange)}. {_HINT}"
        )
    packed.layers += 1
    sizes = [segments * longest for segments, longest in (block.shape for block in packed.blocks)]
    before = [block.prefix[1] - block.prefix[0] for block in packed.blocks]

    def own(heads: Tensor) -> tuple[Tensor, ...]:  # for each block [S L, H, D]; split's backward is one cat
        return heads[0].transpose(0, 1).index_select(0, packed.gather_M).split(sizes)

    def shared(heads: Tensor) -> tuple[Tensor, ...]:  # for each block [P, H, D]
        return heads[0].transpose(0, 1).index_select(0, packed.prefixes).split(before)

    outputs = []
    for block, q, k, v, k_before, v_before in zip(
        packed.blocks, own(query), own(key), own(value), shared(key), shared(value), strict=True
    ):
        q, k, v = (heads.unflatten(0, block.shape).transpose(1, 2) for heads in (q, k, v))  # [S, H, L, D]
        if block.mask is not None:
            k, v = (
                torch.cat([start.transpose(0, 1).expand(len(rest), -1, -1, -1), rest], dim=2)
                for start, rest in ((k_before, k), (v_before, v))
            )
        if k.shape[1] < q.shape[1]:  # grouped queries; with a mask, CUDA's fast kernels want the keys repeated
            k, v = (heads.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for heads in (k, v))
        output = scaled_dot_product_attention(
            q, k, v, block.mask, dropout_p=dropout, is_causal=block.mask is None, scale=scaling
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, packed.scatter_T)[None], None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


def use_packed_attention(model: Any) -> None:
    """Prepares a causal language model of transformers, or one wrapped by peft, for `packed_logits`; once is enough.

    All that the model computes otherwise, sampling with a cache included, stays exactly as with its `sdpa` attention.

    Raises:
        SettingError: an architecture whose tokens meet elsewhere than in plain causal attention.
    """
    model.set_attn_implementation(_NAME)
    if model.config._attn_implementation != _NAME or model._is_stateful:
        raise SettingError(
            f"Expected a model whose tokens meet only in an attention that transformers lets one exchange, got "
            f"{model.config.model_type}. {_HINT}"
        )
    with torch.no_grad():
        packed_logits(model, pack_samples([Sample((0, 0), ((1, 2),), (0.0,), 0.0, 0, 0, (0,))] * 2, 4)[0])


def packed_logits(model: Any, batch: PackedBatch) -> Tensor:
    """[N, V] logits that predict the trained tokens, with gradient, on the model's device.

    Gradient checkpointing may be on, and the model may be wrapped by peft or for data parallelism.

    Raises:
        SettingError: a model that `use_packed_attention` did not prepare, or would reject.
    """
    device = next(model.parameters()).device
    layout = _layout(batch.segments, device)
    token_ids, positions, rows = (
        torch.from_numpy(array).to(device) for array in (batch.token_ids_T, batch.position_ids_T, batch.rows_N)
    )
    logits: Tensor = model(
        input_ids=token_ids[None],
        position_ids=positions[None],
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),  # 4-d: transformers builds none itself
        use_cache=False,
        logits_to_keep=rows,
        packed=layout,
    ).logits
    config = getattr(model, "module", model).config
    expected = config.get_text_config().num_hidden_layers
    if layout.layers != expected:
        raise SettingError(
            f"Expected {expected} layers of {config.model_type} to compute the samples apart, {layout.layers} did. Call "
            f"use_packed_attention(model) first. {_HINT}"
        )
    return logits[0]
