"""varlen_attention on the CPU, on values that break kernels, against float64."""

import pytest
import torch
from adversarial import KINDS
from attention_properties import check, make, run

import illada


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries, keys", [(7, 5), (3, 70), (33, 150)])
def test_values(queries, keys, dtype, generator):
    kinds = list(KINDS)
    tensors, lengths, d_out = make(kinds, queries, keys, 32, dtype, generator)
    check(run(illada.varlen_attention, tensors, lengths, d_out), tensors, lengths, d_out, kinds)
