"""MAE (He et al. 2022): remove part of an image, and predict it from the rest."""

import math
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from .augment import Draws, crop_resize, in_blocks, random_boxes
from .data import channel_statistics, normalise
from .encoders import (
    feature_dim,
    fix_position_embedding,
    resolve_patch_size,
    sincos_position_embedding,
)

if TYPE_CHECKING:
    from .recipes import MAE


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, C, S, S) into patches (B, N, p * p * C), row by row; in a patch, channels come last."""
    batch, channels, size, _ = images.shape
    side = size // patch_size
    grid = images.reshape(batch, channels, side, patch_size, side, patch_size)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, channels: int) -> Tensor:
    """Put patches (B, N, p * p * C) together into images (B, C, S, S): the inverse of `patchify`."""
    side = math.isqrt(patches.shape[1])
    grid = patches.reshape(len(patches), side, side, patch_size, patch_size, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def kept_count(total: int, mask_ratio: float) -> int:
    """How many of `total` units stay when the fraction `mask_ratio` is removed; at least one of each kind."""
    # The small amount undoes binary rounding: 100 * (1 - 0.9) is 9.999999999999998.
    return min(max(1, math.floor(total * (1 - mask_ratio) + 1e-6)), total - 1)


def random_mask(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Choose what to remove: the units with the largest noise (He et al. 2022, section 3, "Masking").

    Args:
        noise: (B, N) random numbers.
        mask_ratio: Fraction that is removed.

    Returns:
        Indices of the kept units (B, N_keep) with N_keep of `kept_count`, and the float32 mask
        (B, N): 1 where removed, 0 where kept.
    """
    keep = noise.argsort(dim=1)[:, : kept_count(noise.shape[1], mask_ratio)]
    return keep, torch.ones_like(noise).scatter_(1, keep, 0.0)


