"""Shared parts of the ops: the torch library, argument checks, and a formula that refuses second derivatives."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import increment_version
from torch.utils.flop_counter import flop_registry, register_flop_formula

from illada._native import native, require_cuda_build


@functools.cache
def cpu_calls() -> ModuleType:
    """Return the native calls of ops on plain CPU tensors (csrc/bindings/cpu_calls.cpp).

    They handle no call, and so return None or False, before torch 2.10: it does not describe tensors to C.
    """
    calls = native().cpu_calls
    calls.use_torch(torch, _ALWAYS)
    return calls


#: An argument that is passed on as it came: its type is that of the op's schema, which torch's dispatcher holds.
Argument: TypeAlias = Any


class Context(FunctionCtx):
    """State of one call between an op's forward and its backward; subclasses declare the attributes of an op.

    It only describes the object that autograd passes, so nothing makes one.
    """

    saved_tensors: tuple[Any, ...]  # Tensor, or None where None was saved
    needs_input_grad: tuple[bool, ...]
    _raw_saved_tensors: tuple[Any, ...]

    if TYPE_CHECKING:  # torch's annotation lacks None

        def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def in_forward_mode() -> bool:
    """Return whether forward-mode AD is on (torch.func.jvp, jacfwd, dual_level), so that tensors may have tangents."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def refuse_tangents(op: str, *arguments: object) -> None:
    """Raise NotImplementedError if an argument has a tangent, which the kernels would silently ignore."""
    if in_forward_mode() and any(
        isinstance(x, Tensor) and x.is_floating_point() and forward_ad.unpack_dual(x).tangent is not None
        for x in arguments
    ):
        raise NotImplementedError(
            f"illada::{op} has no forward-mode derivative (torch.func.jvp, jacfwd, dual tensors); use reverse mode"
        )


class _Library(torch.library.Library):
    """Torch library that registers each op and kernel once.

    A module that is imported again keeps the existing ops, because torch cannot remove ops that are in use.
    """

    def __init__(self, *arguments: str) -> None:
        super().__init__(*arguments)
        self.registered: set[tuple[str, ...]] = set()

    def is_new(self, *names: str) -> bool:
        """Return whether this is the first call for these names."""
        known = names in self.registered
        self.registered.add(names)
        return not known

    def define(self, schema: str, *arguments: Any, **keywords: Any) -> None:
        if self.is_new(schema):
            super().define(schema, *arguments, **keywords)

    def impl(self, op_name: str, fn: Callable, dispatch_key: str = "", **keywords: Any) -> None:
        if self.is_new(op_name, dispatch_key):
            super().impl(op_name, fn, dispatch_key, **keywords)


#: The one library of the namespace. It lives as long as the process, because collecting it would remove its ops.
LIBRARY = getattr(torch.ops.illada, "library", None) or _Library("illada", "DEF")
torch.ops.illada.library = LIBRARY  # type: ignore[attr-defined]

#: Tags of the ops. Kernels use the strides of their tensors, so Inductor must not permute them. torch 2.6 has only the
#: weaker tag, which keeps the order of strides.
TAGS = (getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order), torch.Tag.pt2_compliant_tag)


def debug_checks() -> bool:
    """Return whether checks that read device data, and so synchronise, are on (ILLADA_DEBUG=1)."""
    return os.environ.get("ILLADA_DEBUG", "") not in ("", "0")


def may_read(tensor: Tensor) -> bool:
    """Return whether the host may read the values of `tensor`: without a device sync, or under ILLADA_DEBUG=1."""
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return tensor.device.type == "cpu" or (tensor.device.type != "meta" and debug_checks())


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    """Raise ValueError unless `tensor` has `shape`, in which a letter matches any size."""
    sizes = tensor.shape
    if len(sizes) == len(shape):
        for want, got in zip(shape, sizes, strict=True):
            if type(want) is not str and got != want:  # torch 2.6 cannot compile want.__class__
                break
        else:
            return
    wanted = ", ".join(str(size) for size in shape)
    raise ValueError(f"{op}: {name} must have shape [{wanted}], got {list(sizes)}")


