"""A trainer that calls Liger's fused linear cross-entropy as loss_fn(weight, hidden, target): the loss is exchanged.

python examples/embedding/liger_style.py
"""

import torch
from small import Decoder, batches, compare, count, expected

import illada  # glue

# before: loss_fn = LigerFusedLinearCrossEntropyLoss(ignore_index=-100, reduction="sum")


def loss_fn(weight, hidden, target, normalizer=1.0):  # glue
    return illada.masked_cross_entropy_from_labels(hidden, target, head=weight, normalizer=normalizer)  # glue


def main() -> None:
    model = Decoder()
    want = expected(model, lambda model, tokens: model(tokens))
    model._skip_lm_head = True
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    number = count([labels for _, labels in batches()])
    for tokens, labels in batches():
        loss_fn(model.lm_head.weight, model(tokens).flatten(0, 1), labels.flatten(), number).backward()
    optimizer.step()
    compare(model, want)


if __name__ == "__main__":
    main()