def view_and_noise(recipe: "MAE", images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """One view of each image, and the noise that decides what is removed.

    Args:
        recipe: The strengths of the augmentations, and the unit of the mask.
        images: uint8 (B, C, H, W).
        draws: Source of random numbers.

    Returns:
        Normalised float32 (B, C, S, S), and uniform float32 (B, N), one number a patch or pixel.
    """
    height, width = images.shape[-2:]
    boxes = random_boxes(draws, height, width, scale=recipe.crop_scale)
    flips = draws.chance(recipe.flip)
    view = torch.empty(*images.shape[:2], recipe.image_size, recipe.image_size, device=images.device)
    statistics = channel_statistics(recipe.channels)
    for rows in in_blocks(view):
        part = crop_resize(images[rows], boxes[rows], flips[rows], size=recipe.image_size, interpolation="bicubic")
        view[rows] = normalise(part, *statistics)
    units = (recipe.image_size // mask_unit_size(recipe)) ** 2
    noise = draws.shared(units).expand(len(view), -1) if recipe.shared_mask else draws.uniform(units)
    return view, noise


def mask_unit_size(recipe: "MAE") -> int:
    """Side of what is masked as one, pixels: a patch, or a single pixel."""
    return 1 if recipe.mask_unit == "pixel" else resolve_patch_size(recipe.image_size, recipe.patch_size)


def normalise_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give each patch (B, N, P) mean 0 and variance 1 (He et al. 2022, section 3, "Reconstruction target").

    Returns:
        The normalised patches, and the mean and the standard deviation (B, N, 1) that undo it.
    """
    mean, variance = patches.mean(dim=2, keepdim=True), patches.var(dim=2, keepdim=True)
    std = (variance + 1e-6).sqrt()
    return (patches - mean) / std, mean, std


class MAEModel(nn.Module):
    """An encoder, a decoder, and the mean squared error of the predicted pixels.

    Args:
        encoder: A timm module.
        head: The decoder.
        patch_size: Side of what is masked as one, pixels.
        mask_ratio: Fraction that is removed.
        norm_pix: Predict pixels normalised within their patch.
        loss_on_all: Count kept patches in the loss too.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        *,
        patch_size: int,
        mask_ratio: float,
        norm_pix: bool,
        loss_on_all: bool,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.patch_size = patch_size
        self.mask_ratio = mask_ratio
        self.norm_pix = norm_pix
        self.loss_on_all = loss_on_all

    def predict(self, images: Tensor, keep: Tensor, mask: Tensor) -> Tensor:
        """Predict every patch (B, N, p * p * C) of images (B, C, S, S) from the kept ones."""
        raise NotImplementedError

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of normalised images (B, C, S, S) masked by noise (B, N); there are no further metrics."""
        keep, mask = random_mask(noise, self.mask_ratio)
        prediction = self.predict(images, keep, mask).float()
        target = patchify(images, self.patch_size)
        if self.norm_pix:
            target = normalise_patches(target)[0]
        error = (prediction - target).square().mean(dim=2)
        if self.loss_on_all:
            return error.mean(), {}
        return (error * mask).sum() / mask.sum(), {}

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Mask and predict images (B, C, S, S).

        Returns:
            The images with zeros (the mean colour) where removed, and the images with the prediction there.
        """
        keep, mask = random_mask(noise, self.mask_ratio)
        prediction = self.predict(images, keep, mask).float()
        patches = patchify(images, self.patch_size)
        if self.norm_pix:
            # Only the true patch knows its own mean and contrast: the prediction is shown in terms of them.
            _, mean, std = normalise_patches(patches)
            prediction = prediction * std + mean
        removed = mask[:, :, None]
        channels = images.shape[1]
        masked = unpatchify(patches * (1 - removed), self.patch_size, channels)
        return masked, unpatchify(torch.lerp(patches, prediction, removed), self.patch_size, channels)


class KeepTokens(nn.Module):
    """Stands at timm's `patch_drop`: drops the masked patches while `keep` is set, and otherwise nothing."""

    keep: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Keep the class token and the chosen patches of (B, 1 + N, D)."""
        if self.keep is None:
            return tokens
        index = self.keep[:, :, None].expand(-1, -1, tokens.shape[2])
        return torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, index)], dim=1)


class TransformerDecoder(nn.Module):
    """MAE's decoder: mask tokens join the encoded ones, and a light transformer predicts the pixels.

    Args:
        width: Of the encoder.
        grid: Patches along a side.
        pixels: Numbers in a patch, p * p * C.
        dim: Width of the decoder.
        depth: Its blocks.
        heads: Its attention heads.
    """

    def __init__(self, *, width: int, grid: int, pixels: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("position", sincos_position_embedding(dim, grid, prefix_tokens=1), persistent=False)
        self.blocks = nn.Sequential(*[Block(dim, heads, qkv_bias=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.pixels = nn.Linear(dim, pixels)

    def forward(self, tokens: Tensor, keep: Tensor, total: int) -> Tensor:
        """Predict all patches from the encoded ones.

        Args:
            tokens: (B, 1 + N_keep, width), the class token first.
            keep: (B, N_keep) where the tokens stood.
            total: N.

        Returns:
            (B, N, pixels).
        """
        x = self.embed(tokens)
        index = keep[:, :, None].expand(-1, -1, x.shape[2])
        patches = self.mask_token.to(x.dtype).expand(len(x), total, -1).scatter(1, index, x[:, 1:])
        x = torch.cat([x[:, :1], patches], dim=1) + cast(Tensor, self.position)
        return cast(Tensor, self.pixels(self.norm(self.blocks(x))[:, 1:]))


class ViTMAE(MAEModel):
    """MAE as published: a ViT that sees the kept patches alone."""

    def __init__(self, encoder: VisionTransformer, head: TransformerDecoder, **settings: Any) -> None:
        super().__init__(encoder, head, **settings)
        self.drop = KeepTokens()
        encoder.patch_drop = self.drop  # type: ignore[assignment]  # timm's own type for this place
        fix_position_embedding(encoder)
        self.apply(_init_linear)
        nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(cast(Tensor, encoder.cls_token), std=0.02)
        nn.init.normal_(head.mask_token, std=0.02)

    def predict(self, images: Tensor, keep: Tensor, mask: Tensor) -> Tensor:
        """Encode the kept patches, decode all of them."""
        self.drop.keep = keep
        try:
            tokens = cast(VisionTransformer, self.encoder).forward_features(images)
        finally:
            self.drop.keep = None
        return cast(Tensor, self.head(tokens, keep, mask.shape[1]))


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class ConvDecoder(nn.Sequential):
    """Four transposed convolutions, each doubling the map, from (B, width, h, w) to (B, C, 16 h, 16 w)."""

    def __init__(self, *, width: int, channels: int) -> None:
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1), nn.ReLU(inplace=True)]
            width //= 2
        super().__init__(*layers, nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1))


class ConvMAE(MAEModel):
    """Masked prediction with a ResNet: what is removed is set to zero, the mean colour."""

    def predict(self, images: Tensor, keep: Tensor, mask: Tensor) -> Tensor:
        """Encode the masked images, decode to their size."""
        patches = patchify(images, self.patch_size) * (1 - mask[:, :, None])
        masked = unpatchify(patches, self.patch_size, images.shape[1])
        maps = cast(ResNet, self.encoder).forward_features(masked)
        pixels = F.interpolate(self.head(maps), size=images.shape[-2:], mode="bilinear", align_corners=False)
        return patchify(pixels, self.patch_size)


def build_mae(recipe: "MAE") -> MAEModel:
    """Build the model that a recipe describes, with random weights."""
    spec = recipe.encoder_spec()
    encoder = spec.build()
    settings: dict[str, Any] = {
        "patch_size": mask_unit_size(recipe),
        "mask_ratio": recipe.mask_ratio,
        "norm_pix": recipe.norm_pix,
        "loss_on_all": recipe.loss_on == "all",
    }
    if not spec.is_vit:
        decoder = ConvDecoder(width=feature_dim(encoder), channels=recipe.channels)
        return ConvMAE(encoder, decoder, **settings)
    head = TransformerDecoder(
        width=feature_dim(encoder),
        grid=recipe.image_size // settings["patch_size"],
        pixels=settings["patch_size"] ** 2 * recipe.channels,
        dim=recipe.decoder_dim,
        depth=recipe.decoder_depth,
        heads=recipe.decoder_heads,
    )
    return ViTMAE(cast(VisionTransformer, encoder), head, **settings)
