"""Where and how a run or a fine-tuning happens, as plain frozen data; and checks of such data, the recipes' too."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from .errors import RecipeError
from .presets import FINE_TUNING

if TYPE_CHECKING:
    from .recipes import Recipe


# How an encoder can be measured by its frozen features; the names stay what they are.
Protocol = Literal[
    "linear",
    "linear-sgd",
    "linear-sgd-study-b",
    "linear-sgd-mae",
    "linear-sgd-simclr",
    "attentive",
    "knn",
    "fewshot-1",
    "fewshot-5",
    "fewshot-10",
    "fewshot-1-percent",
    "fewshot-10-percent",
    "retrieval",
    "cluster",
    "resubstitution",
]

LASTING = ("init", "precision", "compile", "seed", "parts", "cache_size")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where and how a run happens; what is learned depends on `LASTING` alone, which a resumed run keeps.

    Attributes:
        out: Directory of the run; by default `runs/<method>-<encoder>`.
        resume: Continue the run in `out` from its last checkpoint.
        init: Weights to start from: a name, a folder or a file, as for `load`.
        device: `auto` (the first GPU, otherwise the CPU), `cpu`, `cuda`, `cuda:1`, `mps`.
        precision: `auto` (bf16 where the device computes it natively), `bf16` or `fp32`.
        compile: Whether `torch.compile` makes the network faster, at the cost of a minute at the start: `on`, `off`, or
            `auto` (on a GPU, for runs of 2,000 steps or more).
        time_limit: Minutes after which the run saves its state and stops.
        seed: Seed of the weights, the order of the images, and the views.
        parts: Parts of a source to train on, such as `train.X1` of an ImageNet-100 tree or `unlabeled` of stl10.
        cache_dir: Where decoded images are kept; by default `~/.cache/vision_ssl`.
        cache_size: Side at which images are kept before cropping, pixels; by default the recipe's `image_size`.
        save_minutes: Minutes between checkpoints.
        look_epochs: Epochs between two looks at the encoder: the effective rank of its features and, where labels
            exist, its kNN and linear accuracy on a split of the training images (it trains on all of them); 0 for none.
        keep_epochs: Epochs between encoders that are kept as weights in `epochs/0005` and so on, and after the last
            epoch; 0 for none.
    """

    out: str | None = None
    resume: bool = False
    init: str | None = None
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    time_limit: float | None = None
    seed: int = 0
    parts: tuple[str, ...] | None = None
    cache_dir: str | None = None
    cache_size: int | None = None
    save_minutes: float = 10.0
    look_epochs: int = 5
    keep_epochs: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        check_counts(self, "cache_size")
        check_numbers(self, "time_limit", "save_minutes", "look_epochs", "keep_epochs")

    def directory(self, recipe: "Recipe") -> Path:
        """Where a run of this recipe goes."""
        return Path(self.out or f"runs/{recipe.method}-{recipe.encoder}")


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """How an encoder is fine-tuned.

    Defaults are MAE's (He et al. 2022, appendix A.1, table 9) where it names one, but for the batch, which is 1,024
    images there.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images in a step.
        base_lr: Learning rate of the head per 256 images.
        layer_decay: Learning rate of each layer, as a share of that of the layer after it.
        weight_decay: Weight decay of everything but biases, norms and tokens.
        warmup_epochs: Epochs of linear warm-up, before a cosine to zero; by default a twentieth of all.
        drop_path: Probability of skipping the last residual branch; it falls linearly to 0 at the first.
        mixup: Parameter of the beta distribution of mixup; 0 for none.
        cutmix: Likewise of CutMix; of the two, each batch takes one at random.
        label_smoothing: Share of a target that is spread over all classes.
        erase: Probability of random erasing.
        ema: Decay, per step, of the exponential mean of the weights and of BatchNorm's statistics, which is scored in
            the end; 0 for the last weights. It is lower in the first steps: (1 + t) / (10 + t) in step t.
    """

    epochs: int = 50
    batch_size: int = 256
    base_lr: float = 1e-3
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    warmup_epochs: float | None = None
    drop_path: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    label_smoothing: float = 0.1
    erase: float = 0.25
    ema: float = 0.0

    def __post_init__(self) -> None:
        check_counts(self, "epochs", "batch_size")
        check_numbers(self, "base_lr", "weight_decay", "warmup_epochs", "mixup", "cutmix")
        check_numbers(self, "layer_decay", "label_smoothing", "erase", most=1)
        for name in ("drop_path", "ema"):
            check(self, name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")

    @classmethod
    def of(cls, preset: str = "mae", **settings: Any) -> "FineTuning":
        """Build it from a preset and keywords, refusing unknown ones with the nearest known name.

        Raises:
            RecipeError: There is no such preset, or a keyword is not a field.
        """
        if preset not in FINE_TUNING:
            raise RecipeError(f"preset={preset!r} is unknown: expected one of {', '.join(FINE_TUNING)}")
        check_names("finetune", settings, [item.name for item in fields(cls)])
        return cls(**(FINE_TUNING[preset] | settings))


def check_names(owner: str, given: Iterable[str], known: list[str]) -> None:
    """Refuse names that are not known, with the nearest one that is.

    Raises:
        RecipeError: A name is unknown.
    """
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
            raise RecipeError(f"{owner} has no field {name}: {hint}")


def check_choices(settings: Any) -> None:
    """Refuse values that a dataclass's `Literal` types do not list: Python itself takes any.

    Raises:
        RecipeError: A value is not among the choices.
    """
    for item in fields(settings):
        value = getattr(settings, item.name)
        if get_origin(item.type) is Literal and value not in get_args(item.type):
            choices = ", ".join(map(str, get_args(item.type)))
            raise RecipeError(f"{item.name}={value!r} is unknown: expected one of {choices}")


def check_counts(settings: Any, *names: str) -> None:
    """Refuse fractions and numbers below 1; None stands for a default.

    Raises:
        RecipeError: A number is not a count.
    """
    for name in names:
        value = getattr(settings, name)
        if value is None:
            continue
        if not isinstance(value, int):
            raise RecipeError(f"{name}={value!r} is not a count: expected a whole number, such as 1")
        if value < 1:
            raise RecipeError(f"{name}={value} is too small: expected at least 1")


def check_numbers(settings: Any, *names: str, most: float = sys.float_info.max) -> None:
    """Refuse numbers that are negative, above `most` or infinite; None stands for a default.

    Raises:
        RecipeError: A number is out of range.
    """
    expected = "a finite number >= 0" if most > 1 else f"a number in [0, {most}]"
    for name in names:
        value = getattr(settings, name)
        valid = value is None or (isinstance(value, int | float) and 0 <= value <= most)
        check(settings, name, valid, expected)


def check(settings: Any, name: str, valid: bool, expected: str) -> None:
    """Refuse a field unless it is valid.

    Raises:
        RecipeError: It is not.
    """
    if not valid:
        raise RecipeError(f"{name}={getattr(settings, name)!r} is out of range: expected {expected}")


def changed_fields(settings: Any) -> list[str]:
    """Names of a dataclass's fields that differ from their defaults."""
    return [item.name for item in fields(settings) if getattr(settings, item.name) != item.default]
