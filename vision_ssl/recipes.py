"""Recipes: the hyper-parameters of SimCLR and MAE as plain frozen data, and the `train` that starts from them.

Importing this module does not import torch, so that the command line starts at once.
"""

import functools
import os
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from .errors import CheckpointError, RecipeError
from .options import RunOptions, changed_fields, check, check_choices, check_counts, check_names, check_numbers
from .presets import PRESETS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from .augment import Draws
    from .data import Source
    from .encoders import EncoderSpec
    from .pretrain import Run

Optimiser = Literal["lars", "adamw", "adam", "sgd"]


class _Train:
    """`train`, on a recipe class with the fields as keywords, and on an instance with that instance's fields."""

    def __get__(self, recipe: "Recipe | None", owner: "type[Recipe]") -> "Callable[..., Run]":
        return functools.partial(_train, owner if recipe is None else recipe)


def _train(recipe: "Recipe | type[Recipe]", source: "Source", **settings: Any) -> "Run":
    """Pretrain an encoder on the images of `source`.

    Args:
        recipe: The method, or a recipe whose own fields hold.
        source: A folder, a known layout or name, a torch Dataset, or a uint8 array; see `open_images`.
        **settings: Fields of `RunOptions`; called on a class, also fields of the recipe.

    Returns:
        The finished (or stopped) run.

    Raises:
        RecipeError: A setting is unknown, or cannot work.
    """
    from .pretrain import pretrain

    settings = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in settings.items()}
    run_names = [item.name for item in fields(RunOptions)]
    options = RunOptions(**{name: value for name, value in settings.items() if name in run_names})
    rest = {name: value for name, value in settings.items() if name not in run_names}
    if isinstance(recipe, type):
        check_names(recipe.__name__, rest, [*(item.name for item in fields(recipe)), *run_names])
        recipe = recipe.of(**rest)
    elif rest:
        raise RecipeError(
            f"train() got {', '.join(rest)}: a recipe instance trains with its own fields, so only options of "
            f"the run are expected: {', '.join(run_names)}"
        )
    if options.resume:
        recipe, options = _resumed(recipe, options)
    return pretrain(recipe, source, options)


def _resumed(recipe: "Recipe", options: RunOptions) -> "tuple[Recipe, RunOptions]":
    """What a run was started with; what is given beside the defaults must agree with it."""
    from .pretrain import Run

    run = Run(options.directory(recipe))
    settings = run.settings
    saved = recipe_from_dict(settings["recipe"])
    if type(saved) is not type(recipe):
        raise CheckpointError(f"{run.directory} is a run of {saved.method}, and cannot go on as {recipe.method}")
    saved_options = replace(options, **_from_json(settings.get("options", {})))
    for given, started in ((recipe, saved), (options, saved_options)):
        for name in changed_fields(given):
            if getattr(given, name) != getattr(started, name):
                raise CheckpointError(
                    f"{run.directory} was started with {name}={getattr(started, name)!r}, and cannot go on with "
                    f"{getattr(given, name)!r}"
                )
    return saved, saved_options


