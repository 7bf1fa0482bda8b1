"""What `illada convert --hf` puts beside weights: code for transformers that needs no illada, and a model card.

`configuration_illada.py` and `modeling_illada.py` are copied as they are; nothing here imports them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from illada.config import ModelConfig
from illada.text.files import read_if_there
from illada.text.tokenizer_files import load_tokenizer

_CODE = ("configuration_illada.py", "modeling_illada.py")

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


def complete(folder: Path, config: ModelConfig, transformers: str) -> None:
    """Make a folder with weights and config.json one that transformers loads by itself.

    Args:
        folder: is there, with the tokenizer's files.
        config: of the model. transformers: the oldest version that loads it.
    """
    for file in _CODE:
        shutil.copyfile(Path(__file__).with_name(file), folder / file)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    named = _name_special_tokens(folder, config) if has_tokenizer else {}
    unnamed = ", which the tokenizer does not name"
    if not has_tokenizer:
        unnamed = ". **This folder has no tokenizer.json**, which the examples here need"
    card = _CARD.format(
        parameters=config.num_parameters,
        transformers=transformers,
        vocab_size=config.vocab_size,
        mask=config.mask_token_id,
        mask_text=f", `{named['mask_token']}`" if "mask_token" in named else unnamed,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _name_special_tokens(folder: Path, config: ModelConfig) -> dict[str, str]:
    """Name mask, eos, pad and bos in tokenizer_config.json by the ids of the model: {mask_token: text, ...}.

    Those that the model has not stay as the tokenizer has them; an id without a text stays unnamed.
    special_tokens_map.json, which would outweigh them, becomes part of it.
    """
    tokenizer = load_tokenizer(folder)
    ids = {kind: getattr(config, f"{kind}_id") for kind in ("mask_token", "eos_token", "pad_token", "bos_token")}
    texts = {kind: tokenizer.id_to_token(number) for kind, number in ids.items() if number is not None}
    named = {kind: text for kind, text in texts.items() if text is not None}
    old = folder / "special_tokens_map.json"
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    values |= {**read_if_there(old), **read_if_there(folder / "tokenizer_config.json"), **named}
    old.unlink(missing_ok=True)
    text = json.dumps(values, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    return named
