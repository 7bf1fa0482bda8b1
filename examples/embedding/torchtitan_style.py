"""A decoder under torchtitan's loss protocol, sharded by FSDP2: only the call of its loss is exchanged.

    torchrun --nproc-per-node 2 examples/embedding/torchtitan_style.py

With `loss=ChunkedLossWrapper.Config()` the trainer of torchtitan 0.3 gives the loss the head, lets the model skip it,
and divides by the labels of all processes; FSDP2 sums the gradients. Here `main` does what the trainer does, so that it
runs without torchtitan too.
"""

from unittest.mock import patch

import torch
import torch.distributed as dist
from small import WORLD, Decoder, batches, compare, count, expected
from torch.distributed.fsdp import FSDPModule, fully_shard

from illada import masked_cross_entropy_from_labels as nll  # glue

try:
    from torchtitan.components.loss import ChunkedLossWrapper
except ImportError:

    class ChunkedLossWrapper:
        """The part of torchtitan's loss that the trainer uses."""

        def set_lm_head(self, lm_head):
            self.lm_head = lm_head


# FSDP2 gathers the head's weight around its forward, whatever that is.
def masked_diffusion_loss(self, pred, labels, global_valid_tokens=1, **_):  # glue
    with patch.object(lm := self.lm_head, "forward", lambda h: nll(h, labels, head=lm.weight, normalizer=1)):  # glue
        return lm(pred) / global_valid_tokens, {}  # glue


ChunkedLossWrapper.__call__ = masked_diffusion_loss  # glue


def main() -> None:
    started = WORLD > 1 and not dist.is_initialized()
    if started:
        dist.init_process_group("gloo")
    model = Decoder()
    want = expected(model, lambda model, tokens: model(tokens))
    if started:  # torchtitan.distributed.fsdp.apply_fsdp_to_decoder
        for part in (model.tok_embeddings, [model.norm, model.lm_head], *model.layers.values(), model):
            fully_shard(part)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other; NCCL does without this line
    loss_fn = ChunkedLossWrapper.__new__(ChunkedLossWrapper)  # from here on what torchtitan.trainer.Trainer does
    loss_fn.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    global_valid_tokens = count([labels for _, labels in batches()])
    for tokens, labels in batches():
        loss_fn(model(tokens), labels, global_valid_tokens)[0].backward()
    optimizer.step()
    compare(model, want)
    if started:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
