"""Search for folders with checkpoints, and loading of them with their tokenizers.

They are found without torch, so that a wrong path is reported at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from illada.model import MaskedDiffusionModel
    from illada.text.tokenizer import Tokenizer


def all_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a training run, oldest first."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def newest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a training run."""
    found = all_checkpoints(folder)
    return found[-1] if found else None


def config_file(folder: Path) -> Path:
    """Return the path of a checkpoint folder's config.json.

    FileNotFoundError: the folder has none.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not a checkpoint (no config.json)")
    return file


def state_file(folder: Path) -> Path:
    """Return the path of a training checkpoint's trainer.json.

    FileNotFoundError: the checkpoint has none.
    """
    file = folder / "trainer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not a training checkpoint (no trainer.json)")
    return file


def find_checkpoint(path: str | Path) -> Path:
    """Return a checkpoint folder, or the newest checkpoint of a training run's folder.

    FileNotFoundError: neither is there.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        folder = newest(folder / "checkpoints") or folder
    config_file(folder)
    return folder


def load(
    path: str | Path,
    tokenizer: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    mask_token_id: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[MaskedDiffusionModel, Tokenizer]:
    """Return the model and tokenizer of a checkpoint or training run.

    A given tokenizer must be the same as the checkpoint's.
    """
    from illada.checkpoints.weights import load_pretrained, read_config
    from illada.text.tokenizer import Tokenizer
    from illada.text.training import tokenizer_sha256

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
