from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssl import linear_sgd as module
from vision_ssl.errors import DataError
from vision_ssl.features import Features
from vision_ssl.linear_sgd import STUDY_B, SWEEP, SGDProbe, sgd_classifier
from vision_ssl.logistic import hold_out
from vision_ssl.probe import evaluate, linear_sgd

CLASSES = 4


def make(n: int, seed: int, *, signal: float = 0.4, dim: int = 12) -> Features:
    """Features of overlapping classes, each dimension with a scale and a shift of its own."""
    fixed = torch.Generator().manual_seed(99)
    means = signal * torch.randn(CLASSES, dim, generator=fixed)
    labels = torch.arange(n) % CLASSES
    noise = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    features = (means[labels] + noise) * torch.logspace(-1, 1, dim) + 3
    names = tuple(f"class {label}" for label in range(CLASSES))
    return Features(features, labels, names, tuple(map(str, range(n))), f"{seed:064}")


TRAIN, VAL = make(203, 1), make(120, 2)


def labels_of(features: Features) -> Tensor:
    assert features.labels is not None
    return features.labels


def direct(features: Features, probe: SGDProbe, seed: int) -> nn.Sequential:
    """The probe as one writes it with torch's own parts."""
    generator = torch.Generator().manual_seed(seed)
    dim, labels = features.features.shape[1], labels_of(features)
    layer = nn.Linear(dim, CLASSES)
    bound = 1 / dim**0.5
    start = torch.empty(dim + 1, CLASSES).uniform_(-bound, bound, generator=generator)
    layer.weight.data, layer.bias.data = start[:-1].T.clone(), start[-1].clone()
    model = nn.Sequential(nn.BatchNorm1d(dim, affine=False) if probe.batch_norm else nn.Identity(), layer)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=probe.lrs[0], momentum=probe.momentum, weight_decay=probe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=probe.epochs)
    for _ in range(probe.epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(probe.batch_size):
            if len(rows) > 1:
                F.cross_entropy(model(features.features[rows]), labels[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "probe",
    [
        STUDY_B,
        replace(STUDY_B, batch_size=64),
        replace(STUDY_B, batch_size=101),  # leaves a batch of one image, which has no variance
        replace(STUDY_B, batch_size=64, batch_norm=False, lrs=(0.001,), weight_decay=0.01, momentum=0.5),
    ],
    ids=["as it is", "small batches", "a rest of one", "without BatchNorm"],
)
def test_it_is_what_torchs_own_parts_do_step_for_step(probe: SGDProbe) -> None:
    [classifier] = module._fit(TRAIN.features, labels_of(TRAIN), CLASSES, probe, 5, "cpu")
    expected = direct(TRAIN, probe, 5)(VAL.features)
    logits = (VAL.features - classifier.mean) @ classifier.weight + classifier.bias
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_study_b_is_what_the_study_says() -> None:
    assert (
        SGDProbe(
            protocol="linear-sgd-study-b",
            lrs=(0.1,),
            epochs=40,
            batch_size=512,
            momentum=0.9,
            weight_decay=1e-4,
            batch_norm=True,
        )
        == STUDY_B
    )


def test_learning_rates_do_not_meet() -> None:
    probe = replace(SWEEP, epochs=3, batch_size=64)
    together = module._fit(TRAIN.features, labels_of(TRAIN), CLASSES, probe, 0, "cpu")
    assert len(together) == len(probe.lrs) == 9
    for lr, classifier in zip(probe.lrs, together, strict=True):
        [alone] = module._fit(TRAIN.features, labels_of(TRAIN), CLASSES, replace(probe, lrs=(lr,)), 0, "cpu")
        torch.testing.assert_close(classifier.weight, alone.weight, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(classifier.bias, alone.bias, atol=1e-5, rtol=1e-4)


def test_the_learning_rate_is_the_most_accurate_on_held_out_images() -> None:
    probe = replace(SWEEP, epochs=5, batch_size=64, lrs=(1e-4, 1e-3, 1e-2, 1e-1, 1e3))
    labels = labels_of(TRAIN)
    classifier, settings = sgd_classifier(TRAIN.features, labels, CLASSES, probe, seed=6, device="cpu")
    held = hold_out(labels, torch.Generator().manual_seed(6))
    part = TRAIN.select(~held)
    hits = []
    for lr in probe.lrs:
        logits = direct(part, replace(probe, lrs=(lr,)), 6)(TRAIN.features[held])
        hits.append(int((logits.argmax(dim=1) == labels[held]).sum()))
    assert max(hits) not in (hits[0], hits[-1])
    assert settings["lr"] == probe.lrs[hits.index(max(hits))]
    assert (settings["selection_fitted_on"], settings["selection_scored_on"]) == (len(part), 203 - len(part))
    assert settings["selection_accuracy"] == 100 * max(hits) / int(held.sum())
    assert not settings["lr_at_grid_edge"]
    [on_all] = module._fit(TRAIN.features, labels, CLASSES, replace(probe, lrs=(settings["lr"],)), 6, "cpu")
    assert torch.equal(classifier.weight, on_all.weight)


def test_of_equally_accurate_learning_rates_the_lowest_is_taken() -> None:
    easy, probe = make(40, 1, signal=30), replace(SWEEP, lrs=(0.1, 0.2, 0.3))
    settings = sgd_classifier(easy.features, labels_of(easy), CLASSES, probe, seed=0, device="cpu")[1]
    assert settings["lr"] == 0.1
    assert settings["lr_at_grid_edge"]


def test_report() -> None:
    report = linear_sgd(TRAIN, VAL, seed=4)
    assert report.protocol == "linear-sgd"
    assert report.settings["lr"] in SWEEP.lrs
    assert {name: report.settings[name] for name in ("epochs", "batch_size", "momentum", "weight_decay")} == {
        "epochs": 40,
        "batch_size": 512,
        "momentum": 0.9,
        "weight_decay": 0.0,
    }
    assert report.accuracy > 60
    assert report.train_accuracy is not None
    assert report.train_accuracy >= report.accuracy
    assert (report.n_train, report.n_val, report.seed) == (203, 120, 4)


def test_the_losses_of_a_report_are_those_of_the_classifier() -> None:
    report = linear_sgd(TRAIN, VAL, probe=STUDY_B, seed=4)
    logits = direct(TRAIN, STUDY_B, 4)(TRAIN.features)
    assert report.train_loss == pytest.approx(float(F.cross_entropy(logits, labels_of(TRAIN))), rel=1e-5)
    hits = (logits.argmax(dim=1) == labels_of(TRAIN)).double().mean()
    assert report.train_accuracy == pytest.approx(100 * float(hits))


def test_seed_draws_weights_and_batches_anew() -> None:
    losses = [linear_sgd(TRAIN, VAL, probe=STUDY_B, seed=seed).train_loss for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_validation_labels_choose_nothing() -> None:
    shuffled = replace(VAL, labels=labels_of(VAL).roll(1))
    report, other = linear_sgd(TRAIN, VAL), linear_sgd(TRAIN, shuffled)
    assert report.settings == other.settings
    assert np.array_equal(report.predictions, other.predictions)
    assert report.accuracy != other.accuracy


@pytest.mark.parametrize("protocol", ["linear-sgd", "linear-sgd-study-b"])
def test_evaluate_knows_it_by_its_protocol(protocol: Any) -> None:
    report = evaluate(nn.Identity(), train=TRAIN, val=VAL, protocol=protocol, seed=2)
    assert (report.protocol, report.seed) == (protocol, 2)


def test_a_choice_needs_an_image_to_hold_out() -> None:
    few = TRAIN.select(range(CLASSES))
    with pytest.raises(DataError, match="train: 4 images of as many classes, expected two of a class"):
        linear_sgd(few, VAL)
    assert linear_sgd(few, VAL, probe=STUDY_B).n_train == CLASSES  # which chooses nothing
