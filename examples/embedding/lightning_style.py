"""A LightningModule around a transformers model that `patch` makes a masked diffusion model.

    torchrun --nproc-per-node 2 examples/embedding/lightning_style.py

Lightning divides a loss by the number of micro-batches and DDP averages gradients over the processes, where this loss
wants the sum: the number of labels is divided by both.
"""

import lightning
import torch
from small import WORLD, batches, compare, count, expected, small_qwen

from illada.integrations import patch  # glue


class MaskedDiffusion(lightning.LightningModule):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = patch(model)  # glue

    def on_train_batch_start(self, batch, batch_index) -> None:
        if batch_index == 0:  # here a step is an epoch; a loader that knows the number hands it over
            labels_of_all = count([labels for _, labels in batches()])
            self.number = labels_of_all / (self.trainer.world_size * self.trainer.accumulate_grad_batches)  # glue

    def training_step(self, batch, batch_index) -> torch.Tensor:
        tokens, labels = batch
        return self.model(input_ids=tokens, labels=labels, num_items_in_batch=self.number).loss  # glue

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def main() -> None:
    model = small_qwen()
    want = expected(model, lambda model, tokens: model(input_ids=tokens).logits)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=WORLD, strategy="ddp" if WORLD > 1 else "auto", max_epochs=1,
        accumulate_grad_batches=2, barebones=True, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(MaskedDiffusion(model), torch.utils.data.DataLoader(batches(), batch_size=None))
    compare(model, want)


if __name__ == "__main__":
    main()
