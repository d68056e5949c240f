"""What an encoder makes of the parts of an image: attention, tokens as colours, and similarity over the map."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

FINE = 7  # positions a side: a map of fewer says little about where things are


def class_attention(encoder: nn.Module, images: Tensor) -> Tensor:
    """How much the class token attends to each patch in the last block of a ViT, as the mean of its heads.

    Args:
        encoder: A ViT with a class token, in eval mode.
        images: Normalised float32 (B, C, S, S).

    Returns:
        (B, h, w), which sum to at most 1: the rest is attention to the class token itself.
    """
    vit = cast(Any, encoder)
    attention = vit.blocks[-1].attn
    seen: list[Tensor] = []
    # The fused kernel never forms the weights; the explicit one hands them to its dropout.
    handle = attention.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    fused, attention.fused_attn = attention.fused_attn, False
    try:
        with torch.inference_mode():
            encoder(images)
    finally:
        attention.fused_attn = fused
        handle.remove()
    weights = seen[0][:, :, 0, vit.num_prefix_tokens :].mean(dim=1)
    return cast(Tensor, weights.unflatten(1, vit.patch_embed.grid_size))


def token_colours(encoder: nn.Module, images: Tensor) -> Tensor:
    """The three main directions in which the patch tokens of these images differ, as red, green and blue.

    Args:
        encoder: A ViT in eval mode.
        images: Normalised float32 (B, C, S, S).

    Returns:
        (B, 3, h, w) in 0..1.
    """
    vit = cast(Any, encoder)
    with torch.inference_mode():
        tokens = vit.forward_features(images)[:, vit.num_prefix_tokens :]
    projected, _ = principal_components(tokens.flatten(0, 1), 3)
    low, high = projected.quantile(0.02, dim=0), projected.quantile(0.98, dim=0)
    colours = ((projected - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colours.view(len(images), *vit.patch_embed.grid_size, 3).permute(0, 3, 1, 2)


def map_similarity(encoder: nn.Module, images: Tensor) -> Tensor:
    """Cosine similarity of each position of a ResNet's map to the mean over the map.

    The map is that of the last stage with at least `FINE` positions a side; of small images that is not the last.

    Args:
        encoder: A ResNet in eval mode.
        images: Normalised float32 (B, C, S, S).

    Returns:
        (B, h, w) in -1..1.
    """
    with torch.inference_mode():
        stages = cast(Any, encoder).forward_intermediates(images, intermediates_only=True)
    fine = [stage for stage in stages if stage.shape[-1] >= FINE]
    found = fine[-1] if fine else stages[0]
    return F.cosine_similarity(found, found.mean(dim=(2, 3), keepdim=True), dim=1)


def principal_components(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Project features on the directions in which they vary most.

    Args:
        features: (n, D), D at least `count`.
        count: How many directions.

    Returns:
        float64 (n, count), each direction turned so that its largest weight is positive; and the share of the
        variance that each holds (count,), 0..1.
    """
    centred = features.double() - features.double().mean(dim=0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)  # in rising order
    directions = directions[:, -count:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    shares = variances[-count:].flip(0).clamp(min=0) / variances.sum().clamp(min=1e-300)
    return centred @ (directions * largest.sign()), shares


def is_vit(encoder: nn.Module) -> bool:
    """Whether it has tokens and attention."""
    return isinstance(encoder, VisionTransformer)
