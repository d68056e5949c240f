"""What the metrics of a run say of its health: the losses to expect, and whether it collapsed or learned nothing."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from .mae import mask_unit_size

if TYPE_CHECKING:
    from .recipes import MAE, Recipe, SimCLR

COLLAPSED_RANK = 2.0  # effective dimensions; of our packaged encoders, before and after training: 47 to 159
COLLAPSED_UNIFORMITY = -0.2  # of projections; near -4 when they are spread evenly
NOTHING_LEARNED = 0.98  # of the loss by chance
LAST = 0.05  # share of the steps whose mean loss is judged


def expected_loss(recipe: "Recipe") -> tuple[float, float] | None:
    """The least loss that is possible, and that of a model which knows nothing; None where it depends on the images.

    NT-Xent of N pairs has ln(2 N - 1) for unrelated projections. Its least is reached when the two views of an image
    coincide and the images form a regular simplex, at a cosine of -1 / (N - 1) (Graf et al. 2021, "Dissecting
    Supervised Contrastive Learning", theorem 1). MAE's loss on normalised patches is their variance, almost 1, for a
    model that predicts each patch's mean.
    """
    if recipe.method == "simclr":
        pairs = recipe.batch_size // recipe.accumulate
        temperature = cast("SimCLR", recipe).temperature
        least = math.log1p(2 * (pairs - 1) * math.exp(-pairs / (pairs - 1) / temperature))
        return least, math.log(2 * pairs - 1)
    mae = cast("MAE", recipe)
    return (0.0, 1 - 1 / (mae.channels * mask_unit_size(mae) ** 2)) if mae.norm_pix else None


def diagnose(recipe: "Recipe", records: Sequence[Mapping[str, float]]) -> str:
    """A verdict on a run, in a sentence.

    Args:
        recipe: Of the run.
        records: Its metrics so far, as `read_metrics` gives them.
    """
    records = [record for record in records if record["epoch"] >= 1]  # before, all projections may well be alike
    if not records:
        return "too early to tell, within the first epoch"
    for record in records:
        if record.get("effective_rank", math.inf) < COLLAPSED_RANK:
            return (
                f"collapsed at epoch {record['epoch']:g}: the features spread over {record['effective_rank']:.1f} "
                "dimensions"
            )
        if record.get("uniformity", -math.inf) > COLLAPSED_UNIFORMITY:
            return (
                f"collapsed at epoch {record['epoch']:g}: the projections of all images are alike (uniformity "
                f"{round(record['uniformity'], 2) + 0.0:.2f})"  # the sum: no -0.00
            )
    losses = [record["loss"] for record in records if "loss" in record]
    expected = expected_loss(recipe)
    if losses and expected is not None:
        last = losses[-max(1, round(LAST * len(losses))) :]
        loss = sum(last) / len(last)
        if loss > NOTHING_LEARNED * expected[1]:
            return f"has learned nothing so far: the loss is {loss:.3f}, and {expected[1]:.3f} by chance"
    return "healthy"
