from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssl import hub
from vision_ssl import linear_crops as module
from vision_ssl import probe as probes
from vision_ssl.augment import Draws, crop_resize, random_boxes
from vision_ssl.data import ImageSet, Preprocess
from vision_ssl.encoders import resolve_encoder
from vision_ssl.errors import DataError, TrainingError
from vision_ssl.features import Features, extract
from vision_ssl.linear_crops import MAE_PROBE, SIMCLR_PROBE, CropProbe, crop_classifier
from vision_ssl.probe import evaluate

SIZE, DIM = 16, 12
CPU = torch.device("cpu")
PREPROCESS = Preprocess(SIZE, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))


class Colours(nn.Module):
    """An encoder whose features are the colours of four quarters."""

    def __init__(self) -> None:
        super().__init__()
        self.preprocess: Any = PREPROCESS

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return F.avg_pool2d(x, SIZE // 2).flatten(1)


def images(seed: int, n: int = 70) -> ImageSet:
    """Noise with a tint that is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    tint = 60 * F.one_hot(labels, 3)[:, :, None, None]
    pixels = (torch.randint(196, (n, 3, SIZE, SIZE), generator=generator) + tint).byte()
    return ImageSet(pixels, labels, ("a", "b", "c"), tuple(map(str, range(n))), f"tints {seed}", str(seed) * 64)


TRAIN, VAL = images(1), images(2)


def fit(probe: CropProbe, source: ImageSet = TRAIN, seed: int = 5) -> Any:
    return crop_classifier(Colours().eval(), DIM, source, PREPROCESS, probe, seed=seed, device=CPU)


def direct(probe: CropProbe, batch: int, warmup_steps: int, seed: int) -> nn.Sequential:
    """The probe as one writes it with torch's own parts, and LARS as You et al. 2017 have it in algorithm 1."""
    labels = cast(Tensor, TRAIN.labels)
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(DIM, 3)
    layer.weight.data = torch.empty(3, DIM).normal_(std=0.01, generator=generator)
    layer.bias.data.zero_()
    model = nn.Sequential(nn.BatchNorm1d(DIM, eps=1e-6, affine=False) if probe.batch_norm else nn.Identity(), layer)
    parameters = list(layer.parameters())
    momenta = [torch.zeros_like(parameter) for parameter in parameters]
    per_epoch = len(labels) // batch
    steps, step = probe.epochs * per_epoch, 0
    for _ in range(probe.epochs):
        order = torch.randperm(len(labels), generator=generator)
        for rows in order.split(batch)[:per_epoch]:
            draws = Draws(int(torch.randint(2**62, (), generator=generator)), rows=slice(None), total=batch, device=CPU)
            boxes = random_boxes(draws, SIZE, SIZE, scale=(0.08, 1.0))
            crops = crop_resize(TRAIN.pixels[rows], boxes, draws.chance(0.5), size=SIZE, interpolation="bicubic")
            mean, std = (torch.tensor(values)[:, None, None] for values in (PREPROCESS.mean, PREPROCESS.std))
            features = Colours().eval()((crops - mean) / std)
            gradients = torch.autograd.grad(F.cross_entropy(model(features), labels[rows]), parameters)
            ramp = torch.tensor((step - warmup_steps) / (steps - warmup_steps) * torch.pi)
            factor = (step + 1) / warmup_steps if step < warmup_steps else 0.5 * (1 + float(ramp.cos()))
            lr = probe.base_lr * batch / 256 * factor
            for parameter, momentum, gradient in zip(parameters, momenta, gradients, strict=True):
                update = gradient
                if probe.optimizer == "lars" and parameter.ndim > 1:
                    update = 0.001 * parameter.norm() / gradient.norm() * gradient
                momentum.mul_(0.9).add_(update)
                forward = update + 0.9 * momentum if probe.optimizer == "nesterov" else momentum
                parameter.data.sub_(lr * forward)
            step += 1
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("probe", "batch"),
    [
        (replace(MAE_PROBE, epochs=4, warmup_epochs=2, batch_size=32, base_lr=40.0), 32),
        (replace(SIMCLR_PROBE, epochs=3, batch_size=70), 70),
        (replace(SIMCLR_PROBE, epochs=2, batch_size=30, batch_norm=True, warmup_epochs=1), 30),
    ],
    ids=["MAE", "SimCLR", "both"],
)
def test_it_is_what_torchs_own_parts_do_step_for_step(
    probe: CropProbe, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "images_at_a_time", lambda *_: 13)  # several parts a batch
    classifier, settings = fit(probe)
    features = extract(Colours(), VAL).features
    expected = direct(probe, batch, probe.warmup_epochs * (70 // batch), 5)(features)
    torch.testing.assert_close(classifier.logits(features), expected, atol=1e-5, rtol=1e-5)
    assert (settings["batch_size"], settings["lr"]) == (batch, probe.base_lr * batch / 256)


def test_the_papers_settings() -> None:
    """He et al. 2022, table 10; Chen et al. 2020, appendices B.5 and B.6."""
    assert (
        CropProbe(
            protocol="linear-sgd-mae",
            optimizer="lars",
            base_lr=0.1,
            batch_size=16384,
            epochs=90,
            warmup_epochs=10,
            batch_norm=True,
        )
        == MAE_PROBE
    )
    assert (
        CropProbe(
            protocol="linear-sgd-simclr",
            optimizer="nesterov",
            base_lr=0.1,
            batch_size=4096,
            epochs=90,
            warmup_epochs=0,
            batch_norm=False,
        )
        == SIMCLR_PROBE
    )


def test_the_seed_decides_everything() -> None:
    probe, generator = replace(SIMCLR_PROBE, epochs=2, batch_size=35), torch.get_rng_state()
    first, again, other = fit(probe)[0], fit(probe)[0], fit(probe, seed=6)[0]
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    assert torch.equal(torch.get_rng_state(), generator)


def test_autocast_is_for_the_encoder_alone() -> None:
    seen = []

    def forward(x: Tensor) -> Tensor:
        seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return F.avg_pool2d(x, SIZE // 2).flatten(1)

    probe = replace(SIMCLR_PROBE, epochs=2, batch_size=35)
    with torch.autocast("cpu", torch.bfloat16):
        classifier, _ = crop_classifier(forward, DIM, TRAIN, PREPROCESS, probe, seed=5, device=CPU)
    torch.testing.assert_close(classifier.weight, fit(probe)[0].weight, rtol=0, atol=1e-6)
    assert set(seen) == {(torch.float32, True)}


def test_few_images_are_pointed_out() -> None:
    message = "linear-sgd-simclr: 70 images make a single batch and 1 steps, of settings .* for batches of 4,096"
    with pytest.warns(UserWarning, match=message):
        fit(replace(SIMCLR_PROBE, epochs=1))


def test_weights_that_are_not_finite() -> None:
    probe = replace(SIMCLR_PROBE, epochs=3, batch_size=35)
    with pytest.raises(TrainingError, match="linear-sgd-simclr: its weights are not finite after 3 epochs"):
        crop_classifier(
            lambda x: 1e38 * F.avg_pool2d(x, 8).flatten(1), DIM, TRAIN, PREPROCESS, probe, seed=5, device=CPU
        )


@pytest.mark.parametrize("probe", [MAE_PROBE, SIMCLR_PROBE], ids=lambda probe: probe.protocol)
def test_evaluate_knows_it(probe: CropProbe, monkeypatch: pytest.MonkeyPatch) -> None:
    # The trust coefficient of LARS is 0.001, so that a short run needs a high learning rate.
    quick = replace(probe, base_lr=200.0 if probe is MAE_PROBE else 2.0, epochs=30, batch_size=35, warmup_epochs=0)
    monkeypatch.setitem(probes.CROP_PROBES, probe.protocol, quick)
    protocol: Any = probe.protocol
    encoder = Colours().train()
    report = evaluate(encoder, train=TRAIN, val=VAL, protocol=protocol, seed=3)
    assert (report.protocol, report.seed, report.n_train, report.n_val) == (protocol, 3, 70, 70)
    assert report.accuracy > 90
    assert cast(float, report.train_accuracy) > 90
    assert (report.settings["crop"], report.settings["momentum"]) == ([0.08, 1.0], 0.9)
    assert encoder.training
    features = Features(torch.randn(70, DIM), TRAIN.labels, TRAIN.classes, TRAIN.paths, "x")
    with pytest.raises(DataError, match=f"protocol='{protocol}': expected images as train"):
        evaluate(encoder, train=features, val=VAL, protocol=protocol)
    with pytest.raises(DataError, match="val=None: expected labelled images"):
        evaluate(encoder, train=TRAIN, protocol=protocol)


def test_a_vits_tokens_and_the_first_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(probes.CROP_PROBES, "linear-sgd-mae", replace(MAE_PROBE, epochs=1, batch_size=20))
    spec = resolve_encoder("vit_tiny", image_size=SIZE, patch_size=8)
    encoder = hub.attach(spec.build(), SIZE, 3, card={}).eval()
    options: dict[str, Any] = {"pooling": "token", "classes": 2, "protocol": "linear-sgd-mae"}
    report = evaluate(encoder, train=TRAIN, val=VAL, **options)
    assert (report.settings["pooling"], report.n_train, list(report.per_class)) == ("token", 47, ["a", "b"])