RecipeType = TypeVar("RecipeType", bound="Recipe")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the two methods share. Defaults are for 64 px images.

    Attributes:
        encoder: `resnet18`, `resnet34`, `resnet50`, `vit_tiny`, `vit_small`, `vit_base`, `vit_large` or `vit_huge`.
        image_size: Side of the images that are kept, and of the views unless SimCLR's `view_size` differs, pixels.
        channels: Channels of the images.
        stem: ResNets: `7x7`, `3x3`, `3x3-nopool`, or `auto` by image size.
        patch_size: ViTs, and masks of patches: side of a patch, pixels; by default 4, 8 or 16 by image size.
        epochs: Passes over the images.
        batch_size: Images in an optimiser step, over all processes and micro-batches.
        accumulate: Micro-batches that a step is computed in.
        optimizer: `lars`, `adamw`, `adam` (coupled weight decay) or `sgd`.
        base_lr: Learning rate per 256 images; the optimiser gets `base_lr * batch_size / 256`.
        weight_decay: Weight decay of everything but biases, norms and tokens.
        betas: Of Adam and AdamW.
        warmup_epochs: Epochs before the schedule begins; by default a tenth of all, at most 10.
        warmup: `linear` from near zero, or `constant` at the peak.
        schedule: `cosine` to zero, or `constant`.
        clip_grad: Largest norm of the gradient; `None` for no clipping.
        crop_scale: Range of a random crop's share of the image area.
        flip: Probability of mirroring.
    """

    method: ClassVar[str]

    encoder: str
    image_size: int = 64
    channels: int = 3
    stem: Literal["auto", "7x7", "3x3", "3x3-nopool"] = "auto"
    patch_size: int | None = None
    epochs: int = 100
    batch_size: int = 256
    accumulate: int = 1
    optimizer: Optimiser
    base_lr: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_epochs: float | None = None
    warmup: Literal["linear", "constant"] = "linear"
    schedule: Literal["cosine", "constant"] = "cosine"
    clip_grad: float | None = None
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: float = 0.5

    train: ClassVar[_Train] = _Train()

    def __post_init__(self) -> None:
        check_choices(self)
        check_counts(self, "image_size", "channels", "patch_size", "epochs", "batch_size", "accumulate")
        check_numbers(self, "base_lr", "weight_decay", "warmup_epochs")
        if self.batch_size % self.accumulate:
            nearest = max(1, round(self.batch_size / self.accumulate)) * self.accumulate
            raise RecipeError(
                f"batch_size={self.batch_size} is not divisible by accumulate={self.accumulate}: "
                f"the nearest valid is {nearest}"
            )
        crop, betas = self.crop_scale, self.betas
        check(self, "crop_scale", len(crop) == 2 and 0 < crop[0] <= crop[1] <= 1, "0 < low <= high <= 1")
        check(self, "betas", len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)")
        check(self, "clip_grad", self.clip_grad is None or self.clip_grad > 0, "a number > 0")
        check_numbers(self, "flip", most=1)

    @classmethod
    def of(cls: type[RecipeType], **settings: Any) -> RecipeType:
        """Build a recipe from keywords, refusing unknown ones with the nearest known name.

        Raises:
            RecipeError: A keyword is not a field of this recipe.
        """
        check_names(cls.__name__, settings, [item.name for item in fields(cls)])
        return cls(**settings)

    @classmethod
    def preset(cls: type[RecipeType], name: str, **changes: Any) -> RecipeType:
        """Build a named recipe, with some fields changed.

        Raises:
            RecipeError: There is no preset of this name.
        """
        presets = PRESETS[cls.method]
        if name not in presets:
            raise RecipeError(f"preset={name!r} is unknown: expected one of {', '.join(presets)}")
        return cls.of(**(presets[name] | changes))

    @property
    def lr(self) -> float:
        """Peak learning rate that the optimiser gets: linear scaling (Goyal et al. 2017, section 2.1)."""
        return self.base_lr * self.batch_size / 256

    @property
    def warmup_length(self) -> float:
        """Epochs before the schedule begins: `warmup_epochs`, or a tenth of all but at most 10."""
        return min(10, self.epochs / 10) if self.warmup_epochs is None else self.warmup_epochs

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data; `recipe_from_dict` reads it."""
        return {"method": self.method, **asdict(self)}

    def encoder_spec(self) -> "EncoderSpec":
        """The encoder that this recipe trains.

        Raises:
            RecipeError: The encoder is unknown, or its patch size does not divide the image size.
        """
        from .encoders import resolve_encoder

        return resolve_encoder(
            self.encoder,
            image_size=self.image_size,
            stem=self.stem,
            patch_size=self.patch_size,
            channels=self.channels,
        )

    def build(self) -> "nn.Module":
        """Build the model: encoder, head and loss."""
        raise NotImplementedError

    def augment(self, images: "Tensor", draws: "Draws") -> "tuple[Tensor, ...]":
        """Turn uint8 images (B, C, H, W) into what the model is given, drawing every random number."""
        raise NotImplementedError

    def advice(self) -> list[str]:
        """Choices of this recipe that are known to hurt, a sentence each."""
        size = getattr(self, "view_size", None) or self.image_size  # SimCLR alone may show the network less
        if self.encoder.startswith("resnet") and self.stem == "7x7" and size <= 40:
            maps = f"stem='7x7' shrinks {size} px images to {-(-size // 32)} px maps"
            return [f"{maps}: '3x3-nopool' is usual at 32 px"]
        return []


