"""One step of all active sequences, which the host lays out and the device computes.

What the device needs is in `StepInputs`, a tree of tensors. They share one buffer, so that a step costs one copy to the
device, and a CUDA graph can own a buffer that is filled anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from illada.generation.cache import KeyValueCache
from illada.generation.request import Request, RuleCall
from illada.generation.rules import order_noise
from illada.guidance import guide
from illada.model import MaskedDiffusionModel
from illada.ops import linear_sample_tokens, remask
from illada.ops.op_types import LogitBias, TokenSample
from illada.reuse import CachedKeys, FirstProjection


class Guidance(NamedTuple):
    """Classifier-free guidance of a step's rows.

    hidden: int32 [N], which hidden states are those of the unconditional twins (without one: its own).
    scale: float32 [N, 1], w.
    """

    hidden: Tensor
    scale: Tensor


class Filters(NamedTuple):
    """The filters of a step's rows.

    top_p: float32 [N], 1 keeps all. top_k: int32 [N], 0 keeps all.
    """

    top_p: Tensor
    top_k: Tensor


class Order(NamedTuple):
    """The noise and temperature by which a step orders its candidates.

    noise: float32 [N], Gumbel. temperature: float32 [N]; confidence becomes confidence / temperature + noise.
    """

    noise: Tensor
    temperature: Tensor


class Group(NamedTuple):
    """The candidates [N] of the sequences [S] whose rules one call of the ops can serve.

    rows: int32 [N], in the pack. hidden: int32 [N], their hidden states among those that the model is asked for.
    """

    rows: Tensor
    hidden: Tensor
    cu_rows: Tensor
    limits: Tensor
    row_ids: Tensor
    seeds: Tensor
    steps: Tensor
    temperatures: Tensor
    bias: LogitBias | None
    delay: LogitBias | None
    filters: Filters | None
    order: Order | None
    guidance: Guidance | None


class StepInputs(NamedTuple):
    """All tensors of one step; the pack is changed in place."""

    tokens: Tensor
    cu_seqlens: Tensor
    position_ids: Tensor
    cache: CachedKeys | None
    selected_rows: Tensor
    groups: tuple[Group, ...]


class Layout(NamedTuple):
    """The layout of a step, which the host makes.

    arrays: `StepInputs` with arrays for its tensors, but for the cache's keys and values. calls: the rule of each
    group. members: the requests of each group with their candidates' positions, in the order of the group's rows.
    """

    arrays: StepInputs
    calls: tuple[RuleCall, ...]
    members: list[list[tuple[Request, NDArray]]]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of all arrays, in order."""
        shapes: list[tuple[int, ...]] = []
        _map(self.arrays, lambda array: shapes.append(array.shape))
        return tuple(shapes)

    def pack(self, device: torch.device) -> Tensor:
        """Return all arrays in one buffer on the host, uint8.

        For a GPU it is pinned, so that a copy waits for nothing.
        """
        offsets = _offsets(self.arrays)
        buffer = torch.empty(offsets.pop(), dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
        data, starts = buffer.numpy(), iter(offsets)

        def write(array: NDArray) -> None:
            start = next(starts)
            data[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)

        _map(self.arrays, write)
        return buffer

    def unpack(self, buffer: Tensor) -> StepInputs:
        """Return the arrays as tensors that are views of `buffer`, a copy of what `pack` made."""
        starts = iter(_offsets(self.arrays))

        def view(array: NDArray) -> Tensor:
            start = next(starts)
            return buffer[start : start + array.nbytes].view(_DTYPES[array.dtype]).view(array.shape)

        return _map(self.arrays, view)

    def upload(self, device: torch.device) -> StepInputs:
        """Return all tensors, on the device."""
        return self.unpack(self.pack(device).to(device, non_blocking=True))


_ALIGNMENT = 16  # bytes, of each array in the buffer
_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
}  # fmt: skip


