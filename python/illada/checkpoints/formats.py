"""The Hugging Face layouts of the model family: tensor names and config.json keys, in both directions.

Each key of a config is honoured (it sets a field of `ModelConfig`), fixed (it must have the value that is implemented)
or ignored for a stated reason; any other key is an error. No special id of one layout is ever assumed for another.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from illada.config import ModelConfig
from illada.hf_export import OLDEST_TRANSFORMERS
from illada.schema import checked, hints_of, some_of

_IDS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
    "mask_token_id": "mask_token_id",
    "eot_token_id": "eot_token_id",
}

#: The special ids that a model may lack: null says so, where an absent key leaves it open.
_OPTIONAL_IDS = ("bos_token_id", "pad_token_id", "eot_token_id")

#: Keys that any config may have and that say nothing about the computation, with the reason.
_IGNORED = {
    **dict.fromkeys(("architectures", "auto_map", "_name_or_path", "transformers_version"), "names the authors' code"),
    **dict.fromkeys(("torch_dtype", "dtype"), "the tensors have their dtype"),
    **dict.fromkeys(
        ("use_cache", "return_dict", "output_hidden_states", "output_attentions", "_attn_implementation_autoset"),
        "of the authors' API",
    ),
    "tokenizer_sha256": "written by illada; the command line checks it",
}

_DROPOUT = "dropout is for training, where none is applied here"


@dataclass(frozen=True)
class Layout:
    """One layout of config.json and tensor names.

    Attributes:
        model_type: in `ModelConfig`. file_model_type, architecture: in config.json.
        honoured: config key -> field of `ModelConfig`.
        optional: honoured keys that may be absent or null, because then their value is defined.
        fixed: config key -> the values that are implemented.
        explicit: fixed keys that may not be absent, because their default in the authors' code is another value.
        ignored: config key -> why it does not matter here.
        implied: fields of `ModelConfig` that the layout itself decides.
        unnamed_ids: special ids of the published checkpoints that their config.json does not name, and the
            vocabulary sizes (any, where empty) for which they hold.
        modules, layer_modules: our module names -> the file's, outside and inside a layer; the same where absent.
        auto_map: transformers' Auto classes -> those of `illada.hf_export`, whose code goes beside the weights.
    """

    model_type: str
    file_model_type: str
    architecture: str
    honoured: Mapping[str, str]
    optional: frozenset[str]
    fixed: Mapping[str, tuple[Any, ...]]
    ignored: Mapping[str, str]
    modules: Mapping[str, str]
    layer_modules: Mapping[str, str] = field(default_factory=dict)
    explicit: frozenset[str] = frozenset()
    implied: Mapping[str, Any] = field(default_factory=dict)
    unnamed_ids: Mapping[str, int] = field(default_factory=dict)
    unnamed_ids_vocabularies: tuple[int, ...] = ()
    auto_map: Mapping[str, str] = field(default_factory=dict)

    def file_parts(self, parameter: str, config: ModelConfig) -> dict[str, slice]:
        """Return the tensors of a file that make up a parameter of `MaskedDiffusionModel`: name -> its rows.

        One with all rows, but of a fused projection three: files have q_proj, k_proj and v_proj.
        """
        before, fused, after = parameter.partition("qkv_proj")
        if not fused:
            return {self.file_name(parameter): slice(None)}
        bounds = itertools.pairwise(itertools.accumulate(config.qkv_sizes, initial=0))
        names = (self.file_name(f"{before}{which}_proj{after}") for which in "qkv")
        return {name: slice(*rows) for name, rows in zip(names, bounds, strict=True)}

    def file_name(self, parameter: str) -> str:
        """Return the name in a file of a parameter of `MaskedDiffusionModel`, or of a part of its fused projection."""
        module, _, leaf = parameter.rpartition(".")
        if module.startswith("layers."):
            _, index, inner = module.split(".", 2)
            return f"{self.modules['layers']}.{index}.{self.layer_modules.get(inner, inner)}.{leaf}"
        return f"{self.modules[module]}.{leaf}"

    def config_from_file(
        self, values: Mapping[str, Any], *, source: str = "config.json", mask_token_id: int | None = None
    ) -> ModelConfig:
        """Return the `ModelConfig` of a config.json.

        Args:
            values: Content of the file.
            source: Name of the file in errors.
            mask_token_id: Id of the mask, for a checkpoint that does not name it.

        Raises:
            ValueError: options that are unknown, not implemented or absent, with their values; no mask id, or two.
        """
        values = _normalized(values, source)
        refused = [
            f"{key}={values[key]!r:.80} (supported: {', '.join(map(repr, allowed))})"
            for key, allowed in self.fixed.items()
            if key in values and not _is_one_of(values[key], allowed)
        ]
        known = self.honoured.keys() | self.fixed.keys() | self.ignored.keys() | {"model_type"}
        refused += [f"{key:.80}={value!r:.80} (unknown)" for key, value in values.items() if key not in known]
        for key, name in self.honoured.items():
            if values.get(key) is not None and name != "eos_token_id":  # which may be a list
                try:
                    checked(hints_of(ModelConfig)[name], values[key], key)
                except ValueError as error:
                    refused.append(str(error))
        if refused:
            raise ValueError(f"{source}: unsupported options: {some_of(refused, '; ')}")
        needed = (self.honoured.keys() - self.optional) | self.explicit
        if missing := sorted(key for key in needed if values.get(key) is None):
            raise ValueError(f"{source} lacks {', '.join(missing)}, which cannot be guessed")

        given = {name: values[key] for key, name in self.honoured.items() if values.get(key) is not None}
        none = {key for key in _OPTIONAL_IDS if key in values and values[key] is None}
        ids = self._special_ids(given, none, source, mask_token_id)
        given.setdefault("num_key_value_heads", given["num_attention_heads"])
        try:
            return ModelConfig.from_dict({**given, **ids, **self.implied, "model_type": self.model_type})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def config_to_file(self, config: ModelConfig) -> dict[str, Any]:
        """Return config.json of a model, without its dtype.

        Raises:
            NotImplementedError: an architecture that the layout cannot express; the fields are named.
        """
        fields = set(self.honoured.values())
        expected = {"embedding_size": config.vocab_size, "head_dim": config.hidden_size // config.num_attention_heads}
        expected = {name: value for name, value in expected.items() if name not in fields} | dict(self.implied)
        beyond = {name: value for name, value in expected.items() if getattr(config, name) != value}
        if beyond:
            got = ", ".join(f"{name}={getattr(config, name)!r}" for name in beyond)
            has = ", ".join(f"{name}={value!r}" for name, value in beyond.items())
            raise NotImplementedError(f"the checkpoint layout {self.model_type!r} cannot express {got} (it has {has})")
        values = {key: getattr(config, name) for key, name in self.honoured.items()}
        return {
            "architectures": [self.architecture],
            "model_type": self.file_model_type,
            **({"auto_map": dict(self.auto_map), "transformers_version": OLDEST_TRANSFORMERS} if self.auto_map else {}),
            # An id that there is none of is null: the authors' classes put one of their own for a key that is absent.
            **{key: value for key, value in values.items() if value is not None or key in _IDS},
            **{key: allowed[0] for key, allowed in self.fixed.items()},
        }

    def _unnamed(self, vocab_size: int) -> Mapping[str, int]:
        holds = not self.unnamed_ids_vocabularies or vocab_size in self.unnamed_ids_vocabularies
        return self.unnamed_ids if holds else {}

    def _special_ids(
        self, given: dict[str, Any], none: Set[str], source: str, mask_token_id: int | None
    ) -> dict[str, int | list[int] | None]:
        ids = {name: given.pop(name, None) for name in _IDS}
        if isinstance(ids["eos_token_id"], list):  # as transformers writes models that end in one of several ways
            ends = ids["eos_token_id"]
            if not 1 <= len(ends) <= 2 or (len(ends) == 2 and ids["eot_token_id"] not in (None, ends[1])):
                raise ValueError(
                    f"{source}: eos_token_id must be one id, or two (end of text, of turn), got {ends!r:.80}"
                )
            ids["eos_token_id"] = ends[0]
            ids["eot_token_id"] = ends[1] if len(ends) == 2 else ids["eot_token_id"]
        if mask_token_id is not None:
            if ids["mask_token_id"] not in (None, mask_token_id):
                raise ValueError(
                    f"mask_token_id={mask_token_id} was given, but {source} names {ids['mask_token_id']}"
                )  # fmt: skip
            ids["mask_token_id"] = mask_token_id
        for name, token in self._unnamed(given["vocab_size"]).items():
            if ids[name] is None and name not in none:
                ids[name] = token
        if ids["mask_token_id"] is None:
            raise ValueError(
                f"{source} does not name the mask token of this {self.model_type} model; give mask_token_id, an id "
                f"below {given['vocab_size']} that no text contains, or write it down once: "
                "illada convert --mask-token-id N"
            )
        if ids["eos_token_id"] is None:
            raise ValueError(f"{source} lacks eos_token_id, which cannot be guessed")
        return ids


def _normalized(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the values without two keys of newer transformers, whose values cannot be listed in a table.

    They are rope_parameters = {rope_theta, rope_type}, and layer_types, which must be full attention throughout.
    """
    values = dict(values)
    kinds = values.pop("layer_types", None)
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ValueError(
            f"{source}: unsupported options: layer_types={kinds!r:.80} (supported: 'full_attention' in all)"
        )
    if kinds is not None and len(kinds) != values.get("num_hidden_layers"):
        raise ValueError(
            f"{source}: layer_types names {len(kinds)} layers, "
            f"num_hidden_layers is {values.get('num_hidden_layers')!r:.80}"
        )
    rope = values.pop("rope_parameters", None)
    if rope is None:
        return values
    if not isinstance(rope, dict) or set(rope) - {"rope_theta", "rope_type"} or rope.get("rope_type") != "default":
        raise ValueError(
            f"{source}: unsupported options: rope_parameters={rope!r:.80} "
            "(supported: {'rope_theta': a number, 'rope_type': 'default'})"
        )
    if "rope_theta" in rope and values.setdefault("rope_theta", rope["rope_theta"]) != rope["rope_theta"]:
        raise ValueError(f"{source}: rope_theta={values['rope_theta']!r:.80}, but rope_parameters={rope!r:.80}")
    return values


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    # type too: 1 == True, and a config that says 1 for a flag is not one of those that were read for this table
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


