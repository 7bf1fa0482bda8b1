import pytest
import torch

import illada


def test_pack_and_unpack():
    sequences = [torch.arange(3), torch.arange(0), torch.arange(2)]
    packed, cu_seqlens = illada.pack(sequences)
    assert packed.tolist() == [0, 1, 2, 0, 1]
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, 3, 3, 5]
    assert [s.tolist() for s in illada.unpack(packed, cu_seqlens)] == [[0, 1, 2], [], [0, 1]]
    assert illada.pack([[4, 5], [6]])[0].tolist() == [4, 5, 6]


def test_errors():
    with pytest.raises(ValueError, match="sequences is empty"):
        illada.pack([])
    with pytest.raises(ValueError, match="at least one dimension"):
        illada.pack([torch.tensor(1)])
    with pytest.raises(ValueError, match="must run from 0 to 3"):
        illada.unpack(torch.arange(3), torch.tensor([0, 2], dtype=torch.int32))
