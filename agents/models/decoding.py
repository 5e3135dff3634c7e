"""Continuous batching: replies decoded together, one row each, that join and leave the batch at any token.

Axes: `B` rows of the batch, `T` positions of the cache, `V` the vocabulary, `H` heads of keys and values, `D` their size.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import Cache

_PREFILL_TOKENS = 4096  # of prompts read in one forward, padding included; a longer prompt is read alone
_QUIET_TURNS = (
    8  # of the event loop: an episode needs some, its embedding's batch among them, to come back with a prompt
)


@dataclass(eq=False, slots=True)
class Generation:
    """One reply while it is sampled; a row of a batch."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    seed: int | None  # of its draws; unused at temperature 0
    ids: list[int] = field(default_factory=list)  # sampled so far
    logprobs: list[float] = field(default_factory=list)  # of these
    draws: list[float] = field(init=False)  # [max_new_tokens], uniform in [0, 1), or [] at temperature 0

    def __post_init__(self) -> None:
        self.draws = np.random.default_rng(self.seed).random(self.max_new_tokens).tolist() if self.temperature else []


class RowCache(Cache):
    """Keys and values of all rows in one tensor, each row writing at its own position.

    A step writes B positions and hands out views, so it costs no copy of what was there. Positions that a row has not written
    hold zeros or an earlier reply's states: finite, which a mask needs (0 · NaN is NaN).
    """

    def __init__(self, max_rows: int, max_positions: int) -> None:
        super().__init__(layers=[])
        self._limits = max_rows, max_positions
        self._states: Tensor | None = None  # [layers, 2, rows, H, positions, D], its first B rows in use
        self._rows = self._positions = torch.empty(0)  # [B] of the tokens to be written
        self._width = 0  # positions in use by the longest row

    def write_next(self, positions: Tensor, width: int) -> None:
        """Row b's next token belongs at `positions[b]`, below `width`."""
        self._rows, self._positions, self._width = (
            torch.arange(len(positions), device=positions.device),
            positions,
            width,
        )
        self._reserve(len(positions), width)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention: [B, H, 1, D] of the new token in, [B, H, width, D] out."""
        assert self._states is not None
        keys, values = self._states[layer_idx]
        keys[self._rows, :, self._positions] = key_states[:, :, 0]
        values[self._rows, :, self._positions] = value_states[:, :, 0]
        count = len(self._rows)
        return keys[:count, :, : self._width], values[:count, :, : self._width]

    def insert(self, start: int, read: DynamicCache, sources: Sequence[int]) -> None:
        """Rows `start`, `start + 1`, … begin with the states of `read`'s rows `sources`."""
        _, heads, width, size = read.layers[0].keys.shape
        if self._states is None:
            self._states = read.layers[0].keys.new_zeros(len(read.layers), 2, 0, heads, 0, size)
        end = start + len(sources)
        self._reserve(end, width)
        for states, layer in zip(self._states, read.layers, strict=True):
            states[0, start:end, :, :width] = layer.keys[sources]
            states[1, start:end, :, :width] = layer.values[sources]

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copies rows over others."""
        if self._states is not None and sources:
            self._states[:, :, targets] = self._states[:, :, sources]

    def _reserve(self, rows: int, positions: int) -> None:
        """Makes room, and some more: growing copies everything, so it must be rare."""
        assert self._states is not None
        layers, two, old_rows, heads, old_positions, size = self._states.shape
        if rows > old_rows or positions > old_positions:
            new_rows = old_rows if rows <= old_rows else min(rows + rows // 2, self._limits[0])
            new_positions = (
                old_positions if positions <= old_positions else min(positions + positions // 4 + 32, self._limits[1])
            )
            grown = self._states.new_zeros(layers, two, new_rows, heads, new_positions, size)
            grown[:, :, :old_rows, :, :old_positions] = self._states
            self._states = grown


class Batch:
    """The rows that are decoded together; synchronous, and a function of the order of its calls alone.

    Args:
        model: Predicts; put into eval mode for each forward pass and then back into the mode that it was in.
        eos_ids: Tokens that end a reply.
        max_rows: Most rows at a time.
        window: Most tokens of prompt and reply together.
    """

    def __init__(self, model: nn.Module, eos_ids: set[int], max_rows: int, window: int) -> None:
        self.rows: list[Generation] = []
        self._model = model
        self._modules = list(model.modules())
        self._device = next(model.parameters()).device
        self._eos_ids = eos_ids
        self._cache = RowCache(max_rows, window)

    @torch.no_grad()
    def join(self, rows: Sequence[Generation]) -> list[Generation]:
        """Reads the prompts of new rows and samples their first tokens; returns those that are finished with it."""
        sharing: dict[tuple[int, ...], list[Generation]] = {}  # a group samples one prompt many times: it is read once
        for row in rows:
            sharing.setdefault(row.prompt, []).append(row)
        for prompts in prefill_groups(list(sharing)):
            last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self._device)
            # Padding follows the text, where causal attention never sees it; the cache masks it out afterwards.
            inputs = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(self._device)
            read = DynamicCache()
            with _evaluating(self._modules):
                output = self._model(
                    input_ids=inputs, past_key_values=read, use_cache=True, logits_to_keep=last[:, None]
                )
            sources = [index for index, prompt in enumerate(prompts) for _ in sharing[prompt]]
            joining = [row for prompt in prompts for row in sharing[prompt]]
            self._sample(joining, output.logits[sources, 0])
            unfinished = [index for index, row in enumerate(joining) if not self._ended(row)]
            if unfinished:
                self._cache.insert(len(self.rows), read, [sources[index] for index in unfinished])
                self.rows += [joining[index] for index in unfinished]
        return [row for row in rows if self._ended(row)]

    @torch.no_grad()
    def step(self) -> list[Generation]:
        """Samples one token more of each row; returns, and drops, the rows that are finished with it."""
        if not self.rows:
            return []
        last = [(row.ids[-1], len(row.prompt) + len(row.ids) - 1) for row in self.rows]  # token and its position
        tokens_B, positions_B = torch.from_numpy(np.array(last).T.copy()).to(self._device)
        width = 1 + max(position for _, position in last)
        self._cache.write_next(positions_B, width)
        seen_B_T = torch.arange(width, device=self._device) <= positions_B[:, None]
        with _evaluating(self._modules):
            output = self._model(
                input_ids=tokens_B[:, None],
                attention_mask=seen_B_T[:, None, None],
                position_ids=positions_B[:, None],
                past_key_values=self._cache,
                use_cache=True,
            )
        self._sample(self.rows, output.logits[:, -1])
        finished = [row for row in self.rows if self._ended(row)]
        self.drop(finished)
        return finished

    def drop(self, rows: Sequence[Generation]) -> None:
        """Takes rows out, finished or not; rows from the end take their indices."""
        gone = set(rows)
        if gone:
            sources, targets = fill_gaps([row in gone for row in self.rows])
            self._cache.move(sources, targets)
            for source, target in zip(sources, targets, strict=True):
                self.rows[target] = self.rows[source]
            del self.rows[len(self.rows) - len(gone) :]

    def _ended(self, row: Generation) -> bool:
        return row.ids[-1] in self._eos_ids or len(row.ids) == row.max_new_tokens

    def _sample(self, rows: Sequence[Generation], logits_B_V: Tensor) -> None:
        """Appends to each row a token from softmax(logits / temperature), at temperature 0 the likeliest one."""
        settings = [(row.temperature, row.draws[len(row.ids)] if row.temperature else 0.0) for row in rows]
        temperatures_B, draws_B = torch.from_numpy(np.array(settings).T.copy()).to(self._device)
        greedy_B = temperatures_B == 0
        scale_B_1 = temperatures_B.masked_fill(greedy_B, 1.0).float()[:, None]
        logp_B_V = torch.log_softmax(logits_B_V.float() / scale_B_1, dim=-1)
        if all(temperature == 0 for temperature, _ in settings):
            tokens_B = logp_B_V.argmax(-1)
        elif any(temperature == 0 for temperature, _ in settings):
            tokens_B = torch.where(greedy_B, logp_B_V.argmax(-1), invert(logp_B_V, draws_B))
        else:
            tokens_B = invert(logp_B_V, draws_B)
        chosen_B = logp_B_V.gather(-1, tokens_B[:, None])[:, 0]
        tokens, logprobs = torch.stack([tokens_B.double(), chosen_B.double()]).tolist()  # one wait for the device
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            row.ids.append(int(token))
            row.logprobs.append(logprob)


class ContinuousBatcher:
    """Coroutines' rows in one running `Batch`: each joins when there is room, and continues as soon as it is finished.

    It works in the event loop's own thread, one token of each row at a time; between two tokens the loop turns. So the
    same calls in the same order give the same replies, bit for bit. An instance serves one event loop at a time, any
    number one after another. Nothing is stored while no row waits: weights may change then.
    """

    def __init__(self, model: nn.Module, eos_ids: set[int], max_rows: int, window: int) -> None:
        self._arguments = model, eos_ids, max_rows, window
        self._max_rows = max_rows
        self._waiting: deque[Generation] = deque()
        self._futures: dict[Generation, asyncio.Future[None]] = {}  # of rows that wait or run
        self._server: asyncio.Task[None] | None = None

    async def __call__(self, row: Generation) -> None:
        """Returns once `row` is finished; raises what the model raised while it waited or ran."""
        loop = asyncio.get_running_loop()
        if self._server is None or self._server.done() or self._server.get_loop() is not loop:
            self._waiting.clear()  # left by an event loop that stopped in the middle
            self._futures.clear()
            self._server = loop.create_task(self._serve())
        future = self._futures[row] = loop.create_future()
        self._waiting.append(row)
        await future

    async def _serve(self) -> None:
        try:
            batch = Batch(*self._arguments)
            while True:
                await self._let_others_come()
                self._forget_cancelled(batch)
                if not self._futures:
                    return
                free = min(self._max_rows - len(batch.rows), len(self._waiting))
                finished = batch.join([self._waiting.popleft() for _ in range(free)])
                for row in finished + batch.step():
                    self._futures.pop(row).set_result(None)
        except asyncio.CancelledError:  # by whoever stops the event loop: nobody may wait for ever
            for future in self._futures.values():
                future.cancel()
            raise
        except Exception as error:
            for future in self._futures.values():
                if not future.done():
                    future.set_exception(error)

    def _forget_cancelled(self, batch: Batch) -> None:
        cancelled = {row for row, future in self._futures.items() if future.done()}
        if cancelled:
            batch.drop([row for row in batch.rows if row in cancelled])
            self._waiting = deque(row for row in self._waiting if row not in cancelled)
            self._futures = {row: future for row, future in self._futures.items() if row not in cancelled}

    async def _let_others_come(self) -> None:
        """Lets the event loop turn: once, then until nobody comes for some turns or as many wait as a batch can hold."""
        quiet = 0
        while quiet < _QUIET_TURNS:
            seen = len(self._waiting)
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._waiting) == seen else 0
            if len(self._waiting) >= self._max_rows:
                return


def prefill_groups(
    prompts: Sequence[tuple[int, ...]], budget: int = _PREFILL_TOKENS
) -> Iterator[list[tuple[int, ...]]]:
    """Prompts that are read in one forward: of about the same length, `budget` tokens at most with their padding.

    >>> list(prefill_groups([(1, 2, 3), (4,), (5, 6, 7, 8), (9, 9, 9)], budget=6))
    [[(4,), (1, 2, 3)], [(9, 9, 9)], [(5, 6, 7, 8)]]
    """
    group: list[tuple[int, ...]] = []
    for prompt in sorted(prompts, key=len):
        if group and (len(group) + 1) * len(prompt) > budget:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


def fill_gaps(gone: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Which of the last rows move, and where to, so that those which stay are the first ones.

    Rows 0 and 2 of five leave three: row 2 is dropped with its neighbours, row 0 is taken by row 3 and row 2 by row 4.

    >>> fill_gaps([True, False, True, False, False])
    ([3, 4], [0, 2])
    >>> fill_gaps([False, True])
    ([], [])
    """
    stay = len(gone) - sum(gone)
    sources = [index for index in range(stay, len(gone)) if not gone[index]]
    targets = [index for index in range(stay) if gone[index]]
    return sources, targets


def invert(logp_B_V: Tensor, draws_B: Tensor) -> Tensor:
    """[B] tokens by inversion: the first whose cumulative probability exceeds the row's draw from [0, 1).

    One draw a token keeps a row's randomness apart from its neighbours' and the same on every device.

    >>> invert(torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]).log(), torch.tensor([0.4, 0.6])).tolist()
    [0, 1]
    """
    cumulative = logp_B_V.double().exp().cumsum(-1)
    targets = draws_B.double() * cumulative[:, -1]  # the sum is 1 but for rounding
    tokens = torch.searchsorted(cumulative, targets[:, None], right=True)[:, 0]
    return tokens.clamp(max=logp_B_V.shape[-1] - 1)


@contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode; afterwards each module is in the mode that it was in before."""
    training = [vars(module) for module in modules if module.training]  # nn.Module's own assignment costs microseconds
    for attributes in training:
        attributes["training"] = False
    try:
        yield
    finally:
        for attributes in training:
            attributes["training"] = True