_LLAMA_KEYS = {
    **{
        key: key
        for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "rms_norm_eps",
            "tie_word_embeddings", "initializer_range",
        )
    },
    **_IDS,
}  # fmt: skip
_LLAMA_MODULES = {
    "embed_tokens": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm", "lm_head": "lm_head",
}  # fmt: skip
_NO_SCALING = (None, {"rope_type": "default"}, {"type": "default"})
_OPTIONAL = frozenset({*_IDS, "head_dim", "initializer_range"})

_ILLADA = Layout(
    model_type="illada",
    file_model_type="illada",
    architecture="ILLaDAForCausalLM",
    honoured=_LLAMA_KEYS,
    # transformers leaves a tie_word_embeddings out that has its default, true
    optional=_OPTIONAL | {"tie_word_embeddings"},
    fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_scaling": _NO_SCALING,
        "layer_norm_eps": (None,),  # not null: the norms would be LayerNorms
    },
    ignored={
        **_IGNORED,
        **dict.fromkeys(("attention_dropout", "resid_pdrop"), _DROPOUT),
        "pretraining_tp": "slices projections without changing what they compute",
    },
    implied={"qkv_bias": False, "rope_in_fp32": False, "logits_shift": False},
    # 5 is the mask of all its checkpoints, though neither config.json nor the tokenizer's mask_token say so.
    unnamed_ids={"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "mask_token_id": 5},
    modules=_LLAMA_MODULES,
)