@dataclass(frozen=True, kw_only=True)
class SimCLR(Recipe):
    """SimCLR (Chen et al. 2020): two views of an image attract, views of other images repel.

    Attributes:
        temperature: Of the NT-Xent loss.
        projector_hidden: Hidden width of the projector; by default the encoder's width.
        projector_dim: Width of the projector's output.
        projector_norm: BatchNorm after each linear layer of the projector, as in SimCLR's own code.
        jitter: Strengths of brightness, contrast, saturation and hue.
        jitter_probability: Share of the views that are jittered.
        grayscale: Probability of grayscale.
        blur: Probability of Gaussian blur.
        blur_kernel: Taps of the blur, odd; by default a tenth of the view's side.
        view_size: ResNets: side of the views, pixels; by default `image_size`. Crops enlarge what they show: at 3/4 of
            the size it is about as large as in whole images (Touvron et al. 2019, section 3), in half the time.
        fast_views: Colours by one affine map and blur as part of the crop: in half the time, and not quite the same.
    """

    method: ClassVar[str] = "simclr"

    encoder: str = "resnet18"
    optimizer: Optimiser = "lars"
    base_lr: float = 0.3
    weight_decay: float = 1e-4
    crop_scale: tuple[float, float] = (0.2, 1.0)
    temperature: float = 0.2
    projector_hidden: int | None = None
    projector_dim: int = 128
    projector_norm: bool = True
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_probability: float = 0.8
    grayscale: float = 0.1
    blur: float = 0.0
    blur_kernel: int | None = None
    view_size: int | None = None
    fast_views: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "projector_hidden", "projector_dim", "blur_kernel", "view_size")
        check(self, "temperature", self.temperature > 0, "a number > 0")
        least = 2 * self.accumulate
        check(self, "batch_size", self.batch_size >= least, f"at least {least}, two images to contrast at a time")
        fits = len(self.jitter) == 4 and all(0 <= s < float("inf") for s in self.jitter) and self.jitter[3] <= 0.5
        check(self, "jitter", fits, "brightness, contrast and saturation >= 0, and a hue in [0, 0.5]")
        check_numbers(self, "jitter_probability", "grayscale", "blur", most=1)
        if self.blur_kernel is not None:
            # The borders are reflected: half of the taps lie within the image.
            widest = 2 * (self.view_size or self.image_size) - 1
            rule = f"an odd number up to {widest}; the nearest valid is {min(self.blur_kernel + 1, widest)}"
            check(self, "blur_kernel", self.blur_kernel % 2 == 1 and self.blur_kernel <= widest, rule)
        if self.encoder.startswith("vit") and self.view_size not in (None, self.image_size):
            raise RecipeError(f"view_size={self.view_size} needs a ResNet encoder: a ViT takes image_size alone")

    def build(self) -> "nn.Module":
        """Build the encoder, the projector and the loss, with random weights."""
        from .simclr import build_simclr

        return build_simclr(self)

    def augment(self, images: "Tensor", draws: "Draws") -> "tuple[Tensor, ...]":
        """Two views of each image; see `views.two_views`."""
        from .views import two_views

        return two_views(self, images, draws)

    def advice(self) -> list[str]:
        """As for every recipe, and whether there is enough to contrast with."""
        others = self.batch_size // self.accumulate - 1
        few = f"each image is contrasted with {others} others (batch_size / accumulate): below 64 the features suffer"
        return super().advice() + ([few] if others < 63 else [])


