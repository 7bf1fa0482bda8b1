"""CUDA graphs of the steps within a block: one launch instead of some hundred.

With a cache the queries of a step are the block's tokens alone, so the shapes of the steps are equal but for how many
sequences there are: that is rounded up with blank sequences (`bucket`), and a graph is captured for each
(sequences, block length) that comes up more than once.
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
    """Return whether steps can be graphs: on CUDA, with a cache."""
    return cache is not None and model.device.type == "cuda"


def suitable(active: Sequence[Request]) -> bool:
    """Return whether a graph can hold this step: blocks of one length, a cache, one rule, no twins."""
    return (
        all(r.step > 0 and not r.guided and r.config.mode == "var" for r in active)
        and len({r.config.block_length for r in active}) == 1
        and len({r.call for r in active}) == 1
    )


def bucket(sequences: int) -> int:
    """Return the size that a number of sequences is rounded up to: 1, 2, 4 or a multiple of 8.

    This costs little: some hundred tokens take as long as reading the weights.
    """
    return 1 << (sequences - 1).bit_length() if sequences < 8 else -(-sequences // 8) * 8


class GraphedSteps:
    """A runner of steps that replays captured graphs, each with an input buffer of its own.

    Args:
        capture: runs a function once while recording it and returns what runs it again and what it returned.
    """

    def __init__(self, capture: Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]) -> None:
        self._capture = capture
        self._graphs: dict[Any, tuple[Tensor, Callable[[], None], Tensor] | None] = {}

    def run(self, model: MaskedDiffusionModel, layout: step.Layout) -> Tensor:
        """Run as `step.run` does; the result is overwritten by the next step of the same shape."""
        key = (layout.calls, layout.shapes)
        if key not in self._graphs:
            # Launched the first time: libraries load and allocate what they keep, which a capture must not see, and
            # what comes once is not worth one.
            self._graphs[key] = None
            return step.run(model, layout.upload(model.device), layout.calls)
        buffer = layout.pack(model.device)
        if (graph := self._graphs[key]) is None:
            own = buffer.to(model.device, copy=True)
            inputs = layout.unpack(own)
            graph = self._graphs[key] = (own, *self._capture(lambda: step.run(model, inputs, layout.calls)))
        own, replay, out = graph
        own.copy_(buffer, non_blocking=True)
        replay()
        return out


class CudaCapture:
    """A recorder of functions as CUDA graphs that share their memory; no two of them run at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Return a replay of `function`, which has not run yet, and the result that each replay overwrites."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = function()
        return graph.replay, out
