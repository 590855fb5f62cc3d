"""A tiny configuration of any model type: its class's defaults, shrunk through the field names that types share."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

VOCABULARY = 256
FIRST_SPECIAL = 128
"""Special tokens other than padding, begin and end get ids from here on; texts are drawn from below it."""

SIZES = {
    "hidden_size d_model n_embd embed_dim dim emb_dim embedding_size out_hidden_size text_hidden_size"
    " encoder_hidden_dim encoder_hidden_size decoder_hidden_size backbone_hidden_size vision_hidden_size projection_dim"
    " word_embed_proj_dim feature_size mask_feature_size input_embedding_size output_embedding_size lru_width"
    " projector_hidden_size vision_output_dim output_dim hidden_dim d_hidden n_embed entity_emb_size": 64,
    "num_attention_heads n_head num_heads n_heads attention_heads encoder_attention_heads decoder_attention_heads"
    " num_encoder_attention_heads num_decoder_attention_heads encoder_num_attention_heads decoder_num_attention_heads"
    " swa_num_attention_heads n_attn_heads num_self_attention_heads num_cross_attention_heads": 4,
    "num_key_value_heads swa_num_key_value_heads encoder_num_key_value_heads decoder_num_key_value_heads"
    " num_kv_heads n_kv_heads num_global_key_value_heads num_key_value_groups": 2,
    "head_dim swa_head_dim d_kv attention_head_size qk_nope_head_dim v_head_dim global_head_dim index_head_dim d_head"
    " attention_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim swa_v_head_dim": 16,
    "qk_rope_head_dim rotary_dim": 8,
    "q_lora_rank kv_lora_rank o_lora_rank": 32,
    "intermediate_size moe_intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff d_inner n_inner"
    " ffn_hidden_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size"
    " intermediate_size_mlp dense_intermediate_size decoder_intermediate_size encoder_intermediate_size"
    " moe_shared_expert_intermediate_size dim_feedforward encoder_dim_feedforward decoder_dim_feedforward"
    " feed_forward_size moe_hidden_size prediction_head_size entity_vocab_size additional_vocab_size": 64,
    "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
    "num_experts_per_tok moe_topk moe_k num_selected_experts": 2,
    "n_group topk_group first_k_dense_replace num_dense_layers n_shared_experts num_shared_experts"
    " moe_num_shared_experts": 1,
    "index_n_heads linear_num_key_heads linear_num_value_heads linear_num_heads": 4,
    "index_topk": 16,
    "max_position_embeddings n_positions max_seq_len max_sequence_length": 128,
    "max_source_positions": 160,
    "vocab_size vocab_size_per_layer_input char_vocab_size": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "mamba_chunk_size chunk_size mamba_d_state ssm_state_size": 16,
    "sliding_window sliding_window_size attention_window_size": 16,
    # Chance and masking would let a step leave out a layer.
    "layerdrop encoder_layerdrop decoder_layerdrop mask_time_prob mask_feature_prob drop_path_rate": 0,
}  # fmt: skip
EXACT = {"max_position_embeddings", "n_positions", "vocab_size"}
SHRUNK = {name: value for names, value in SIZES.items() for name in names.split()}
DEPTHS = frozenset(
    {
        "num_hidden_layers",
        "num_layers",
        "n_layer",
        "n_layers",
        "encoder_layers",
        "decoder_layers",
        "num_encoder_layers",
        "num_decoder_layers",
        "depth",
        "decoder_num_hidden_layers",
        "encoder_num_hidden_layers",
        "decoder_num_layers",
        "num_spatial_layers",
        "num_temporal_layers",
        "num_auxiliary_layers",
        "l_layers",
        "x_layers",
        "r_layers",
        "pred_num_hidden_layers",
        "num_self_attends_per_block",
        "text_encoder_num_layers",
        "memory_attention_num_layers",
    }
)
LARGEST_DEPTH = 9
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "blip-2": {"image_token_index": 200},
    "chameleon": {"vocabulary_map": {"<image>": 200}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "cosmos3_edge_text": {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1,
              "n_group": 1, "topk_group": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 3},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "instructblip": {"image_token_index": 200},
    "instructblipvideo": {"video_token_index": 200},
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mimi": {"upsample_groups": 64},
    "ministral": {"head_dim": 16},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32,
                       "indexer_compress_ratio": 4, "ngram_vocab_size_base": 500, "ple_layer_ids": []},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64},
    "reformer": {"axial_pos_embds": False, "is_decoder": False},
    "sam2_hiera_det_model": {"image_size": [256, 256]},
    "step3p7": {"text_config.sliding_window": 16},
    "udop": {"decoder_start_token_id": 0},
    "vjepa2": {"frames_per_clip": 4, "crop_size": 64, "pred_num_hidden_layers": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2},
}  # fmt: skip
"""What a shared rule cannot know: fields without a default, and those that depend on the depth."""


def tiny_config(config: Any, *, widths: bool = True, overrides: dict[str, Any] | None = None, top: bool = True) -> Any:
    """A shrunk copy of a configuration, made by its own class so that derived fields are derived anew.

    Args:
        config: the configuration, with its defaults.
        widths: shrink widths as well; False shrinks depth, vocabulary and lengths alone, for types whose widths
            depend on each other.
        overrides: fields to set, by name; "vision_config.depth" reaches into a part.
        top: whether this is no part of another configuration.
    """
    depth = _depth(config)
    # A copy, as configurations change what they are given.
    overrides = copy.deepcopy({**FAMILIES.get(config.model_type, {}), **(overrides or {})})
    staged = hasattr(config, "depths")  # Widths and heads are lists, one entry a stage, and belong together.
    fields: dict[str, Any] = {}
    special = FIRST_SPECIAL
    for field in dataclasses.fields(config):
        name = field.name
        value = _value(config, name, field.default)
        inner = {key.partition(".")[2]: given for key, given in overrides.items() if key.startswith(f"{name}.")}
        if not field.init or value is None:
            continue
        if _is_config(value):
            fields[name] = tiny_config(value, widths=widths, overrides=inner, top=False)
        elif isinstance(value, (list, tuple)) and value and all(map(_is_config, value)):
            fields[name] = [tiny_config(each, widths=widths, overrides=inner, top=False) for each in value[:1]]
        elif name.endswith(("_token_id", "_token_index", "token_ids", "_patch_id")) or name in ("mask_index",):
            fields[name], special = _token_ids(name, value, special)
        elif field.default is None and not (isinstance(value, str) and not top):
            continue  # Derived from other fields when made.
        elif name in DEPTHS and isinstance(value, int) and not staged:
            fields[name] = min(value, depth)
        elif isinstance(value, (list, tuple)) and name.endswith("depths"):
            fields[name] = type(value)(min(each, 2) for each in value)
        elif isinstance(value, (list, tuple)) and not staged and depth < len(value) == _layers(config):
            fields[name] = value[:depth]
        elif name.endswith("image_size"):
            fields[name] = _image_size(config, value)
        elif name in EXACT and isinstance(value, int):
            fields[name] = SHRUNK[name]
        elif name in SHRUNK and isinstance(value, (int, float)) and ((widths and not staged) or _is_length(name)):
            fields[name] = type(value)(min(value, _key_heads(config, name, value)))
        elif not top and value != field.default:
            fields[name] = value  # What the whole chose for its part.
    fields.update({name: value for name, value in overrides.items() if "." not in name})
    made = type(config)(**fields)
    _fit_rope(made)
    return made


def _value(config: Any, name: str, default: Any = None) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # Configurations refuse fields that differ from layer to layer.
        return default


def _fit_rope(config: Any) -> None:
    """Divide half of the (smaller) rotary width among time, height and width, where positions have all three."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or "mrope_section" not in getattr(config, "ignore_keys_at_rope_validation", ()):
        return
    head = _value(config, "head_dim") or config.hidden_size // config.num_attention_heads
    half = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
    rope["mrope_section"] = [half // 3, half // 3, half - 2 * (half // 3)]


def _is_config(value: Any) -> bool:
    from transformers import PreTrainedConfig

    return isinstance(value, PreTrainedConfig)


def _is_length(name: str) -> bool:
    return "position" in name or "vocab" in name or "layerdrop" in name or name.startswith("mask_") or "seq" in name


def _layers(config: Any) -> int:
    """How many layers there are by default."""
    depths = [_value(config, name) for name in DEPTHS]
    return max((depth for depth in depths if isinstance(depth, int)), default=0)


def _depth(config: Any) -> int:
    """The fewest layers, at least two, that hold every kind of layer there is by default."""
    layers = _layers(config)
    needed = 2
    stacks = [_value(config, name) for name in ("layers_block_type", "layer_types")]
    for value in [*vars(config).values(), *stacks]:
        if isinstance(value, (list, tuple)) and len(value) == layers and all(isinstance(each, str) for each in value):
            needed = max(needed, *(value.index(kind) + 1 for kind in set(value)))
    return min(needed, LARGEST_DEPTH, max(layers, 1))


def _key_heads(config: Any, name: str, value: Any) -> Any:
    """The shrunk size; as many key heads as query heads where the defaults have it so."""
    if "key_value_heads" in name or "kv_heads" in name:
        heads = name.replace("key_value_heads", "attention_heads").replace("kv_heads", "heads")
        if value in (_value(config, heads), _value(config, "num_attention_heads")):
            return SHRUNK["num_attention_heads"]
    return SHRUNK[name]


def _token_ids(name: str, value: Any, special: int) -> tuple[Any, int]:
    if isinstance(value, (list, tuple)):
        return [special + at for at in range(len(value))], special + len(value)
    fixed = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    if name in fixed:
        return fixed[name], special
    return (special, special + 1) if value >= 0 else (value, special)


def _image_size(config: Any, value: Any) -> Any:
    """Eight patches a side; models with stages keep up to 224, as each stage has fewer patches than the one before."""
    patch = getattr(config, "patch_size", None)
    side = 8 * patch if isinstance(patch, int) and not hasattr(config, "depths") and patch > 7 else 224
    shrink = lambda size: min(size, side) if isinstance(size, int) else size  # noqa: E731
    return type(value)(map(shrink, value)) if isinstance(value, (list, tuple)) else shrink(value)
