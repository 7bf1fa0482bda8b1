"""A model that calls flash-attn, run on this library: one import is exchanged.

python examples/embedding/flash_attn_style.py
"""

import torch
from small import Decoder, batches

from illada.integrations.flash_attn import flash_attn_func  # glue; before: from flash_attn import flash_attn_func


def main() -> None:
    plain, model = Decoder(), Decoder(attend=flash_attn_func)
    model.load_state_dict(plain.state_dict())
    for tokens, _ in batches():
        torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-4, atol=1e-5)
    print("the logits are those of scaled_dot_product_attention")


if __name__ == "__main__":
    main()
