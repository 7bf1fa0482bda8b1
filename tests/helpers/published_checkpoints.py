"""Tiny checkpoints with the real key lists of the published ones, written by plain torch and safetensors."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

#: config.json as published, key by key; only sizes and ids are scaled down.
ILLADA = {
    "architectures": ["ILLaDAForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.1,
    "auto_map": {
        "AutoConfig": "configuration_illada.ILLaDAConfig",
        "AutoModel": "modeling_illada.ILLaDAForCausalLM",
        "AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM",
    },
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.009882118,
    "intermediate_size": 112,
    "layer_norm_eps": None,
    "max_position_embeddings": 128,
    "mlp_bias": False,
    "model_type": "illada",
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "resid_pdrop": 0.1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "transformers_version": "4.57.1",
    "vocab_size": 90,
}

LLADA = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 64,
    "embedding_dropout": 0.0,
    "embedding_size": 112,
    "eos_token_id": 81,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 86,
    "max_sequence_length": 128,
    "mlp_hidden_size": 96,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "pad_token_id": 81,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 100,
    "weight_tying": False,
}

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 43,
    "eos_token_id": 43,
    "hidden_act": "silu",
    "hidden_size": 112,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 80,
}

DREAM = {
    **QWEN2,
    "architectures": ["DreamModel"],
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "mask_token_id": 66,
    "model_type": "Dream",
    "pad_token_id": 43,
    "rope_scaling": None,
    "sliding_window": None,
    "transformers_version": "4.46.2",
}

CONFIGS = {"illada": ILLADA, "llada": LLADA, "dream": DREAM, "qwen2": QWEN2}


def shapes(config: dict) -> dict[str, list[int]]:
    """Return name and shape of each tensor in the file, as the authors' code defines them."""
    if config["model_type"] == "llada":
        c, inner, rows = config["d_model"], config["mlp_hidden_size"], config["embedding_size"] or config["vocab_size"]
        kv = (config["n_kv_heads"] or config["n_heads"]) * c // config["n_heads"]
        layer = {
            "attn_norm.weight": [c], "ff_norm.weight": [c], "q_proj.weight": [c, c], "k_proj.weight": [kv, c],
            "v_proj.weight": [kv, c], "attn_out.weight": [c, c], "ff_proj.weight": [inner, c],
            "up_proj.weight": [inner, c], "ff_out.weight": [c, inner],
        }  # fmt: skip
        if config["include_qkv_bias"]:
            layer |= {"q_proj.bias": [c], "k_proj.bias": [kv], "v_proj.bias": [kv]}
        names = {"model.transformer.wte.weight": [rows, c], "model.transformer.ln_f.weight": [c]}
        if not config["weight_tying"]:
            names["model.transformer.ff_out.weight"] = [rows, c]
        prefix, layers = "model.transformer.blocks", config["n_layers"]
    else:
        c, inner, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        kv = config["num_key_value_heads"] * c // config["num_attention_heads"]
        layer = {
            "input_layernorm.weight": [c], "post_attention_layernorm.weight": [c],
            "self_attn.q_proj.weight": [c, c], "self_attn.k_proj.weight": [kv, c],
            "self_attn.v_proj.weight": [kv, c], "self_attn.o_proj.weight": [c, c],
            "mlp.gate_proj.weight": [inner, c], "mlp.up_proj.weight": [inner, c], "mlp.down_proj.weight": [c, inner],
        }  # fmt: skip
        if config["model_type"] != "illada":
            layer |= {"self_attn.q_proj.bias": [c], "self_attn.k_proj.bias": [kv], "self_attn.v_proj.bias": [kv]}
        names = {"model.embed_tokens.weight": [rows, c], "model.norm.weight": [c]}
        if config["model_type"] == "illada" or not config["tie_word_embeddings"]:
            names["lm_head.weight"] = [rows, c]  # iLLaDA's file has it, though it is tied
        prefix, layers = "model.layers", config["num_hidden_layers"]
    return names | {f"{prefix}.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}


def weights(config: dict, dtype: torch.dtype = torch.float32, seed: int = 0, std: float = 0.15) -> dict:
    """Return random tensors for a config: norms around 1, all else around 0, a tied head equal to the embedding."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(shape, generator=generator) * std + ("norm" in name or "ln_f" in name)).to(dtype)
        for name, shape in shapes(config).items()
    }
    if config["model_type"] == "illada" and config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    return tensors


def write(folder: Path, config: dict, tensors: dict, shards: int = 1) -> Path:
    """Write a checkpoint folder, split over some shards as Hugging Face does."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        name, part = f"model-{i + 1:05}-of-{shards:05}.safetensors", list(tensors)[i::shards]
        save_file({key: tensors[key] for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
