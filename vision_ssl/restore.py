"""Models from weights: the encoder or all of it, and the reconstructions that MAE makes."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from PIL import Image
from torch import Tensor, nn

from . import hub
from .augment import Draws
from .data import Preprocess, channel_statistics
from .errors import DataError, RecipeError, WeightsError
from .mae import MAEModel
from .recipes import MAE, Recipe, recipe_from_dict
from .simclr import SimCLRModel

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Of `load`: these the whole model takes, and the others change the encoder alone.
_OPTIONS_OF_FULL = ("pretrained", "dtype", "device", "cache_dir", "local_files_only")

_MOST_BLOCKS = 1_000  # of a decoder: each takes time to lay out, even without memory


@overload
def load(
    name: str | os.PathLike[str], *, part: Literal["encoder"] = "encoder", **options: "Unpack[hub.LoadOptions]"
) -> hub.Encoder: ...
@overload
def load(
    name: str | os.PathLike[str], *, part: Literal["full"], **options: "Unpack[hub.LoadOptions]"
) -> SimCLRModel | MAEModel: ...
def load(
    name: str | os.PathLike[str],
    *,
    part: Literal["encoder", "full"] = "encoder",
    **options: "Unpack[hub.LoadOptions]",
) -> hub.Encoder | SimCLRModel | MAEModel:
    """Load a pretrained encoder, or the whole model that pretraining left.

    Args:
        name: A model such as `mae_vit_small` or `mae_vit_small.tiny_imagenet_v3`; a run, a folder of weights or a
            `.safetensors` file in one; or a repository of the Hugging Face Hub, `hf:owner/repo@revision`.
        part: `encoder`: a timm module, deterministic and without a mask, which gives features; or `full`: with its
            projector a `SimCLRModel`, with its decoder an `MAEModel`, to look into or to train on.
        **options: What `hub.load` takes: `num_classes`, `pretrained`, `img_size`, `in_chans`, `global_pool`,
            `dtype`, `device`, `cache_dir`, `local_files_only`. A whole model is as its recipe made it, and takes the
            second and the last four.

    Returns:
        In eval mode: what `hub.load` describes, or the model. Both have `preprocess` and `card`.

    Raises:
        WeightsError: As for `hub.load`; or a whole model is asked for, and its recipe or its head is not there.
        RecipeError: An option is out of range, or the encoder or the whole model cannot take it.
    """
    if part == "encoder":
        return hub.load(name, **options)
    if part != "full":
        raise RecipeError(f"part={part!r} is unknown: expected encoder or full")
    misplaced = [option for option in options if option not in _OPTIONS_OF_FULL]
    if misplaced:
        raise RecipeError(f"{', '.join(misplaced)}: part='full' takes {', '.join(_OPTIONS_OF_FULL)} alone")
    return _load_full(name, **cast(Any, options))


def _load_full(
    name: str | os.PathLike[str],
    *,
    pretrained: bool = True,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    **where: Any,
) -> SimCLRModel | MAEModel:
    card = hub.read_card(name, **where)
    recipe = _recipe_in(card, name)
    model = hub.load_model(recipe.build, name, pretrained=pretrained, **where)
    hub.place(model, device, dtype)
    hub.attach(model, recipe.image_size, recipe.channels, card)
    return cast(SimCLRModel | MAEModel, model.eval())


def recipe_of(name: str | os.PathLike[str]) -> Recipe:
    """The recipe that trained the weights of `name`.

    Raises:
        WeightsError: The name is unknown, or its card has no recipe.
    """
    return _recipe_in(hub.read_card(name), name)


def _recipe_in(card: dict[str, Any], name: str | os.PathLike[str]) -> Recipe:
    if "recipe" not in card:
        raise WeightsError(f"{str(name)!r} has no recipe in its card: expected weights that this package trained")
    try:
        recipe = recipe_from_dict(card["recipe"])
    except RecipeError as error:
        raise WeightsError(f"{str(name)!r} has a recipe that is none: {str(error)[:200]}") from error
    if isinstance(recipe, MAE) and recipe.decoder_depth > _MOST_BLOCKS:
        raise WeightsError(f"{str(name)!r} has a decoder of {recipe.decoder_depth:.3g} blocks: expected far fewer")
    return recipe


def random_encoder(name: str | os.PathLike[str], *, seed: int = 0) -> hub.Encoder:
    """The encoder of `name` before its training: the same recipe with random weights, in eval mode.

    Raises:
        WeightsError: The name is unknown, or its card has no recipe.
    """
    recipe = recipe_of(name)

    def build() -> nn.Module:
        torch.manual_seed(seed)
        return recipe.build()

    encoder = cast(nn.Module, hub.load_model(build, name, pretrained=False).encoder)
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
    model = cast(MAEModel, hub.load_model(recipe.build, name)).eval()
    mean, std = channel_statistics(recipe.channels)
    preprocess = Preprocess(recipe.image_size, mean, std)
    batch = torch.stack([preprocess(image) for image in images])
    units = (recipe.image_size // model.patch_size) ** 2
    noise = Draws(seed, rows=slice(None), total=len(batch), device=batch.device).uniform(units)
    shift, scale = (torch.tensor(numbers)[:, None, None] for numbers in (mean, std))
    original, masked, predicted = (view * scale + shift for view in (batch, *model.reconstruct(batch, noise)))
    return original, masked, predicted
