"""What a GPU does by other means than a CPU. `VISION_SSL_TEST_DEVICE=cpu` rehearses it; `cuda` fails without a GPU."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from vision_ssl import MAE, Features, SimCLR, extract
from vision_ssl.device import brought_ahead
from vision_ssl.encoders import resolve_encoder
from vision_ssl.engine import Trainer
from vision_ssl.hub import attach
from vision_ssl.probe import linear, resubstitution
from vision_ssl.recipes import Recipe

ASKED = os.environ.get("VISION_SSL_TEST_DEVICE")
DEVICE = torch.device(ASKED or "cuda")
pytestmark = pytest.mark.skipif(ASKED is None and not torch.cuda.is_available(), reason="there is no GPU")

SHORT: dict[str, Any] = {"image_size": 32, "batch_size": 35, "epochs": 4, "warmup_epochs": 0}
# Broad patches of colour, by which a crop is known again.
COLORS = torch.randint(256, (70, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PIXELS = COLORS.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def test_batches_arrive_in_order_and_whole() -> None:
    batches = PIXELS.repeat(20, 1, 1, 1).split(100)  # that the transfer of one takes its time
    arrived = [batch.float().mean(dim=(1, 2, 3)) for batch in brought_ahead(batches, DEVICE)]
    assert {mean.device.type for mean in arrived} == {DEVICE.type}
    torch.testing.assert_close(torch.cat(arrived).cpu(), PIXELS.float().mean(dim=(1, 2, 3)).repeat(20))


@pytest.mark.parametrize("architecture", ["resnet18", "vit_tiny"])
def test_features_are_those_of_a_cpu(architecture: str) -> None:
    torch.manual_seed(0)
    encoder = attach(resolve_encoder(architecture, image_size=32).build(), 32, 3, card={})
    found = extract(encoder, PIXELS, device=DEVICE, batch_size=3).features  # more batches than are in flight
    expected = extract(encoder, PIXELS, device="cpu").features
    assert found.device.type == "cpu"
    assert torch.cosine_similarity(found, expected).min() > 0.9999
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)  # TF32 in convolutions


@pytest.mark.parametrize("compile", ["on", "off"])
@pytest.mark.parametrize(
    "recipe",
    [
        SimCLR(**SHORT, base_lr=3.0, blur=0.5),
        SimCLR(**SHORT, base_lr=3.0, view_size=24, fast_views=True),
        MAE(**SHORT, encoder="vit_tiny", decoder_depth=1),
        MAE(**SHORT, encoder="resnet18", base_lr=1e-3),
    ],
    ids=["exact views", "fast views", "ViT", "ResNet"],
)
def test_training_learns_stops_and_resumes(
    recipe: Recipe, compile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compile == "on" and DEVICE.type == "cpu":
        pytest.skip("a rehearsal compiles nothing")
    whole = recipe.train(PIXELS, out=tmp_path / "whole", device=str(DEVICE), compile=compile)
    losses = [line["loss"] for line in whole.metrics if "loss" in line]
    assert len(losses) == 8
    assert sum(losses[-2:]) < sum(losses[:2])
    step = Trainer._step

    def stopped_halfway(trainer: Trainer) -> tuple[float, dict[str, torch.Tensor]]:
        if trainer.progress.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopped_halfway)
        half = recipe.train(PIXELS, out=tmp_path / "halves", device=str(DEVICE), compile=compile)
    assert half.metrics[-1]["step"] == 4
    resumed = recipe.train(PIXELS, out=tmp_path / "halves", device=str(DEVICE), compile=compile, resume=True)
    again = [line["loss"] for line in resumed.metrics if "loss" in line]
    torch.testing.assert_close(torch.tensor(again), torch.tensor(losses), rtol=0, atol=0.01)


@pytest.mark.filterwarnings("ignore:resubstitution")
def test_linear_probes_are_those_of_a_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 6
    centres = torch.randn(6, 40, generator=generator)

    def features(rows: slice) -> Features:
        part = labels[rows]
        noisy = centres[part] + 3 * torch.randn(len(part), 40, generator=generator)
        paths = tuple(f"{rows.start} {index}" for index in range(len(part)))
        return Features(noisy, part, tuple("abcdef"), paths, digest=str(rows.start))

    train, val = features(slice(0, 400)), features(slice(400, 600))
    found, expected = linear(train, val, device=DEVICE), linear(train, val)
    assert found.settings["l2"] == expected.settings["l2"]
    assert abs(found.accuracy - expected.accuracy) <= 1
    assert found.train_loss == pytest.approx(expected.train_loss, abs=1e-3)
    found, expected = resubstitution(train, device=DEVICE), resubstitution(train)
    assert abs(found.accuracy - expected.accuracy) <= 1
    assert found.train_loss == pytest.approx(expected.train_loss, abs=1e-3)
