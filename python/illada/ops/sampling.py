"""Sampling of a token and its confidence for each masked position, from logits or through the head.

    token = argmax_v (x[v] + temperature * Gumbel(seed, row_id, step, v)),   confidence from softmax(x) alone

One pass over each row of logits finds the softmax, the second largest probability, the entropy and the noisy maximum.
Rows with top_k, top_p or confidence_at_temperature take more passes. The first two leave out ids before the argmax; the
last computes confidence at the temperature and over the kept ids.

The noise is a pure function of its key (Philox4x32-10). A sequence therefore samples the same tokens whatever else is
in the batch. `illada.remask` commits the most confident tokens.

| device          | logits                     | kernels                                               |
|-----------------|----------------------------|-------------------------------------------------------|
| CPU             | float32, bfloat16          | csrc/cpu: AVX-512, AVX2 or baseline, as the CPU has   |
| sm_80 and newer | float32, bfloat16, float16 | csrc/sampling; the head by torch.mm on row chunks     |
| sm_90a          | the same                   | the head fused, for 16 bit without filters: logits    |
|                 |                            | are never written                                     |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from illada.ops import _library as lib
from illada.ops import raw
from illada.ops.capabilities import logits_dtypes
from illada.ops.op_types import MEASURES, LogitBias, TokenSample

Number = TypeVar("Number", int, float)

#: Bytes of logits in one row chunk of `linear_sample_tokens`. CPU: fits the last-level cache for small vocabularies.
_CHUNK_BYTES_CPU = 32 << 20
_CHUNK_BYTES_CUDA = 256 << 20  # 800 rows of 155,136 ids: enough for the GEMM, small beside the head weight

_SAMPLE_ARGUMENTS = (
    "float temperature, int seed, int step, Tensor? temperatures, Tensor? seeds, Tensor? steps, Tensor? row_ids, "
    "Tensor? bias_ids, Tensor? bias_values, int measure, int top_k, float top_p, Tensor? top_ks, Tensor? top_ps, "
    "bool confidence_at_temperature, bool want_entropy, bool want_margin"
)
_SAMPLE_RESULTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
lib.LIBRARY.define(f"sample_tokens(Tensor logits, {_SAMPLE_ARGUMENTS}) -> {_SAMPLE_RESULTS}", tags=lib.TAGS)
lib.LIBRARY.define(
    f"linear_sample_tokens(Tensor hidden, Tensor weight, Tensor? rows, {_SAMPLE_ARGUMENTS}) -> {_SAMPLE_RESULTS}",
    tags=lib.TAGS,
)


class _Settings(NamedTuple):
    """The arguments of `_SAMPLE_ARGUMENTS`, in its order, which is that of `raw.sample_tokens` too.

    Those before `top_k` are also the arguments of `raw.linear_sample_tokens`.
    """

    temperature: float
    seed: int
    step: int
    temperatures: Tensor | None
    seeds: Tensor | None
    steps: Tensor | None
    row_ids: Tensor | None
    bias_ids: Tensor | None
    bias_values: Tensor | None
    measure: int
    top_k: int
    top_p: float
    top_ks: Tensor | None
    top_ps: Tensor | None
    confidence_at_temperature: bool
    want_entropy: bool
    want_margin: bool


_FILTERS_BEGIN, _RESULTS_BEGIN = (_Settings._fields.index(name) for name in ("top_k", "want_entropy"))

# ---------------------------------------------------------------------------------------------------------- kernels


def _allocate(like: Tensor, rows: int, want_entropy: bool, want_margin: bool) -> tuple[Tensor, ...]:
    """Allocate token, confidence, logprob, entropy and margin; the last two are empty unless requested."""
    sizes = (rows, rows, rows, rows if want_entropy else 0, rows if want_margin else 0)
    dtypes = (torch.int64,) + (torch.float32,) * 4
    return tuple(like.new_empty(size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True))


def _contiguous(*arguments: lib.Argument) -> list[lib.Argument]:
    """Return the arguments, with tensors contiguous."""
    return [x.contiguous() if isinstance(x, Tensor) else x for x in arguments]


def _sample_into(out: Sequence[Tensor], logits: Tensor, settings: _Settings) -> None:
    size = raw.sample_tokens_workspace(logits.shape[0], logits.shape[1], logits.device, _may_filter(settings))
    workspace = logits.new_empty(size, dtype=torch.uint8) if size else None
    raw.sample_tokens(TokenSample(*out), logits, *_contiguous(*settings[:_RESULTS_BEGIN]), workspace=workspace)


def _may_filter(s: _Settings) -> bool:
    """Return whether a row may need more than one pass over its logits."""
    return s.top_ks is not None or s.top_ps is not None or s.top_k > 0 or s.top_p < 1 or s.confidence_at_temperature


def _sample(logits: Tensor, *arguments: lib.Argument) -> tuple[Tensor, ...]:
    settings = _Settings(*arguments)
    out = _allocate(logits, logits.shape[0], settings.want_entropy, settings.want_margin)
    _sample_into(out, logits, settings)
    return out


def _sample_at_once(logits: Tensor, s: _Settings) -> tuple[Tensor, ...] | None:
    """Return the results of one native call, or None where it does not take these arguments: tensors of numbers."""
    if any(isinstance(argument, Tensor) for argument in s):
        return None
    results: tuple[Tensor, ...] | None = lib.cpu_calls().sample_tokens(
        *(logits, s.temperature, s.seed, s.step, s.measure, s.top_k, s.top_p, s.confidence_at_temperature),
        *(s.want_entropy, s.want_margin),
    )
    return results


def _sample_cpu(logits: Tensor, *arguments: lib.Argument) -> tuple[Tensor, ...]:
    results = _sample_at_once(logits, _Settings(*arguments))
    return _sample(logits, *arguments) if results is None else results


def _linear_sample_chunks(
    hidden: Tensor, weight: Tensor, rows: Tensor | None, *arguments: lib.Argument
) -> tuple[Tensor, ...]:
    """Sample row chunk by row chunk: torch.mm computes the logits of one, which are sampled before the next."""
    settings = _Settings(*arguments)
    count = len(hidden) if rows is None else len(rows)
    out = _allocate(hidden, count, settings.want_entropy, settings.want_margin)
    if settings.row_ids is None:  # numbered over the whole call, not per chunk
        settings = settings._replace(row_ids=torch.arange(count, device=hidden.device))
    chunk_bytes = _CHUNK_BYTES_CUDA if hidden.is_cuda else _CHUNK_BYTES_CPU
    chunk_rows = max(128, chunk_bytes // (weight.shape[0] * weight.element_size()))
    for start in range(0, count, chunk_rows):
        part = slice(start, min(start + chunk_rows, count))
        selected = hidden[part] if rows is None else hidden.index_select(0, rows[part])
        _sample_into([t[part] for t in out], selected @ weight.t(), _of_rows(settings, part))
    return out


def _of_rows(settings: _Settings, part: slice) -> _Settings:
    """Return the settings of some of the rows. Biases of one dimension are those of every row."""

    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[part]

    ids, values = settings.bias_ids, settings.bias_values
    if ids is not None and ids.dim() == 2:
        ids, values = cut(ids), cut(values)
    return settings._replace(
        temperatures=cut(settings.temperatures),
        seeds=cut(settings.seeds),
        steps=cut(settings.steps),
        row_ids=cut(settings.row_ids),
        bias_ids=ids,
        bias_values=values,
        top_ks=cut(settings.top_ks),
        top_ps=cut(settings.top_ps),
    )


def _linear_sample_cuda(
    hidden: Tensor, weight: Tensor, rows: Tensor | None, *arguments: lib.Argument
) -> tuple[Tensor, ...]:
    rows = None if rows is None else rows.contiguous()
    # The fused kernel sees the logits of each tile once; a filter reads a row several times.
    settings = _Settings(*arguments)
    size = None if _may_filter(settings) else raw.linear_sample_tokens_workspace(hidden, weight, rows)
    if size is None:
        return _linear_sample_chunks(hidden, weight, rows, *arguments)
    out = _allocate(hidden, len(hidden) if rows is None else len(rows), settings.want_entropy, settings.want_margin)
    workspace = hidden.new_empty(size, dtype=torch.uint8)
    raw.linear_sample_tokens(
        TokenSample(*out), hidden, weight, rows, *_contiguous(*settings[:_FILTERS_BEGIN]), workspace=workspace
    )
    return out


# --------------------------------------------------------------------------------------------- fakes and FLOP counts


def _sample_fake(logits: Tensor, *arguments: lib.Argument) -> tuple[Tensor, ...]:
    settings = _Settings(*arguments)
    return _allocate(logits, logits.shape[0], settings.want_entropy, settings.want_margin)


def _linear_sample_fake(
    hidden: Tensor, weight: Tensor, rows: Tensor | None, *arguments: lib.Argument
) -> tuple[Tensor, ...]:
    settings = _Settings(*arguments)
    count = (hidden if rows is None else rows).shape[0]
    return _allocate(hidden, count, settings.want_entropy, settings.want_margin)


lib.implement("sample_tokens", _sample_fake, cpu=_sample_cpu, cuda=_sample)
_call_sample = lib.caller("sample_tokens")
lib.implement("linear_sample_tokens", _linear_sample_fake, cpu=_linear_sample_chunks, cuda=_linear_sample_cuda)


@lib.counts_flops("linear_sample_tokens")
def _linear_sample_flops(
    hidden: Tensor, weight: Tensor, rows: Tensor | None, *args: lib.Argument, out_val: object = None, **kwargs: object
) -> int:
    return 2 * (hidden if rows is None else rows).shape[0] * weight.shape[0] * weight.shape[1]


# --------------------------------------------------------------------------------------------------- public functions


def _first(op: str, like: Tensor) -> tuple[str, Tensor]:
    """Return the name and tensor of the argument that decides the device."""
    return "logits" if op == "sample_tokens" else "hidden", like


def _number_or_rows(
    op: str, name: str, value: Number | Tensor, default: Number, rows: int, dtype: torch.dtype, like: Tensor
) -> tuple[Number, Tensor | None]:
    """Split an argument that is one number for all rows or a tensor [rows] into (number, tensor or None)."""
    if not isinstance(value, Tensor):
        if value is None or isinstance(value, str):
            raise TypeError(f"{op}: {name} must be a number or a tensor of {rows}, got {value!r}")
        return value, None
    lib.check_shape(op, name, value, (rows,))
    lib.check_dtype(op, name, value, (dtype,))
    lib.check_same_device(op, _first(op, like), (name, value))
    return default, value


def _settings(
    op: str,
    rows: int,
    vocab_size: int,
    like: Tensor,
    *,
    temperature: float | Tensor,
    seed: int | Tensor,
    step: int | Tensor,
    row_ids: Tensor | None,
    measure: str,
    logit_bias: LogitBias | None,
    top_k: int | Tensor,
    top_p: float | Tensor,
    confidence_at_temperature: bool,
    extras: Sequence[str],
) -> _Settings:
    """Check the keyword arguments of both samplers and return the settings of their ops."""
    temperature, temperatures = _number_or_rows(op, "temperature", temperature, 0.0, rows, torch.float32, like)
    seed, seeds = _number_or_rows(op, "seed", seed, 0, rows, torch.int64, like)
    step, steps = _number_or_rows(op, "step", step, 0, rows, torch.int32, like)
    top_k, top_ks = _number_or_rows(op, "top_k", top_k, 0, rows, torch.int32, like)
    top_p, top_ps = _number_or_rows(op, "top_p", top_p, 1.0, rows, torch.float32, like)
    if temperatures is None and not 0 <= temperature < float("inf"):
        raise ValueError(f"{op}: temperature must be finite and >= 0, got {temperature}")
    for name, value in (("seed", seed), ("step", step)):
        if not hasattr(value, "__index__"):
            raise TypeError(f"{op}: {name} must be an integer or a tensor of {rows}, got {value!r}")
    if seeds is None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"{op}: seed must fit 64 bits, got {seed}")
    if steps is None and not -(2**31) <= step < 2**31:
        raise ValueError(f"{op}: step must fit 32 bits, got {step}")
    if top_ks is None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0):
        raise ValueError(f"{op}: top_k must be an integer of at least 0, got {top_k!r}")
    if top_ps is None and not 2**-149 <= top_p <= 1:  # a smaller value is 0 in the kernels' float32
        raise ValueError(f"{op}: top_p must be in (0, 1], got {top_p}")
    if row_ids is not None:
        lib.check_shape(op, "row_ids", row_ids, (rows,))
        lib.check_dtype(op, "row_ids", row_ids, (torch.int64,))
    if measure not in MEASURES:
        raise ValueError(f"{op}: measure must be one of {', '.join(MEASURES)}, got {measure!r}")
    if unknown := [name for name in extras if name not in ("entropy", "margin")]:
        raise ValueError(f"{op}: extras may hold 'entropy' and 'margin', got {unknown[0]!r}")
    bias_ids: Tensor | None = None
    bias_values: Tensor | None = None
    if logit_bias is not None:
        bias_ids, bias_values = logit_bias
        shape: tuple[int | str, ...] = ("K",) if bias_ids.dim() == 1 else (rows, "K")
        lib.check_shape(op, "logit_bias ids", bias_ids, shape)
        lib.check_dtype(op, "logit_bias ids", bias_ids, (torch.int32,))
        lib.check_shape(op, "logit_bias values", bias_values, tuple(bias_ids.shape))
        lib.check_dtype(op, "logit_bias values", bias_values, (torch.float32,))
    lib.check_same_device(
        op, _first(op, like), ("row_ids", row_ids), ("logit_bias ids", bias_ids), ("logit_bias values", bias_values)
    )
    if vocab_size < 1:
        raise ValueError(f"{op}: the vocabulary is empty")
    return _Settings(
        float(temperature), seed, step, temperatures, seeds, steps, row_ids, bias_ids, bias_values,
        MEASURES.index(measure), min(top_k, 2**31 - 1), float(top_p), top_ks, top_ps, bool(confidence_at_temperature),
        "entropy" in extras or measure == "entropy", "margin" in extras or measure == "margin",
    )  # fmt: skip


def _as_sample(results: tuple[Tensor, ...], settings: _Settings) -> TokenSample:
    token, confidence, logprob, entropy, margin = results
    return TokenSample(
        token, confidence, logprob, entropy if settings.want_entropy else None, margin if settings.want_margin else None
    )


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float | Tensor = 0.0,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    row_ids: Tensor | None = None,
    measure: str = "probability",
    logit_bias: LogitBias | None = None,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    confidence_at_temperature: bool = False,
    extras: Sequence[str] = (),
) -> TokenSample:
    """Sample one token of each row by the Gumbel-max method, with its confidence.

    Args:
        logits: [N, V], float32, bfloat16 or (on CUDA) float16, any row stride. They are read once without top_k, top_p
            and confidence_at_temperature.
        temperature: Scale of the noise, a number or float32 [N]; 0 is greedy.
        seed: A number or int64 [N]. The same seed, row_id and step always give the same noise.
        step: The sampling step, a number or int32 [N]. It is read as unsigned: -1 is 2^32 - 1, and so on.
        row_ids: int64 [N] in [0, 2^32), default 0 .. N - 1. They distinguish the noise of rows with the same seed; an
            example is the position in the sequence.
        measure: The confidence measure: "probability" p(token), "margin" p1 - p2, "entropy" (negative), or "random".
        logit_bias: (ids int32, values float32), both [N, K] or [K]. The values are added to the logits before all other
            operations. Id -1 is an unused slot; value -inf forbids an id.
        top_k: Sample only among the top_k most likely ids, and ids as likely as the last of them. An integer or
            int32 [N]; 0 keeps all.
        top_p: Sample only among the fewest most likely ids whose probabilities sum to top_p. The probabilities are at
            the temperature, over the ids that top_k kept. Of equally likely ids the lowest come first. A number or
            float32 [N], in (0, 1]; 1 keeps all.
        confidence_at_temperature: Compute all results but `token` from the distribution that is sampled, as in Dream.
            Its logits are divided by the temperature (0: by 1) and filtered. False: use the model's own distribution.
        extras: "entropy" and "margin" fill these fields of the result too.

    Returns:
        TokenSample with N rows. Confidence never includes noise. It includes temperature and filters only with
        `confidence_at_temperature`. Ties go to the lowest id. A row whose softmax has no value (NaN or +inf among its
        logits, or only -inf) gets confidence -inf and is not filtered.

    Raises:
        TypeError: An argument has a wrong type or dtype; the message names it.
        ValueError: An argument has a wrong shape, device or value; the message names it.
        NotImplementedError: No kernel was built for this device.
    """
    op = "sample_tokens"
    fits = lib.plain_call(logits) and lib.cpu_calls().sample_fits(logits)
    if not fits:
        lib.check_shape(op, "logits", logits, ("N", "V"))
        lib.check_dtype(op, "logits", logits, logits_dtypes(logits))
        lib.check_last_contiguous(op, "logits", logits)
    settings = _settings(
        op, logits.shape[0], logits.shape[1], logits, temperature=temperature, seed=seed, step=step, row_ids=row_ids,
        measure=measure, logit_bias=logit_bias, top_k=top_k, top_p=top_p,
        confidence_at_temperature=confidence_at_temperature, extras=extras,
    )  # fmt: skip
    if fits and (results := _sample_at_once(logits, settings)) is not None:
        return _as_sample(results, settings)
    return _as_sample(_call_sample(logits.detach(), *settings), settings)


def linear_sample_tokens(
    hidden: Tensor,
    weight: Tensor,
    *,
    rows: Tensor | None = None,
    temperature: float | Tensor = 0.0,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    row_ids: Tensor | None = None,
    measure: str = "probability",
    logit_bias: LogitBias | None = None,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    confidence_at_temperature: bool = False,
    extras: Sequence[str] = (),
) -> TokenSample:
    """Sample tokens from the logits hidden[rows] @ weight^T without holding all logits in memory.

    With top_k, top_p or confidence_at_temperature, the logits of one row chunk exist in memory on every device.

    Args:
        hidden: [T, C], float32, bfloat16 or (on CUDA) float16, last dimension contiguous.
        weight: [V, C], the head weight, in hidden's dtype, last dimension contiguous.
        rows: int32 or int64 [N], the selected rows of hidden; default all T. Row n of the result belongs to rows[n].
        temperature: As in `sample_tokens`, per selected row.
        seed: As in `sample_tokens`, per selected row.
        step: As in `sample_tokens`, per selected row.
        row_ids: As in `sample_tokens`, per selected row; default 0 .. N - 1.
        measure: As in `sample_tokens`.
        logit_bias: As in `sample_tokens`, per selected row.
        top_k: As in `sample_tokens`, per selected row.
        top_p: As in `sample_tokens`, per selected row.
        confidence_at_temperature: As in `sample_tokens`.
        extras: As in `sample_tokens`.

    Returns:
        TokenSample with N rows, as in `sample_tokens`.

    Raises:
        TypeError: An argument has a wrong type or dtype; the message names it.
        ValueError: An argument has a wrong shape, device, stride or value; the message names it. The values of `rows`
            are checked on a CPU, and on CUDA under ILLADA_DEBUG=1.
        NotImplementedError: No kernel was built for this device.
    """
    op = "linear_sample_tokens"
    lib.check_shape(op, "hidden", hidden, ("T", "C"))
    lib.check_shape(op, "weight", weight, ("V", hidden.shape[1]))
    lib.check_dtype(op, "hidden", hidden, logits_dtypes(hidden))
    lib.check_dtype(op, "weight", weight, (hidden.dtype,))
    lib.check_last_contiguous(op, "hidden", hidden)
    lib.check_last_contiguous(op, "weight", weight)
    if rows is not None:
        lib.check_shape(op, "rows", rows, ("N",))
        lib.check_index(op, "rows", rows)
        if lib.may_read(rows) and len(rows) and not (0 <= int(rows.min()) and int(rows.max()) < len(hidden)):
            raise ValueError(f"{op}: rows must be in [0, {len(hidden)}), got {int(rows.min())} .. {int(rows.max())}")
    lib.check_same_device(op, ("hidden", hidden), ("weight", weight), ("rows", rows))
    count = hidden.shape[0] if rows is None else rows.shape[0]
    settings = _settings(
        op, count, weight.shape[0], hidden, temperature=temperature, seed=seed, step=step, row_ids=row_ids,
        measure=measure, logit_bias=logit_bias, top_k=top_k, top_p=top_p,
        confidence_at_temperature=confidence_at_temperature, extras=extras,
    )  # fmt: skip
    results = torch.ops.illada.linear_sample_tokens(hidden.detach(), weight.detach(), lib.as_int32(rows), *settings)
    return _as_sample(results, settings)
