"""Whole models from weights: encoder and head together, and the reconstructions that MAE makes with them."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from PIL import Image
from torch import Tensor, nn

from . import hub
from .augment import Draws
from .data import Preprocess, channel_statistics
from .errors import DataError, WeightsError
from .mae import MAEModel
from .recipes import MAE, Recipe, recipe_from_dict


def recipe_of(name: str | os.PathLike[str]) -> Recipe:
    """The recipe that trained the weights of `name`.

    Raises:
        WeightsError: The name is unknown, or its card has no recipe.
    """
    card = hub.read_card(name)
    if "recipe" not in card:
        raise WeightsError(f"{str(name)!r} has no recipe in its card: expected weights that this package trained")
    return recipe_from_dict(card["recipe"])


def random_encoder(name: str | os.PathLike[str], *, seed: int = 0) -> hub.Encoder:
    """The encoder of `name` before its training: the same recipe with random weights, in eval mode.

    Raises:
        WeightsError: The name is unknown, or its card has no recipe.
    """
    recipe = recipe_of(name)
    torch.manual_seed(seed)
    encoder = cast(nn.Module, recipe.build().encoder)
    return hub.attach(encoder, recipe.image_size, recipe.channels, card={}).eval()


def reconstruct(
    name: str | os.PathLike[str],
    images: Sequence[Image.Image],
    *,
    mask_ratio: float | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask images, and let MAE predict what was removed.

    Args:
        name: As for `load`; the weights must hold the decoder (`head.safetensors`).
        images: Pillow images of any size.
        mask_ratio: Fraction removed, in (0, 1); by default as in training.
        seed: Of the mask.

    Returns:
        Float images (n, C, S, S): the originals in 0..1; with the removed parts gray; with them predicted,
        where a value may lie slightly outside 0..1.

    Raises:
        DataError: There are no images.
        WeightsError: These are not MAE weights, or the decoder is not among them.
        RecipeError: `mask_ratio` is out of range.
    """
    if not images:
        raise DataError("images: got none, expected at least one")
    recipe = recipe_of(name)
    if not isinstance(recipe, MAE):
        raise WeightsError(f"{str(name)!r} was trained by {recipe.method}: expected mae, which can reconstruct")
    if mask_ratio is not None:
        recipe = replace(recipe, mask_ratio=mask_ratio)
    model = cast(MAEModel, recipe.build()).eval()
    hub.load_into(model, name, head_required=True)
    mean, std = channel_statistics(recipe.channels)
    preprocess = Preprocess(recipe.image_size, mean, std)
    batch = torch.stack([preprocess(image) for image in images])
    units = (recipe.image_size // model.patch_size) ** 2
    noise = Draws(seed, rows=slice(None), total=len(batch), device=batch.device).uniform(units)
    shift, scale = (torch.tensor(numbers)[:, None, None] for numbers in (mean, std))
    original, masked, predicted = (view * scale + shift for view in (batch, *model.reconstruct(batch, noise)))
    return original, masked, predicted
