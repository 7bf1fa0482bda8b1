"""What the commands that take a checkpoint share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from illada.model import MaskedDiffusionModel
    from illada.tokenizer import Tokenizer


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder, or the newest one of a training run's folder."""
    from illada.train.checkpoint import newest

    folder = Path(path)
    if not (folder / "config.json").is_file() and (found := newest(folder / "checkpoints")) is not None:
        return found
    return folder


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The torch dtype of --dtype; None stays None."""
    import torch

    dtypes = {text: getattr(torch, text) for text in ("bfloat16", "float16", "float32")}
    if name not in (None, *dtypes):
        raise ValueError(f"--dtype must be {', '.join(dtypes)}, got {name!r}")
    return None if name is None else dtypes[name]


def parse_device(name: str | None) -> torch.device:
    """The torch device of --device, default the CPU; ValueError: no such kind, or a GPU that is not here."""
    from illada.devices import find_device

    device = find_device(name or "cpu", "--device")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda (cuda:0, ...), got {name!r}")
    return device


def load(
    path: str | Path,
    tokenizer: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    mask_token_id: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[MaskedDiffusionModel, Tokenizer]:
    """The model of a checkpoint or training run, and its tokenizer (or the given one, which must be the same)."""
    from illada.checkpoint import load_pretrained, read_config
    from illada.data import tokenizer_sha256
    from illada.tokenizer import Tokenizer

    folder = find_checkpoint(path)
    tokenizer_path = Path(tokenizer or folder)
    expected = read_config(folder).get("tokenizer_sha256")
    loaded = Tokenizer.from_pretrained(tokenizer_path, trust_remote_code=trust_remote_code)
    if expected is not None and tokenizer_sha256(tokenizer_path) != expected:
        raise ValueError(f"{tokenizer_path} is not the tokenizer that {folder} was trained with")
    model = load_pretrained(folder, device=device, dtype=dtype, mask_token_id=mask_token_id)
    config = model.config
    loaded.protect(getattr(config, f"{kind}_token_id") for kind in ("mask", "eos", "eot", "bos", "pad"))
    return model, loaded