_LLADA = Layout(
    model_type="llada",
    file_model_type="llada",
    architecture="LLaDAModelLM",
    honoured={
        "vocab_size": "vocab_size",
        "embedding_size": "embedding_size",
        "d_model": "hidden_size",
        "mlp_hidden_size": "intermediate_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "max_sequence_length": "max_position_embeddings",
        "rope_theta": "rope_theta",
        "rope_full_precision": "rope_in_fp32",
        "rms_norm_eps": "rms_norm_eps",
        "weight_tying": "tie_word_embeddings",
        "include_qkv_bias": "qkv_bias",
        "init_std": "initializer_range",
        **_IDS,
    },
    # null n_kv_heads: as many as heads; null embedding_size: the vocabulary's; include_qkv_bias: false
    optional=frozenset({*_IDS, "n_kv_heads", "embedding_size", "include_qkv_bias", "init_std"}),
    fixed={
        "activation_type": ("silu",),
        "block_type": ("llama",),
        "block_group_size": (1,),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "bias_for_layer_norm": (False, None),
        "attention_layer_norm": (False,),
        "input_emb_norm": (False,),
        "scale_logits": (False,),
        "include_bias": (False,),
        "multi_query_attention": (None, False),
        "rope": (True,),
        "alibi": (False,),
    },
    explicit=frozenset({"activation_type", "block_type", "layer_norm_type", "include_bias", "rope"}),
    ignored={
        **_IGNORED,
        **dict.fromkeys(("attention_dropout", "embedding_dropout", "residual_dropout"), _DROPOUT),
        **dict.fromkeys(("init_device", "init_fn", "init_cutoff_factor"), "of initial weights, which are replaced"),
        "mlp_ratio": "mlp_hidden_size is required, and overrides it",
        "alibi_bias_max": "of alibi, which must be off",
        "attention_layer_norm_with_affine": "of attention_layer_norm, which must be off",
        "flash_attention": "chooses a kernel of the authors'",
        "precision": "of the authors' trainer",
    },
    implied={"logits_shift": False},
    # <|startoftext|> and <|eot_id|>; ordinary tokens, or none, in any other vocabulary
    unnamed_ids={"bos_token_id": 126080, "eot_token_id": 126348},
    unnamed_ids_vocabularies=(126464,),
    modules={
        "embed_tokens": "model.transformer.wte",
        "layers": "model.transformer.blocks",
        "norm": "model.transformer.ln_f",
        "lm_head": "model.transformer.ff_out",
    },
    layer_modules={
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "q_proj",
        "self_attn.k_proj": "k_proj",
        "self_attn.v_proj": "v_proj",
        "self_attn.o_proj": "attn_out",
        "post_attention_layernorm": "ff_norm",
        "mlp.gate_proj": "ff_proj",
        "mlp.up_proj": "up_proj",
        "mlp.down_proj": "ff_out",  # the head's leaf name, one level down
    },
)

