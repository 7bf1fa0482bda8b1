"""The files that `illada convert --hf` writes beside weights.

They are code for transformers that needs no illada, and a model card.

`configuration_illada.py` and `modeling_illada.py` are copied as they are; nothing here imports them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from illada.config import ModelConfig
from illada.text.files import read_if_there
from illada.text.tokenizer_files import load_tokenizer, read_tokenizer

#: The oldest that loads what has an `auto_map` of ours: it brought bidirectional masks.
OLDEST_TRANSFORMERS = "5.0.0"

_CODE = ("configuration_illada.py", "modeling_illada.py")
_TOKENIZER_CONFIG, _TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"

_CARD = """\
---
library_name: transformers
pipeline_tag: fill-mask
tags: [masked-diffusion, illada]
---

# A masked diffusion language model

A bidirectional Transformer of {parameters:,} parameters that predicts the tokens under its masks. `illada convert --hf`
wrote this folder; FOLDER below is its path, or its name on the Hub.

## Logits and training with transformers

transformers {transformers} or newer loads it; illada is not needed. `modeling_illada.py` is plain torch.

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

model = AutoModelForMaskedLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
logits = model(**tokenizer("some text", return_tensors="pt")).logits  # [1, tokens, {vocab_size}]
```

The mask is token {mask}{mask_text}. Logits are those of each token's own position. `labels` are ids where a token is
predicted and -100 elsewhere; the loss is their mean cross-entropy. Batches may be padded on the left or right, with an
`attention_mask`. `attn_implementation` may be eager, sdpa, flash_attention_2 or flex_attention, and with illada's
kernels `illada`, after `illada.integrations.transformers.register()`.

## Sampling with illada

This folder has no `generate`: text comes from unmasking in several steps, which illada does.

    pip install illada
    illada generate FOLDER --prompt "Once upon a time" --gen-length 64

```python
import illada

model, tokenizer = illada.load_pretrained("FOLDER"), illada.Tokenizer.from_pretrained("FOLDER")
config = illada.GenerationConfig(gen_length=64, block_length=32, steps=32)
print(illada.generate(model, ["Once upon a time"], config, tokenizer=tokenizer)[0].text)
```

`illada convert FOLDER OTHER --model-type illada` (or llada, dream, qwen2) gives the same weights in another layout,
where that can express the architecture.
"""


def files(config: ModelConfig, tokenizer: Path | None) -> dict[str, str]:
    """Return what makes a folder with weights and config.json one that transformers loads by itself: {name: text}.

    Nothing is written: all that may be wrong with the tokenizer is found here.

    Args:
        config: of the model.
        tokenizer: the tokenizer.json, or the folder with the tokenizer's files, that goes into the folder.

    Raises:
        ValueError: damaged files. FileNotFoundError: no such tokenizer.json.
    """
    texts = {name: Path(__file__).with_name(name).read_text(encoding="utf-8") for name in _CODE}
    named: dict[str, str] = {}
    unnamed = ". **This folder has no tokenizer.json**, which the examples here need"
    if tokenizer is not None and (not tokenizer.is_dir() or (tokenizer / "tokenizer.json").is_file()):
        values, named = _name_special_tokens(tokenizer, config)
        texts[_TOKENIZER_CONFIG] = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        unnamed = ", which the tokenizer does not name"
    texts["README.md"] = _CARD.format(
        parameters=config.num_parameters,
        transformers=OLDEST_TRANSFORMERS,
        vocab_size=config.vocab_size,
        mask=config.mask_token_id,
        mask_text=f", `{named['mask_token']}`" if "mask_token" in named else unnamed,
    )
    return texts


def write(folder: Path, texts: dict[str, str]) -> None:
    """Write the texts of `files` into a folder with the tokenizer's files.

    With a tokenizer_config.json among them special_tokens_map.json, which would outweigh it, is removed.
    """
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    if _TOKENIZER_CONFIG in texts:
        (folder / _TOKENS_MAP).unlink(missing_ok=True)


def _name_special_tokens(tokenizer: Path, config: ModelConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of tokenizer_config.json, with those of mask, eos, pad and bos: {mask_token: text, ...}.

    They are named by the ids of the model. Those that the model has not stay as the tokenizer has them; an id without a
    text stays unnamed. special_tokens_map.json becomes part of it.
    """
    folder = tokenizer if tokenizer.is_dir() else None
    own = read_tokenizer(tokenizer) if folder is None else load_tokenizer(folder)
    ids = {kind: getattr(config, f"{kind}_id") for kind in ("mask_token", "eos_token", "pad_token", "bos_token")}
    texts = {kind: own.id_to_token(number) for kind, number in ids.items() if number is not None}
    named = {kind: text for kind, text in texts.items() if text is not None}
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    if folder is not None:
        values |= {**read_if_there(folder / _TOKENS_MAP), **read_if_there(folder / _TOKENIZER_CONFIG)}
    return values | named, named
