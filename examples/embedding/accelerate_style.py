"""A training loop of accelerate, with a transformers model that `patch` makes a masked diffusion model.

    torchrun --nproc-per-node 2 examples/embedding/accelerate_style.py

accelerate divides a loss by the number of micro-batches and DDP averages gradients over the processes, where this loss
wants the sum: the number of labels is divided by both.
"""

import torch
from accelerate import Accelerator
from small import WORLD, batches, compare, count, expected, small_qwen

from illada.integrations import patch  # glue


def main() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = small_qwen()
    want = expected(model, lambda model, tokens: model(input_ids=tokens).logits)
    patch(model)  # glue, before prepare
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    labels_of_all = count([labels for _, labels in batches()])
    number = labels_of_all / (accelerator.num_processes * accelerator.gradient_accumulation_steps)  # glue
    for tokens, labels in batches():
        with accelerator.accumulate(prepared):
            loss = prepared(input_ids=tokens, labels=labels, num_items_in_batch=number).loss  # glue
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert accelerator.num_processes == WORLD
    compare(model, want)
    accelerator.end_training()


if __name__ == "__main__":
    main()
