import math
from typing import Any

import pytest
import torch

from vision_ssl.diagnosis import diagnose, expected_loss
from vision_ssl.recipes import MAE, Recipe, SimCLR
from vision_ssl.simclr import nt_xent

SIMCLR = SimCLR(batch_size=8, temperature=0.5)


def steps(losses: list[float], **metrics: float) -> list[dict[str, float]]:
    return [{"step": n, "epoch": n / 4, "loss": loss, **metrics} for n, loss in enumerate(losses, start=1)]


def test_the_least_contrastive_loss_is_that_of_a_simplex_and_no_loss_is_below_it() -> None:
    simplex = torch.eye(8) - 1 / 8
    least, chance = expected_loss(SIMCLR) or (0.0, 0.0)
    assert nt_xent(simplex, simplex, 0.5).item() == pytest.approx(least, rel=1e-5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        first = torch.randn(8, 16, generator=generator)
        assert nt_xent(first, first, 0.5).item() > least
    assert chance == pytest.approx(math.log(15))


def test_contrasts_are_those_of_a_micro_batch() -> None:
    assert expected_loss(SimCLR(batch_size=16, accumulate=2, temperature=0.5)) == expected_loss(SIMCLR)


def test_the_loss_of_predicting_each_patchs_mean() -> None:
    recipe = MAE(encoder="vit_tiny", image_size=32, patch_size=4)
    model = recipe.build()
    torch.nn.init.zeros_(model.head.pixels.weight)  # type: ignore[union-attr, arg-type]  # a decoder's
    loss, _ = model(torch.randn(2, 3, 32, 32), torch.rand(2, 64))
    assert loss.item() == pytest.approx((expected_loss(recipe) or (0.0, 0.0))[1], rel=1e-4)


def test_plain_pixels_depend_on_the_images() -> None:
    assert expected_loss(MAE(norm_pix=False)) is None


@pytest.mark.parametrize(
    ("recipe", "records", "verdict"),
    [
        (SIMCLR, [], "too early to tell, within the first epoch"),
        (SIMCLR, steps([2.7, 2.0, 1.8, 1.5], uniformity=-2.0), "healthy"),
        (SIMCLR, steps([2.7, 2.7, 2.69, 2.7]), "has learned nothing so far: the loss is 2.700, and 2.708 by chance"),
        (SIMCLR, steps([2.0] * 99 + [2.7] * 4), "healthy"),  # four of the last five
        (SIMCLR, steps([2.0] * 98 + [2.7] * 5), "has learned nothing so far: the loss is 2.700, and 2.708 by chance"),
        (
            SIMCLR,
            steps([2.0] * 8, uniformity=-0.1),
            "collapsed at epoch 1: the projections of all images are alike (uniformity -0.10)",
        ),
        (SIMCLR, steps([2.7] * 3, uniformity=-0.1), "too early to tell, within the first epoch"),
        (SIMCLR, [*steps([2.7] * 3, uniformity=-0.1), *steps([2.0] * 8)[3:]], "healthy"),
        (
            SIMCLR,
            [*steps([2.0] * 8), {"step": 8, "epoch": 2, "effective_rank": 1.3}],
            "collapsed at epoch 2: the features spread over 1.3 dimensions",
        ),
        (SIMCLR, [*steps([2.0] * 8), {"step": 8, "epoch": 2, "effective_rank": 40.0}], "healthy"),
        (MAE(), steps([1.0, 1.0, 1.0, 0.99]), "has learned nothing so far: the loss is 0.990, and 0.995 by chance"),
        (MAE(), steps([1.0, 1.0, 1.0, 0.8]), "healthy"),
        (MAE(norm_pix=False), steps([3.0] * 4), "healthy"),
    ],
)
def test_verdict(recipe: Recipe, records: list[Any], verdict: str) -> None:
    assert diagnose(recipe, records) == verdict