def check_dtype(op: str, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless the dtype of `tensor` is one of `dtypes`."""
    if tensor.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_index(op: str, name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` holds indices: int32, or int64, which `as_int32` converts."""
    check_dtype(op, name, tensor, (torch.int32, torch.int64))


def as_int32(tensor: Tensor | None) -> Tensor | None:
    """Return `tensor` in int32, the dtype of the kernels; int64 is copied."""
    return tensor if tensor is None or tensor.dtype == torch.int32 else tensor.int()


def check_same_device(op: str, first: tuple[str, Tensor], *others: tuple[str, Tensor | None]) -> None:
    """Raise ValueError unless all tensors are on the device of the first."""
    device = first[1].device
    for name, tensor in others:
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but {first[0]} is on {device}; they must agree")


def check_last_contiguous(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the last dimension has stride 1; all other strides are free."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{op}: the last dimension of {name} must be contiguous, got strides {tensor.stride()}; "
            f"pass {name}.contiguous()"
        )


def overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors share memory; False where addresses are unknown, as while tracing."""
    if torch.compiler.is_compiling() or any(type(t) not in (Tensor, torch.nn.Parameter) or t.is_meta for t in (a, b)):
        return False

    def span(t: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size() if t.numel() else t.data_ptr()

    (a_first, a_end), (b_first, b_end) = span(a), span(b)
    return a_first < b_end and b_first < a_end


def check_cumulative(
    op: str, name: str, cumulative: Tensor, total: int | None, *, may_end_before: bool = False
) -> None:
    """Raise ValueError unless `cumulative` starts at 0, ascends, and ends at `total`.

    Nothing is checked where the host may not read the values. Without a total they are the starts of slots, and the
    first one may be anywhere.
    """
    if not may_read(cumulative):
        return
    values = cumulative.tolist()
    if values[0] < 0 or (values[0] != 0 and total is not None):
        raise ValueError(f"{op}: {name} must start at 0{' or later' if total is None else ''}, got {values[0]}")
    for i, (a, b) in enumerate(zip(values[:-1], values[1:], strict=True)):
        if b < a:
            raise ValueError(f"{op}: {name} must ascend, got {a} before {b} at index {i}")
    if total is not None and (values[-1] > total or (values[-1] < total and not may_end_before)):
        raise ValueError(f"{op}: {name} must end at {total}{' or before' if may_end_before else ''}, got {values[-1]}")


def _bits(*keys: str) -> int:
    return sum(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)).raw_repr() for key in keys)


#: Dispatch keys that may act between autograd and a kernel: modes, subclasses, transforms. The two keys that every call
#: has are excluded.
_BETWEEN = torch._C._after_autograd_keyset.raw_repr() & ~_bits("ADInplaceOrView", "BackendSelect")

#: Dispatch keys that a thread adds to every call when no mode, transform or tracer is on.
_ALWAYS = _bits("ADInplaceOrView", "BackendSelect")

#: Kernels of each op, by the call's keys & `_BETWEEN` where nothing replaces the kernels.
_KERNELS: dict[str, dict[int, Callable]] = {}

#: For each op with a derivative, the function that calls its kernel and records it for autograd.
_FORMULAS: dict[str, Callable] = {}


def implement(op: str, fake: Callable, *, cpu: Callable, cuda: Callable | None = None) -> None:
    """Register the kernels and the fake (shape) kernel of a defined op."""
    kernels = {"CPU": cpu}
    if cuda is not None:

        def checked(
            *arguments: Argument,
        ) -> Any:  # not in the public functions, because torch.compile traces through them
            require_cuda_build(op)
            try:
                return cuda(*arguments)
            except RuntimeError as error:
                if type(error) is not RuntimeError or "cudaError" not in str(error):  # not illada::CudaError
                    raise
                raise RuntimeError(f"{error}; called with {describe(arguments)}") from error

        kernels["CUDA"] = checked
    for key, kernel in kernels.items():
        LIBRARY.impl(op, kernel, key)
    _KERNELS[op] = {_bits(key): kernel for key, kernel in kernels.items()}
    if LIBRARY.is_new(op, "fake"):
        torch.library.register_fake(f"illada::{op}", fake, lib=LIBRARY)


def _any_wants_grad(*arguments: object) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


_any_wants_grad = getattr(torch._C, "_any_requires_grad", _any_wants_grad)  # torch 2.6 lacks it


def register_autograd(op: str, backward: Callable, setup_context: Callable | None = None) -> None:
    """Register a derivative like torch.library.register_autograd, at a third of its time per call.

    The op must have no keyword-only arguments. torch's function restores defaults in every call, which takes as long as
    a small attention, and calls the kernel through the dispatcher. Tangents are refused.
    """
    overload = getattr(torch.ops.illada, op).default
    kernels = _KERNELS[op]

    def redispatch(keyset: torch._C.DispatchKeySet, inputs: tuple[Argument, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    def forward(ctx: Context, kernel: Callable | None, keyset: torch._C.DispatchKeySet, *inputs: Argument) -> Any:
        outputs = redispatch(keyset, inputs) if kernel is None else kernel(*inputs)
        if setup_context is not None:
            setup_context(ctx, inputs, outputs)
        return outputs

    def of_inputs(ctx: Context, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *backward(ctx, *gradients)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(of_inputs)}
    formula: Any = type(f"illada_{op}", (torch.autograd.Function,), methods)  # its name is that of the graph node
    apply_plainly = super(torch.autograd.Function, formula).apply  # skips the handling of transforms
    _FORMULAS[op] = apply_plainly

    def differentiable(keyset: torch._C.DispatchKeySet, *inputs: Argument) -> Any:
        if in_forward_mode():
            refuse_tangents(op, *inputs)
        kernel = kernels.get(keyset.raw_repr() & _BETWEEN)
        if torch.is_grad_enabled() and _any_wants_grad(*inputs):
            return (formula.apply if kernel is None else apply_plainly)(kernel, keyset, *inputs)
        return redispatch(keyset, inputs) if kernel is None else kernel(*inputs)

    LIBRARY.impl(op, differentiable, "Autograd", with_keyset=True)


def _watched() -> Callable[[], bool]:
    """Return the function `watched`, which looks up what it calls once, because a call takes only some microseconds."""
    is_compiling, profiled = torch.compiler.is_compiling, torch.autograd._profiler_enabled
    keys_added, modes = torch._C._dispatch_tls_local_include_set, torch._C._len_torch_function_stack

    def watched() -> bool:
        """Return whether a call must go through the dispatcher, whatever its tensors are.

        So it is under torch.compile, export and tracing, modes, transforms, forward-mode AD and a profiler.
        """
        return bool(is_compiling() or keys_added().raw_repr() != _ALWAYS or modes() or profiled() or in_forward_mode())

    return watched


watched = _watched()


def plain_call(tensor: Tensor) -> bool:
    """Return whether a call with this tensor may ask the native checks of `cpu_calls`."""
    return not torch.compiler.is_compiling() and tensor.is_cpu


def direct(op: str, differentiable: int, keep: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the call of the op on plain CPU tensors, which returns the first result alone.

    It is for functions whose native checks passed. Autograd.Function takes time for each input and
    each output, so here it has only those that are needed.

    Args:
        op: Name of the op.
        differentiable: How many of the first inputs may want gradients.
        keep: Function of (ctx, inputs, results) that saves what `backward` needs, as a setup_context. It returns the
            outputs that autograd is told of, of which the first is returned.
        backward: Function of (ctx, gradient of the first result) that returns the gradients of the first inputs.
    """
    overload = getattr(torch.ops.illada, op).default
    kernel = _KERNELS[op][_bits("CPU")]
    grad_enabled, wants_grad, excluded = torch.is_grad_enabled, _any_wants_grad, _autograd_excluded

    def forward(ctx: Context, others: tuple[Any, ...], *tensors: Tensor) -> Any:
        inputs = (*tensors, *others)
        results = kernel(*inputs)
        return keep(ctx, inputs, results)

    def of_tensors(ctx: Context, gradient: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *backward(ctx, gradient)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(of_tensors)}
    function: Any = type(f"illada_{op}", (torch.autograd.Function,), methods)
    formula = super(torch.autograd.Function, function).apply

    def call(*inputs: Argument) -> Any:
        tensors = inputs[:differentiable]
        if not grad_enabled() or not wants_grad(*tensors):
            return kernel(*inputs)[0]
        if excluded(_AUTOGRAD):  # inside the kernel of another op, which autograd records
            return overload(*inputs)[0]
        return formula(inputs[differentiable:], *tensors)[0]

    return call


_autograd_excluded, _AUTOGRAD = (
    torch._C._dispatch_tls_is_dispatch_key_excluded,
    torch._C.DispatchKey.AutogradFunctionality,
)


def _with_memory(argument: Argument) -> Argument:
    """Return the argument; a zero tensor, which has no memory, becomes contiguous zeros.

    Its address, 0, would stand for an argument left out. torch's own zeros for it are one element with strides of 0.
    """
    if isinstance(argument, Tensor) and argument._is_zerotensor():
        return torch.zeros(argument.shape, dtype=argument.dtype, device=argument.device)
    return argument


def caller(op: str) -> Callable:
    """Return a fast call of the op, for functions that have checked that its tensors are on one device.

    It calls the kernel or the formula directly where the dispatcher would do the same. It uses the dispatcher for
    `watched` calls and for subclasses.
    """
    overload = getattr(torch.ops.illada, op).default
    tensors = [i for i, argument in enumerate(overload._schema.arguments) if "Tensor" in str(argument.type)]
    cpu, cuda = (_KERNELS[op].get(_bits(key)) for key in ("CPU", "CUDA"))
    formula, types = _FORMULAS.get(op), (Tensor, torch.nn.Parameter)
    grad_enabled, wants_grad, excluded = torch.is_grad_enabled, _any_wants_grad, _autograd_excluded

    def call(*inputs: Argument) -> Any:
        if watched():
            return overload(*inputs)
        for i in tensors:
            tensor = inputs[i]
            if tensor is not None and (type(tensor) not in types or tensor.is_neg() or tensor._is_zerotensor()):
                return overload(*map(_with_memory, inputs))
        kernel = cpu if inputs[0].is_cpu else cuda if inputs[0].is_cuda else None
        if kernel is None:
            return overload(*inputs)
        if formula is None or not grad_enabled() or not wants_grad(*inputs):
            return kernel(*inputs)
        if excluded(_AUTOGRAD):  # inside the kernel of another op, which autograd records
            return overload(*inputs)
        return formula(kernel, None, *inputs)

    return call


def raise_on_double_backward(op: str) -> None:
    """Register a derivative that raises for a backward op; without one, torch would warn and omit the gradient."""

    def backward(ctx: Context, *grads: Tensor | None) -> NoReturn:
        raise RuntimeError(f"illada::{op} has no second derivative; compute it once, without create_graph=True")

    register_autograd(op, backward)


def describe(arguments: Iterable) -> str:
    """Describe the tensors of a call for an error message: "bfloat16 [4096, 128], int32 [9]"."""
    tensors = (x for x in arguments if isinstance(x, Tensor))
    return ", ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in tensors)


def written(*tensors: Tensor | None) -> None:
    """Tell autograd that a call has written to these tensors."""
    increment_version([tensor for tensor in tensors if tensor is not None])


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `tensor` in `dtype`, itself where it has that dtype; for kernels of ops.

    `Tensor.to` counts as a view, so it would not reach a torch dispatch mode that replaces torch's own CUDA kernels.
    """
    if tensor.dtype == dtype:
        return tensor
    return torch.empty_like(tensor, dtype=dtype).copy_(tensor) if tensor.is_cuda else tensor.to(dtype)


def contiguous(tensor: Tensor) -> Tensor:
    """Return `tensor.contiguous()`, computed for kernels of ops as `cast` does."""
    return (
        tensor
        if tensor.is_contiguous()
        else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    )


def address(tensor: Tensor | None) -> int:
    """Return the address of the first element; 0 for None or an empty tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def stream(device: torch.device) -> int:
    """Return the address of the current CUDA stream of `device`, looked up in every call."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # used by Inductor; private, hence the fallback
    return raw(device.index) if raw is not None else torch.cuda.current_stream(device).cuda_stream


def add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Compute total += a @ b, or with `first` total = a @ b, in the dtype of `total`.

    The product is rounded to the dtype of a and b where torch has no GEMM with a result of total's dtype.
    """
    beta = 0 if first else 1
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif total.dtype == torch.float32 and a.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # torch 2.8
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, beta=beta, out=total)
    elif first:
        total.copy_(torch.mm(a, b))
    else:
        total.add_(torch.mm(a, b))


def counts_flops(op: str) -> Callable[[Callable], Callable]:
    """Register a function of an op's arguments as its FLOP formula."""
    packet = getattr(torch.ops.illada, op)
    return register_flop_formula(packet, get_raw=True) if packet not in flop_registry else lambda formula: formula
