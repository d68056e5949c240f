"""Where and how a run happens, as plain frozen data."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where and how a run happens; nothing here changes what is learned, except `init` and `seed`.

    Attributes:
        out: Directory of the run; by default `runs/<method>-<encoder>`.
        resume: Continue the run in `out` from its last checkpoint.
        init: Weights to start from: a name, a folder or a file, as for `load`.
        device: `auto` (the first GPU, otherwise the CPU), `cpu`, `cuda`, `cuda:1`, `mps`.
        precision: `auto` (bf16 where the device computes it natively), `bf16` or `fp32`.
        time_limit: Minutes after which the run saves its state and stops.
        seed: Seed of the weights, the order of the images, and the views.
        parts: Parts of an ImageNet-100 tree to train on, such as `train.X1`; all by default.
        cache_dir: Where decoded images are kept; by default `~/.cache/vision_ssl`.
        cache_size: Side at which images are kept before cropping, pixels; by default the recipe's `image_size`.
        save_minutes: Minutes between checkpoints.
        knn_epochs: Epochs between kNN accuracies on held-out training images, where labels exist; 0 for never.
    """

    out: str | None = None
    resume: bool = False
    init: str | None = None
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    time_limit: float | None = None
    seed: int = 0
    parts: tuple[str, ...] | None = None
    cache_dir: str | None = None
    cache_size: int | None = None
    save_minutes: float = 10.0
    knn_epochs: int = 5

    def directory(self, recipe: "Recipe") -> Path:
        """Where a run of this recipe goes."""
        return Path(self.out or f"runs/{recipe.method}-{recipe.encoder}")
