"""The published architectures in plain torch, straight from a file's tensors and its config.json.

Each follows the order of operations and the dtypes of its authors' code, on one batch [B, T] without padding; none
shares code with `illada`. They return (hidden [B, T, C], logits [B, T, V or rows of the embedding]).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def illada(tensors: dict, config: dict, tokens: Tensor, *, rope_in_fp32: bool = False) -> tuple[Tensor, Tensor]:
    """Compute iLLaDA: GQA, cos and sin cast to the dtype of x, tied head."""
    hidden = _llama_like(tensors, config, tokens, rope_in_fp32)
    head = tensors["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return hidden, hidden @ head.T


def qwen2(tensors: dict, config: dict, tokens: Tensor, *, rope_in_fp32: bool = False) -> tuple[Tensor, Tensor]:
    """Compute Qwen2 without its causal mask. Its logits at i are about i + 1, so everything moves by one."""
    hidden, logits = illada(tensors, config, tokens, rope_in_fp32=rope_in_fp32)
    return tuple(torch.cat([x[:, :1], x[:, :-1]], dim=1) for x in (hidden, logits))


#: The same network under another name; its sampler moves the logits by one.
dream = qwen2


def _llama_like(tensors: dict, config: dict, tokens: Tensor, rope_in_fp32: bool) -> Tensor:
    heads, kv_heads, eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    dim = config["hidden_size"] // heads
    batch, length = tokens.shape

    def project(x, name, count):
        return F.linear(x, tensors[name + ".weight"], tensors.get(name + ".bias")).view(batch, length, count, dim)

    def norm(x, weight):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return tensors[weight] * wide.to(x.dtype)

    x = tensors["model.embed_tokens.weight"][tokens]
    inverse = 1.0 / config["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
    angles = torch.outer(torch.arange(length).float(), inverse)
    angles = torch.cat((angles, angles), dim=-1)
    kind = torch.float32 if rope_in_fp32 else x.dtype
    cos, sin = angles.cos().to(kind), angles.sin().to(kind)

    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm.weight")
        q = project(h, at + "self_attn.q_proj", heads).transpose(1, 2)
        k = project(h, at + "self_attn.k_proj", kv_heads).transpose(1, 2)
        v = project(h, at + "self_attn.v_proj", kv_heads).transpose(1, 2)
        q, k = ((y * cos + _rotate_half(y) * sin).to(x.dtype) for y in (q, k))
        k, v = (y.repeat_interleave(heads // kv_heads, dim=1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1)
        x = x + F.linear(y, tensors[at + "self_attn.o_proj.weight"])
        h = norm(x, at + "post_attention_layernorm.weight")
        gate, up = (F.linear(h, tensors[f"{at}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        x = x + F.linear(F.silu(gate) * up, tensors[at + "mlp.down_proj.weight"])
    return norm(x, "model.norm.weight")


def llada(tensors: dict, config: dict, tokens: Tensor, *, rope_in_fp32: bool | None = None) -> tuple[Tensor, Tensor]:
    """Compute LLaDA: q and k rotated in float32 with rope_full_precision; embedding and head exceed the vocabulary."""
    width, heads = config["d_model"], config["n_heads"]
    kv_heads, dim = config["n_kv_heads"] or heads, width // heads
    batch, length = tokens.shape
    wide_rope = config["rope_full_precision"] if rope_in_fp32 is None else rope_in_fp32

    def norm(x, weight):
        y = x.float()
        y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + config["rms_norm_eps"])
        return y.to(x.dtype) * tensors[weight]

    positions = torch.arange(length, dtype=torch.float)
    inverse = 1.0 / config["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)
    angles = torch.einsum("i,j->ij", positions, inverse).repeat(1, 2)

    def rope(x):
        y = x.float() if wide_rope else x
        return (y * angles.cos().type_as(y) + _rotate_half(y) * angles.sin().type_as(y)).type_as(x)

    x = F.embedding(tokens, tensors["model.transformer.wte.weight"])
    for i in range(config["n_layers"]):
        block = {
            name.split(".", 4)[4]: t for name, t in tensors.items() if name.startswith(f"model.transformer.blocks.{i}.")
        }
        h = norm(x, f"model.transformer.blocks.{i}.attn_norm.weight")
        q, k, v = (
            F.linear(h, block[f"{name}_proj.weight"], block.get(f"{name}_proj.bias"))
            .view(batch, length, n, dim)
            .transpose(1, 2)
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = rope(q), rope(k)
        if kv_heads != heads:
            k, v = (y.repeat_interleave(heads // kv_heads, dim=1) for y in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=False)
        x = x + F.linear(out.transpose(1, 2).reshape(batch, length, width), block["attn_out.weight"])
        h = norm(x, f"model.transformer.blocks.{i}.ff_norm.weight")
        h = F.silu(F.linear(h, block["ff_proj.weight"])) * F.linear(h, block["up_proj.weight"])
        x = x + F.linear(h, block["ff_out.weight"])
    hidden = norm(x, "model.transformer.ln_f.weight")
    head = "wte" if config["weight_tying"] else "ff_out"
    return hidden, F.linear(hidden, tensors[f"model.transformer.{head}.weight"])


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


TWINS = {"illada": illada, "llada": llada, "dream": dream, "qwen2": qwen2}