@dataclass(frozen=True, kw_only=True)
class MAE(Recipe):
    """MAE (He et al. 2022): part of an image is removed, and predicted from the rest.

    With a ViT, the encoder sees the kept patches alone and a light transformer predicts the others. With a
    ResNet, masked pixels are set to the mean colour and transposed convolutions predict the image.

    Attributes:
        mask_ratio: Fraction of the image that is removed, in (0, 1).
        mask_unit: `patch`, or `pixel` (ResNets).
        shared_mask: One mask for the whole batch (ResNets).
        loss_on: Pixels that the loss counts: `masked` or `all`.
        norm_pix: Predict pixels normalised within their patch (He et al. 2022, section 3).
        decoder_dim: ViTs: width of the decoder.
        decoder_depth: ViTs: its blocks.
        decoder_heads: ViTs: its attention heads.
    """

    method: ClassVar[str] = "mae"

    encoder: str = "vit_small"
    batch_size: int = 512
    optimizer: Optimiser = "adamw"
    base_lr: float = 5e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    mask_ratio: float = 0.75
    mask_unit: Literal["patch", "pixel"] = "patch"
    shared_mask: bool = False
    loss_on: Literal["masked", "all"] = "masked"
    norm_pix: bool = True
    decoder_dim: int = 256
    decoder_depth: int = 4
    decoder_heads: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "decoder_dim", "decoder_depth", "decoder_heads")
        fraction = "a fraction removed, between 0 and 1 (the usual is 0.75)"
        check(self, "mask_ratio", 0 < self.mask_ratio < 1, fraction)
        if self.encoder.startswith("vit") and (self.mask_unit == "pixel" or self.shared_mask):
            raise RecipeError("mask_unit='pixel' and shared_mask=True need a ResNet encoder: a ViT masks patches")
        if self.norm_pix and self.mask_unit == "pixel":
            raise RecipeError("norm_pix=True normalises patches: it needs mask_unit='patch'")
        if self.decoder_dim % (4 * self.decoder_heads):
            step = 4 * self.decoder_heads
            nearest = max(1, round(self.decoder_dim / step)) * step
            raise RecipeError(
                f"decoder_dim={self.decoder_dim} is not divisible by 4 * decoder_heads={step}: "
                f"the nearest valid is {nearest}"
            )

    def encoder_spec(self) -> "EncoderSpec":
        """The encoder that this recipe trains.

        Raises:
            RecipeError: As for every recipe; or a patch to mask does not divide the image, or is all of it.
        """
        from .encoders import resolve_patch_size

        if self.mask_unit == "patch" and resolve_patch_size(self.image_size, self.patch_size) == self.image_size:
            raise RecipeError(f"patch_size={self.image_size} is the whole image: expected at most half of image_size")
        return super().encoder_spec()

    def build(self) -> "nn.Module":
        """Build the encoder, the decoder and the loss, with random weights."""
        from .mae import build_mae

        return build_mae(self)

    def augment(self, images: "Tensor", draws: "Draws") -> "tuple[Tensor, ...]":
        """A view of each image and the noise that masks it; see `mae.view_and_noise`."""
        from .mae import view_and_noise

        return view_and_noise(self, images, draws)


METHODS: dict[str, type[SimCLR] | type[MAE]] = {"simclr": SimCLR, "mae": MAE}


def recipe_from_dict(data: dict[str, Any]) -> Recipe:
    """Rebuild a recipe from `Recipe.to_dict`, as read back from JSON.

    Raises:
        RecipeError: The method is unknown, a field is not its own, or has a value of another type.
    """
    try:
        settings = _from_json(data)
        method = str(settings.pop("method", None))
        if method not in METHODS:
            raise RecipeError(f"method={method!r} is unknown: expected one of {', '.join(METHODS)}")
        return METHODS[method].of(**settings)
    except (TypeError, AttributeError) as error:
        raise RecipeError(f"this is not the description of a recipe: {error}") from error


def _from_json(data: dict[str, Any]) -> dict[str, Any]:
    """Settings as their dataclass holds them: JSON has no tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