_QWEN2 = Layout(
    model_type="qwen2",
    file_model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    honoured=_LLAMA_KEYS,
    optional=_OPTIONAL,
    fixed={"hidden_act": ("silu",), "rope_scaling": _NO_SCALING, "use_sliding_window": (False,), "use_mrope": (False,)},
    ignored={
        **_IGNORED,
        "attention_dropout": _DROPOUT,
        **dict.fromkeys(("sliding_window", "max_window_layers"), "of use_sliding_window, which must be off"),
    },
    # An autoregressive model predicts position i at i - 1, and keeps doing so when its causal mask is lifted.
    implied={"qkv_bias": True, "rope_in_fp32": False, "logits_shift": True},
    modules=_LLAMA_MODULES,
)

_DREAM = dataclasses.replace(_QWEN2, model_type="dream", file_model_type="Dream", architecture="DreamModel")

#: Our own, which has words for every option, and the code of `illada.hf_export`.
_HF = Layout(
    model_type="illada_hf",
    file_model_type="illada_hf",
    architecture="IlladaForMaskedLM",
    honoured={**_LLAMA_KEYS, **{key: key for key in ("embedding_size", "rope_in_fp32", "qkv_bias", "logits_shift")}},
    optional=_OPTIONAL | {"tie_word_embeddings"},
    fixed={},
    ignored=_IGNORED,
    modules=_LLAMA_MODULES,
    auto_map={
        "AutoConfig": "configuration_illada.IlladaConfig",
        "AutoModel": "modeling_illada.IlladaModel",
        "AutoModelForMaskedLM": "modeling_illada.IlladaForMaskedLM",
    },
)

#: The layouts by `ModelConfig.model_type`.
LAYOUTS: dict[str, Layout] = {layout.model_type: layout for layout in (_ILLADA, _LLADA, _DREAM, _QWEN2, _HF)}


def layout_of_file(values: Mapping[str, Any], source: str = "config.json") -> Layout:
    """Return the layout of a config.json, by its model_type.

    ValueError: the model_type is absent, or none of those there are.
    """
    found = values.get("model_type")
    for layout in LAYOUTS.values():
        if found == layout.file_model_type:
            return layout
    supported = ", ".join(repr(layout.file_model_type) for layout in LAYOUTS.values())
    raise ValueError(f"{source}: unsupported options: model_type={found!r:.80} (supported: {supported})")
