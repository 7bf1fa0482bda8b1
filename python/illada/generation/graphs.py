"""CUDA graphs of the steps within a block: one launch instead of some hundred.

With a cache the queries of a step are the block's tokens alone, so the shapes of the steps are equal but for how many
sequences there are: that is rounded up to a power of two with blank sequences, and a graph is captured for each
(sequences, block length) that comes up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from illada.generation import step
from illada.generation.cache import KeyValueCache
from illada.generation.request import Request
from illada.model import MaskedDiffusionModel


def available(model: MaskedDiffusionModel, cache: KeyValueCache | None) -> bool:
    """On CUDA, with a cache."""
    return cache is not None and model.embed_tokens.weight.is_cuda


def suitable(active: Sequence[Request]) -> bool:
    """Can this step be one of a graph? Within blocks of equal length, on a cache, by one rule, without twins."""
    return (
        all(r.step > 0 and not r.guided and r.config.mode == "var" for r in active)
        and len({r.config.block_length for r in active}) == 1
        and len({r.call for r in active}) == 1
    )


def bucket(sequences: int) -> int:
    """The next power of two."""
    return 1 << (sequences - 1).bit_length()


class GraphedSteps:
    """Runs steps by replaying captured graphs, each with its own input tensors.

    Args:
        capture: runs a function once while recording it and returns what runs it again and what it returned.
    """

    def __init__(self, capture: Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]) -> None:
        self._capture = capture
        self._graphs: dict[Any, tuple[step.StepInputs, Callable[[], None], Tensor]] = {}

    def run(self, model: MaskedDiffusionModel, layout: step.Layout) -> Tensor:
        """As `step.run`; the result is overwritten by the next step of the same shape."""
        fresh = _tensors(layout.inputs)
        key = (layout.calls, tuple(t.shape for t in fresh))
        if key not in self._graphs:
            own = _clone(layout.inputs)
            replay, out = self._capture(lambda: step.run(model, own, layout.calls))
            self._graphs[key] = (own, replay, out)
        own, replay, out = self._graphs[key]
        for mine, theirs in zip(_tensors(own), fresh, strict=True):
            if mine is not theirs:  # the cache is shared
                mine.copy_(theirs, non_blocking=True)
        replay()
        return out


def capture_cuda(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record `function` as a CUDA graph, after a run that lets the libraries allocate what they keep."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return graph.replay, out


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [] if tree is None else [t for part in tree for t in _tensors(part)]


def _clone(inputs: step.StepInputs) -> step.StepInputs:
    """A copy of all but the cache's keys and values."""

    def clone(tree: Any) -> Any:
        if tree is None:
            return None
        if isinstance(tree, Tensor):
            return tree.clone()
        parts = [clone(part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)

    cache = inputs.cache
    cloned = clone(inputs._replace(cache=None))
    if cache is None:
        return cloned
    slots = (cache.rows.clone(), cache.cu_seqlens_k.clone(), cache.seqused_k.clone())
    return cloned._replace(cache=cache.__class__(cache.k, cache.v, *slots))
