"""Search for devices by name, and autocast's dtypes.

Names are checked before torch fails on them far from where they were given.
"""

from __future__ import annotations

import torch


def find_device(device: torch.device | str, name: str = "device") -> torch.device:
    """Return the torch device of a name.

    ValueError, which calls it `name`: a GPU that is not here, or no device at all.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"{name} must be cpu or cuda (cuda:0, ...), got {device!r}") from None
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if (found.index or 0) >= count:
        raise ValueError(
            f"{name} {found}: torch {torch.__version__} finds {count or 'no'} GPU{'s' * (count > 1)} here"
            f"{'' if count else f'; {name} cpu needs none'}"
        )
    return found


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast where it is on for `device`, else None.

    For meta tensors it is always None.
    """
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