def _map(tree: Any, function: Callable[[NDArray], Any]) -> Any:
    """Apply `function` to every array; tensors stay as they are."""
    if isinstance(tree, np.ndarray):
        return function(tree)
    if not isinstance(tree, tuple):
        return tree
    parts = [_map(part, function) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def _offsets(tree: Any) -> list[int]:
    """Return where each array begins in the buffer, and the length of the buffer, in bytes."""
    offsets = [0]
    _map(tree, lambda array: offsets.append(offsets[-1] + -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT))
    return offsets


# ------------------------------------------------------------------------------------------------------------- host


def lay_out(
    model: MaskedDiffusionModel,
    active: Sequence[Request],
    cache: KeyValueCache | None,
    *,
    whole_blocks: bool = False,
    sequences: int = 0,
) -> Layout:
    """Return the pack of all active requests and their unconditional twins.

    Args:
        model: The model; its config gives the shift of the logits and the mask's id.
        active: The requests.
        cache: Their key-value cache; None: none.
        whole_blocks: all rows of a block are candidates, not its masks alone: the shapes are those of the next step.
        sequences: fill the pack up to as many sequences with ones that see nothing and commit nothing.
    """
    shift = model.config.logits_shift
    streams = [(r, twin) for r in active for twin in range(1 + r.guided)]
    if cache is not None:
        streams.sort(key=lambda stream: stream[0].slots[stream[1]])
    candidates = {r.index: r.blocks[r.block] if whole_blocks else r.masked() for r in active}
    tokens, begins, starts = [], [], [0]
    rows: dict[tuple[int, int], NDArray] = {}  # of each stream's candidates, in the pack
    for request, twin in streams:
        begin = request.first_query(shift)
        tokens.append(request.tokens(conditional=not twin)[begin:])
        rows[request.index, twin] = starts[-1] - begin + candidates[request.index]
        begins.append(begin)
        starts.append(starts[-1] + len(tokens[-1]))
    ends = [request.end for request, _ in streams]
    position_ids = [np.arange(a, b) for a, b in zip(begins, ends, strict=True)]
    blanks = max(0, sequences - len(streams))
    for n in range(blanks):  # as long as the others
        tokens.append(np.full(len(tokens[0]), (model.config.mask_token_id + 1) % model.config.vocab_size))
        rows[-1 - n, 0] = starts[-1] + np.arange(len(candidates[active[0].index]))
        position_ids.append(np.arange(len(tokens[0])))
        starts.append(starts[-1] + len(tokens[0]))
    row_starts = np.cumsum([0, *map(len, rows.values())])
    hidden = {stream: start + np.arange(len(rows[stream])) for stream, start in zip(rows, row_starts[:-1], strict=True)}

    by_call: dict[RuleCall, list[tuple[Request, NDArray]]] = {}
    for request in active:
        by_call.setdefault(request.call, []).append((request, candidates[request.index]))
    groups = tuple(_group(call, members, rows, hidden, blanks=blanks) for call, members in by_call.items())
    slots = [request.slots[twin] for request, twin in streams] if cache is not None else []
    arrays: Any = StepInputs(
        _array(np.concatenate(tokens), np.int64),
        _array(starts),
        _array(np.concatenate(position_ids), np.int64),
        None if cache is None else cache.view(slots, begins, ends, blanks=blanks),
        _array(np.concatenate(list(rows.values()))),
        groups,
    )
    return Layout(arrays, tuple(by_call), list(by_call.values()))


def _array(values: NDArray | list, dtype: type = np.int32) -> Any:
    return np.ascontiguousarray(values, dtype=dtype)


def _group(
    call: RuleCall,
    members: list[tuple[Request, NDArray]],
    rows: dict[tuple[int, int], NDArray],
    hidden: dict[tuple[int, int], NDArray],
    *,
    blanks: int,
) -> Group:
    blank_length = len(members[0][1])
    blank_rows = blanks * blank_length
    counts = [len(positions) for _, positions in members] + [blank_length] * blanks

    def of(stream: dict[tuple[int, int], NDArray], twin: int = 0) -> NDArray:
        found = [stream[r.index, twin if r.guided else 0] for r, _ in members]
        return np.concatenate([*found, *(stream[-1 - n, 0] for n in range(blanks))])

    def each(value: Callable[[Request], float], blank: float = 0) -> NDArray:
        return np.repeat([*(value(r) for r, _ in members), *[blank] * blanks], counts)

    bias, delay, filters, order, guidance = _bias(members, blank_rows), None, None, None, None
    if call.delayed:
        width = max(len(r.config.delay_tokens) for r, _ in members)
        ids = [[*r.config.delay_tokens, *[-1] * (width - len(r.config.delay_tokens))] for r, _ in members]
        per_row = np.repeat([*ids, *[[-1] * width] * blanks], counts, axis=0)
        delay = _array(per_row), _array(np.full(per_row.shape, -np.inf), np.float32)
    if call.filtered:
        most = np.iinfo(np.int32).max  # ids that a vocabulary may have
        filters = Filters(
            _array(each(lambda r: r.config.top_p, 1), np.float32), _array(each(lambda r: min(r.config.top_k, most)))
        )
    if call.ordered:
        noise = [order_noise(r.seed, positions, r.forwards) for r, positions in members]
        noise.append(np.zeros(blank_rows, dtype=np.float32))
        order = Order(
            _array(np.concatenate(noise), np.float32), _array(each(lambda r: r.config.alg_temp, 1), np.float32)
        )
    if any(r.guided for r, _ in members):
        guidance = Guidance(_array(of(hidden, 1)), _array(each(lambda r: r.config.cfg_scale)[:, None], np.float32))
    return Group(
        rows=_array(of(rows)),
        hidden=_array(of(hidden)),
        cu_rows=_array(np.cumsum([0, *counts])),
        limits=_array([r.limit() for r, _ in members] + [0] * blanks, np.int32 if call.rule == "quota" else np.float32),
        row_ids=_array(np.concatenate([*(positions for _, positions in members), np.zeros(blank_rows)]), np.int64),
        seeds=_array(each(lambda r: r.seed), np.int64),
        steps=_array(each(lambda r: r.forwards)),
        temperatures=_array(each(lambda r: r.config.temperature), np.float32),
        bias=bias,
        delay=delay,
        filters=filters,
        order=order,
        guidance=guidance,
    )


def _bias(members: list[tuple[Request, NDArray]], blank_rows: int) -> LogitBias | None:
    """Return the logit biases of all rows as [N, K]; -1 is no id.

    K depends on the configs alone, not on the step.
    """
    width = max(len(r.config.forbid_tokens) + (r.config.end_think_boost > 0) for r, _ in members)
    if width == 0:
        return None
    count = sum(len(positions) for _, positions in members) + blank_rows
    ids, values = np.full((count, width), -1, dtype=np.int32), np.zeros((count, width), dtype=np.float32)
    start = 0
    for request, positions in members:
        forbidden, rows = request.config.forbid_tokens, slice(start, start + len(positions))
        ids[rows, : len(forbidden)], values[rows, : len(forbidden)] = forbidden, -np.inf
        if (boosted := request.end_think()) is not None:
            position, token, gain = boosted
            row = start + np.flatnonzero(positions == position)
            ids[row, len(forbidden)], values[row, len(forbidden)] = token, gain
        start += len(positions)
    return _array(ids), _array(values, np.float32)


# ----------------------------------------------------------------------------------------------------------- device


#: A pack of fewer is projected whole: the calls that pick what changed cost more than they save.
_FEW_TOKENS = 256


class FirstProjectionReuse:
    """The first layer's embeddings and projections of the previous step, kept for reuse.

    Tokens that have not changed or moved take theirs from it.

    They are reused only on a CPU, where models have few layers, and without a cache, with which a step has few tokens.
    """

    def __init__(self, model: MaskedDiffusionModel) -> None:
        self._model = model
        self._known: tuple[NDArray, FirstProjection] | None = None

    def of(self, layout: Layout, inputs: StepInputs) -> FirstProjection | None:
        """Return the projections for `run` of these inputs, or None where reuse does not pay.

        This must be called before `run`.
        """
        if inputs.cache is not None or self._model.device.type != "cpu" or len(inputs.tokens) < _FEW_TOKENS:
            return None
        tokens = np.stack([layout.arrays.tokens, layout.arrays.position_ids])
        if self._known is not None and self._known[0].shape == tokens.shape:
            before, first = self._known
            changed = torch.from_numpy(np.flatnonzero((before != tokens).any(axis=0)))
            first.put(changed, self._model.first_layer(inputs.tokens[changed], inputs.position_ids[changed]))
        else:
            first = self._model.first_layer(inputs.tokens, inputs.position_ids)
        self._known = (tokens, first)
        return first


def run(
    model: MaskedDiffusionModel, inputs: StepInputs, calls: Sequence[RuleCall], first: FirstProjection | None = None
) -> Tensor:
    """Run one forward pass and its commits, without a sync.

    Returns the tokens int64 [N] of all groups' candidates.
    """
    hidden = model(
        inputs.tokens, inputs.cu_seqlens, position_ids=inputs.position_ids, cache=inputs.cache,
        rows=inputs.selected_rows, first=first,
    )  # fmt: skip
    for group, call in zip(inputs.groups, calls, strict=True):
        _commit(model, hidden, inputs.tokens, group, call)
    return inputs.tokens[torch.cat([group.rows for group in inputs.groups])]


def _commit(model: MaskedDiffusionModel, hidden: Tensor, tokens: Tensor, group: Group, call: RuleCall) -> None:
    rows: Tensor | None = group.hidden
    if group.guidance is not None:
        hidden = guide(hidden[group.hidden], hidden[group.guidance.hidden], group.guidance.scale)
        rows = None

    def sampled(bias: LogitBias | None) -> TokenSample:
        arguments: Any = {
            "rows": rows, "temperature": group.temperatures, "seed": group.seeds, "step": group.steps,
            "row_ids": group.row_ids, "measure": call.measure, "logit_bias": bias,
            "extras": ("entropy",) if call.rule == "entropy_bound" else (),
        }  # fmt: skip
        if group.filters is not None:
            arguments |= {**group.filters._asdict(), "confidence_at_temperature": True}
        return linear_sample_tokens(hidden, model.head_weight, **arguments)

    sample = sampled(group.bias)
    if group.delay is not None:
        parts = (group.delay,) if group.bias is None else (group.bias, group.delay)
        without = sampled((torch.cat([p[0] for p in parts], dim=1), torch.cat([p[1] for p in parts], dim=1)))
        late = (sample.token[:, None] == group.delay[0]).any(dim=1)
        lowest = torch.finfo(torch.float32).min
        sample = sample._replace(
            confidence=torch.where(late & sample.confidence.isfinite(), lowest, without.confidence),
            entropy=None if without.entropy is None else torch.where(late, -lowest, without.entropy),
        )
    if group.order is not None:
        ordered = sample.confidence / group.order.temperature + group.order.noise
        # What the division overflows is still finite, and committed when its turn comes; NaN's -inf never is.
        bounds = torch.finfo(torch.float32)
        ordered = torch.where(sample.confidence.isfinite(), ordered.clamp(bounds.min, bounds.max), -torch.inf)
        sample = sample._replace(confidence=ordered)
    rule: Any = {call.rule: group.limits}
    remask(
        tokens, group.rows, group.cu_rows, sample, **rule, mask_id=model.config.mask_token_id,
        min_commit=call.min_commit,
    )  # fmt: skip
