"""The call of a model whose head makes the loss of masked diffusion in place of logits."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from illada.integrations.transformers import NAME
from illada.model import more_than_weight
from illada.ops import linear_masked_cross_entropy, masked_cross_entropy

#: What honours `cu_seq_lens_q`; with another attention the sequences of a pack would see each other.
_PACKED = (NAME, "flash_attention")


@dataclasses.dataclass
class MaskedBatch:
    """The loss of a batch, flattened.

    rows: the tokens with a weight, masked and learned. Where the host does not know what is learned, all masked ones.
    """

    targets: Tensor  # int64 [T]
    weights: Tensor  # float32 [T], 1 / p where masked and learned
    rows: Tensor  # int32 [N], ascending
    normalizer: Tensor  # float32, 0-dim


@dataclasses.dataclass
class HeadCall:
    """A call of the model, in which `forward` stands in for that of the head's module.

    FSDP2 gathers the head's weight for that module's call, and DDP sees the call of the whole model; so the loss of a
    head that is no more than its weight (`fused`) is made right there, and is what the model returns as logits. Another
    head (bias, adapter, quantised; logits that the model caps or scales) gets the masked rows alone.
    """

    head: Any
    plain: Any  # the head's own forward
    fused: bool
    batch: MaskedBatch
    return_nll: bool

    def result(self, logits: Tensor) -> Tensor:
        """Return the loss of what the model returned as logits; with `return_nll` float32 [T], 0 where unmasked."""
        if self.fused:
            return logits
        batch, rows = self.batch, self.batch.rows.long()
        loss = masked_cross_entropy(
            *(logits[0], batch.targets[rows], batch.weights[rows]),
            normalizer=batch.normalizer, return_nll=self.return_nll,
        )  # fmt: skip
        if isinstance(loss, Tensor):
            return loss
        return batch.weights.new_zeros(len(batch.weights)).index_copy(0, rows, loss[1])


#: The call that is under way. Global, because torch.compile takes all that hangs on a module to be of fixed size.
_CALL: HeadCall | None = None


def _forward(hidden: Tensor) -> Tensor:
    call, hidden = _CALL, hidden.flatten(0, -2)
    assert call is not None
    batch = call.batch
    if not call.fused:
        return call.plain(hidden[batch.rows.long()][None])
    loss = linear_masked_cross_entropy(
        *(hidden, call.head.weight, batch.targets, batch.weights),
        rows=batch.rows, normalizer=batch.normalizer, return_nll=call.return_nll,
    )  # fmt: skip
    return loss if isinstance(loss, Tensor) else loss[1]


@contextlib.contextmanager
def standing_in(call: HeadCall) -> Iterator[None]:
    """Make the loss of `call` where its head is called within the context, in place of logits."""
    global _CALL
    if _CALL is not None:
        raise RuntimeError("another MaskedDiffusionTrainer is in its forward pass: train in processes, not in threads")
    own = call.head.__dict__.get("forward")
    _CALL, call.head.forward = call, _forward
    try:
        yield
    finally:
        _CALL = None
        del call.head.forward
        if own is not None:
            call.head.forward = own


@torch.no_grad()
def examine(model: Any) -> tuple[bool, bool]:
    """Find by short forward passes whether the head's weight alone makes the loss, and whether batches can be packed.

    Raises:
        ValueError: the model has no head, or attends causally.
    """
    head, name = getattr(model, "get_output_embeddings", lambda: None)(), type(model).__name__
    if head is None or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            "model must be an encoder or a decoder with a language-modelling head, such as AutoModelForMaskedLM or "
            f"AutoModelForCausalLM give, got {name}"
        )
    seen: list[tuple[Tensor, Tensor, int]] = []
    hook = head.register_forward_hook(lambda _, args, out: seen.append((args[0], out, out._version)))
    training, embedding = model.training, model.get_input_embeddings().weight
    kind = str(getattr(model.config, "_attn_implementation", None))
    elsewhere = kind not in ("None", "eager", "sdpa", NAME) and not embedding.is_cuda
    packs = kind.startswith(_PACKED)

    def call(ids: list[list[int]], **others: Any) -> Any:
        return model(input_ids=torch.tensor(ids, device=embedding.device) % len(embedding), **others)["logits"]

    try:
        if elsewhere:  # a kernel of GPUs, to which FSDP2 moves the model later
            model.set_attn_implementation("eager")
        model.eval()
        logits = call([[0, 1], [0, 2], [3, 1]])
        if len(seen) != 1 or seen[0][0].shape[:2] != (3, 2):
            raise ValueError(f"model must call its head once, with hidden states [B, L, C]; {name} does not")
        if packs and not elsewhere and not embedding.is_meta:
            # flash-attn tells sequences apart by positions too; ours refuses positions that alone would say so.
            positions = [0, 1] if kind == NAME else [0, 0]
            packs = _separates(call, seen, torch.tensor([positions], device=embedding.device))
    finally:
        if elsewhere:
            model.set_attn_implementation(kind)
        model.train(training)
        hook.remove()
    hidden, out, version = seen[0]
    if not hidden.is_meta:
        future, past = ((hidden[a, i] - hidden[b, i]).float().norm() for a, b, i in ((0, 1, 0), (0, 2, 1)))
        if future < 1e-2 * past:  # rounding, where the first token's state should depend on the second
            raise ValueError(
                f"model must attend in both directions, and {name} is causal: load it with a config in which is_causal "
                "is False"
            )
    untouched = logits is out and out._version == version
    return untouched and more_than_weight(head) is None, packs


def _separates(call: Any, seen: list[tuple[Tensor, Tensor, int]], positions: Tensor) -> bool:
    """Return whether the first of two packed tokens does not see the second.

    A model may ignore the arguments that separate them.
    """
    starts = torch.tensor([0, 1, 2], dtype=torch.int32, device=positions.device)
    spans = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 1, "max_length_k": 1}
    try:
        for second in (1, 2):
            call([[0, second]], position_ids=positions, **spans)
    except TypeError:  # an argument that it does not have
        return False
    return torch.equal(seen[-2][0][0, 0], seen[-1][0][0, 0])
