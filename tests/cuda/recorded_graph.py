"""CUDA graphs of whole functions where a torch dispatch mode (a simulator's) computes torch's own operators.

There a graph records the launches of this library's kernels and no operator of torch. `RecordedGraph` is used as
`torch.cuda.CUDAGraph` is and records both, in order. What such a graph must not hold is an error as on a GPU: an operator
whose result the host waits for, or that reads the host's memory.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.cuda import CUDAGraph
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RecordedGraph(TorchDispatchMode):
    """The kernels between two of torch's operators are captured in a real graph; the operators are called again with
    the same arguments, and their results copied to where the first ones lay. The capture itself computes, too."""

    def __init__(self) -> None:
        super().__init__()
        self._tape: list[Callable[[], object]] = []
        self._kept: list[object] = []  # memory must stay where it was
        self._open: CUDAGraph | None = None
        self._depth = 0

    def capture_begin(self, pool=None, **options) -> None:
        self._pool = pool or torch.cuda.graph_pool_handle()
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)

    def replay(self) -> None:
        for play in self._tape:
            play()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace in ("aten", "prims"):
            return self._operator(func, args, kwargs)
        self._depth += 1
        self._begin()
        try:
            with self:  # for the operators of torch that it calls
                out = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)
        finally:
            self._depth -= 1
            if not self._depth:
                self._end()
        self._kept += [args, kwargs, out]
        return out

    def _operator(self, func, args, kwargs):
        name = func._schema.name.split("::")[1]
        if func.is_view or "empty" in name:  # no kernel
            out = func(*args, **kwargs)
            self._kept.append(out)
            return out
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if _waits(func, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: the host waits for {func}")
        self._end()
        out = func(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(x.is_cuda for x in given) and any(not x.is_cuda for x in results):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func} copies to the host")
        if any(x.is_cuda for x in results) and any(not x.is_cuda and x.ndim > 0 for x in given):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func} copies from the host")
        fresh = [x for x in results if not any(x is y for y in given)]

        def play():
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for old, new in zip(results, again, strict=True):
                if any(old is x for x in fresh):
                    old.copy_(new)

        self._tape.append(play)
        self._kept.append(out)
        if self._depth:
            self._begin()
        return out

    def _begin(self) -> None:
        if self._open is None:
            self._open = CUDAGraph()
            self._open.capture_begin(self._pool)

    def _end(self) -> None:
        if self._open is None:
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")
            self._open.capture_end()
        self._open.replay()
        self._tape.append(self._open.replay)
        self._open = None


def _waits(func, args) -> bool:
    """Return whether the host must know a value on the device to go on; of indices, only booleans are counted."""
    if func._schema.name.startswith(("aten::index", "aten::_index_put", "aten::_unsafe_index")):
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]))
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))
