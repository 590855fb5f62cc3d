"""Inputs of the right kind for any model, told from the names of its forward's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .shrink import FIRST_SPECIAL

BATCH = 2
TEXT = 48
TARGET = 40
"""Decoder and encoder get different lengths, so that cross-attention shows."""
GRID = 8
"""Patches a side of a picture given as flat patches."""
FRAMES = 320
SAMPLES = 12000


def candidates(model: nn.Module, *, labels: bool) -> Iterator[dict[str, Any]]:
    """Inputs to try in turn until a training step runs, the richest first.

    Args:
        model: the model.
        labels: whether its class computes a loss from labels.
    """
    names = set(inspect.signature(model.forward).parameters)
    texts = list(_texts(model, names, labels)) or [{}]
    others = list(_others(model, names)) or [{}]
    for text in texts:
        for other in others:
            if text or other:
                yield _with_picture_tokens(model, text, other)
    # A model of text and something else that the other cannot be made for still trains on text alone.
    if any(others):
        yield from (text for text in texts if text)


def _texts(model: Any, names: set[str], labels: bool) -> Iterator[dict[str, Any]]:
    highest = min(FIRST_SPECIAL, _config_value(model, ("vocab_size",), FIRST_SPECIAL))
    ids = torch.randint(3, highest, (BATCH, TEXT))
    targets = torch.randint(3, highest, (BATCH, TARGET))
    encoder = {"input_ids": ids} if "input_ids" in names else {}
    if "bbox" in names:
        encoder["bbox"] = torch.zeros(BATCH, TEXT, 8 if model.config.model_type == "bros" else 4, dtype=torch.long)
    if "qformer_input_ids" in names:
        encoder["qformer_input_ids"] = ids
    if "decoder_input_ids" in names:
        if labels and "labels" in names:
            yield {**encoder, "labels": targets}
        yield {**encoder, "decoder_input_ids": targets}
        if encoder:
            yield encoder
    elif encoder:
        if labels and "labels" in names:
            yield {**encoder, "labels": ids}
        yield encoder
        yield {**encoder, "attention_mask": torch.ones_like(ids)}
        yield {**encoder, "labels": ids, "use_cache": False}
        yield {**encoder, "mm_token_type_ids": torch.zeros_like(ids)}


def _others(model: Any, names: set[str]) -> Iterator[dict[str, Any]]:
    if "pixel_values" in names and "grid_thw" not in names:
        yield from _pictures(model, names)
    if "pixel_values_videos" in names and "pixel_values" not in names:
        yield from ({"pixel_values_videos": picture["pixel_values"]} for picture in _pictures(model, names))
    if "grid_thw" in names:
        patches, grid = _patches(model)
        first = next(iter(inspect.signature(model.forward).parameters))
        side = _config_value(model, ("patch_size",), 14)
        for shape in (patches.shape, (len(patches), -1, side, side)):
            yield {first: patches.reshape(shape), "grid_thw": grid}
    if "flattened_patches" in names:
        patch = _config_value(model, ("patch_size",), 16)
        yield {"flattened_patches": torch.cat([torch.ones(BATCH, 64, 2), torch.randn(BATCH, 64, 3 * patch**2)], -1)}
    if "input_features" in names:
        mel = _config_value(model, ("num_mel_bins", "n_mels", "input_feat_per_channel", "feature_projection_input_dim",
                                    "input_feat_size", "input_dim", "mel_bins"), 128)  # fmt: skip
        for shape in ((BATCH, mel, FRAMES), (BATCH, FRAMES, mel)):
            features = torch.randn(shape)
            yield {"input_features": features}
            for mask in ("attention_mask", "input_features_mask", "feature_attention_mask"):
                if mask in names and not ("input_ids" in names and mask == "attention_mask"):
                    yield {"input_features": features, mask: torch.ones(BATCH, FRAMES, dtype=torch.long)}
    if "input_values" in names:
        yield {"input_values": torch.randn(BATCH, SAMPLES)}
        yield {"input_values": torch.randn(BATCH, 1, SAMPLES)}
        length, mel = (_config_value(model, (name,), 64) for name in ("max_length", "num_mel_bins"))
        yield {"input_values": torch.randn(BATCH, length, mel)}
    if "past_values" in names:
        yield from _series(model, names)


def _pictures(model: Any, names: set[str]) -> Iterator[dict[str, Any]]:
    channels = _config_value(model, ("num_channels", "in_channels", "in_chans"), 3)
    side = _config_value(model, ("image_size", "crop_size"), 112)
    high, wide = side[-2:] if isinstance(side, (list, tuple)) else (side, side)
    frames = _config_value(model, ("num_frames", "frames_per_clip"), 4)
    if "image_grid_thw" in names:
        patches, grid = _patches(model)
        side = _config_value(model, ("patch_size",), 14)
        for shape in (patches.shape, (len(patches), -1, side, side), (1, len(patches), -1, side, side)):
            yield {"pixel_values": patches.reshape(shape), "image_grid_thw": grid}
        return
    if "image_attention_mask" in names:
        mask = torch.ones(BATCH, TEXT, 1, dtype=torch.long)
        yield {"pixel_values": torch.randn(BATCH, 1, channels, high, wide), "image_attention_mask": mask}
    if "spatial_shapes" in names:
        shapes = torch.tensor([[GRID, GRID]] * BATCH)
        patches = _patches(model)[0].view(BATCH, GRID * GRID, -1)
        mask = torch.ones(patches.shape[:2], dtype=torch.long)
        yield {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    picture = torch.randn(BATCH, channels, high, wide)
    if "image_sizes" in names:
        sizes = torch.tensor([[high, wide]] * BATCH)
        yield {"pixel_values": picture, "image_sizes": sizes}
        yield {"pixel_values": torch.randn(BATCH, 2, channels, high, wide), "image_sizes": sizes}
    yield {"pixel_values": picture}
    yield {"pixel_values": torch.randn(BATCH, 1, channels, high, wide)}
    yield {"pixel_values": torch.randn(BATCH, frames, channels, high, wide)}
    yield {"pixel_values": torch.randn(BATCH, channels, frames, high, wide)}


def _patches(model: Any) -> tuple[Tensor, Tensor]:
    """Two pictures as flat patches, and how many there are in time, height and width."""
    patch = _config_value(model, ("patch_size",), 14)
    depth = _config_value(model, ("temporal_patch_size",), 1)
    channels = _config_value(model, ("in_channels", "num_channels", "in_chans"), 3)
    return torch.randn(BATCH * GRID * GRID, channels * depth * patch * patch), torch.tensor([[1, GRID, GRID]] * BATCH)


def _with_picture_tokens(model: Any, text: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The text led by as many picture tokens as the model makes of each picture."""
    token = _config_value(model, ("image_token_id", "image_token_index", "image_patch_id"), None)
    if "pixel_values" not in other or "input_ids" not in text or token is None:
        return {**text, **other}
    try:
        with torch.no_grad():
            made = model.get_image_features(**other)
        made = getattr(made, "pooler_output", made)
        flat = [value for value in _tensors(made) if value.is_floating_point()]
        number = sum(value.numel() // value.shape[-1] for value in flat) // BATCH
    except Exception:  # Whatever is missing, the text alone is tried later.
        return {**text, **other}
    ids = torch.cat([torch.full((BATCH, number), token), text["input_ids"]], dim=1)
    result = {**text, **other, "input_ids": ids}
    if "labels" in text and text["labels"] is text["input_ids"]:
        result["labels"] = ids
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        result["mm_token_type_ids"] = (ids == token).long()
    return result


def _series(model: Any, names: set[str]) -> Iterator[dict[str, Any]]:
    config = model.config
    length = _config_value(model, ("context_length",), 48)
    length = length or config.prediction_length
    past = length + max(getattr(config, "lags_sequence", None) or [0])
    channels = _config_value(model, ("num_input_channels",), 0)
    values = torch.randn(BATCH, past, channels) if channels else torch.randn(BATCH, past)
    yield {"past_values": values}


def _config_value(model: Any, names: tuple[str, ...], default: Any) -> Any:
    """The first of these fields that the configuration or a part of it has."""
    from transformers import PreTrainedConfig

    parts = [model.config, *(value for value in vars(model.config).values() if isinstance(value, PreTrainedConfig))]
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def loss_of(output: Any) -> Tensor:
    """A scalar to train on: the model's loss, or the mean square of its first output that has a gradient."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad:
        return loss.mean()
    for value in _tensors(output):
        if value.is_floating_point() and value.requires_grad:
            return value.float().pow(2).mean()
    raise ValueError("no output has a gradient")


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
