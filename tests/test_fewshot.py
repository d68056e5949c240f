from collections import Counter
from typing import cast

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from vision_ssl import fewshot as module
from vision_ssl.errors import DataError, RecipeError
from vision_ssl.features import Features
from vision_ssl.fewshot import SHOTS, fewshot
from vision_ssl.logistic import Classifier, draw


def make(n: int, seed: int, n_classes: int = 6) -> Features:
    means = torch.randn(n_classes, 8, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % n_classes
    features = means[labels] + torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    names = tuple(f"class {label}" for label in range(n_classes))
    return Features(features, labels, names, tuple(map(str, range(n))), f"seed {seed}")


TRAIN, VAL = make(300, 1), make(120, 2)
LABELS = cast(Tensor, TRAIN.labels)


@pytest.mark.parametrize(
    ("protocol", "per_class"),
    [("fewshot-1", 1), ("fewshot-5", 5), ("fewshot-10", 10), ("fewshot-1-percent", 1), ("fewshot-10-percent", 5)],
)
def test_each_class_gives_its_share_in_each_draw(
    monkeypatch: pytest.MonkeyPatch, protocol: str, per_class: int
) -> None:
    seen: list[Tensor] = []

    def spy(features: Tensor, labels: Tensor, n_classes: int, l2: float) -> Classifier:
        seen.append(features)
        assert Counter(labels.tolist()) == dict.fromkeys(range(6), per_class)
        assert l2 == pytest.approx(1 / len(labels))
        return Classifier(torch.zeros(8), torch.zeros(8, n_classes), torch.zeros(n_classes))

    monkeypatch.setattr(module, "logistic_regression", spy)
    report = fewshot(TRAIN, VAL, protocol=protocol)
    assert (report.protocol, report.n_train, report.n_val) == (protocol, 6 * per_class, 120)
    assert len({features.sum().item() for features in seen}) == len(seen) == report.settings["draws"] == 20


def test_it_is_scikit_learns_classifier_draw_for_draw() -> None:
    report = fewshot(TRAIN, VAL, protocol="fewshot-5", draws=4, seed=7)
    generator = torch.Generator().manual_seed(7)
    accuracies = []
    for predictions in report.predictions:
        drawn = draw(LABELS, torch.full((6,), 5), generator)
        scaler = StandardScaler().fit(TRAIN.features[drawn].numpy())
        reference = LogisticRegression(C=1.0, tol=1e-8, max_iter=10_000)
        reference.fit(scaler.transform(TRAIN.features[drawn].numpy()), LABELS[drawn].numpy())
        expected = reference.predict(scaler.transform(VAL.features.numpy()))
        assert np.mean(predictions == expected) > 0.98
        accuracies.append(100 * np.mean(predictions == report.targets))
    assert report.settings["accuracies"] == pytest.approx(accuracies)
    assert report.accuracy == pytest.approx(np.mean(accuracies))
    assert report.scores["deviation"] == pytest.approx(np.std(accuracies, ddof=1))
    assert report.accuracy < report.scores["top5_accuracy"] < 100
    assert report.seed == 7


def test_more_labels_are_better_and_draws_differ_less() -> None:
    one, ten = (fewshot(TRAIN, VAL, protocol=protocol) for protocol in ("fewshot-1", "fewshot-10"))
    assert one.accuracy + 10 < ten.accuracy
    assert one.scores["deviation"] > ten.scores["deviation"] > 0


def test_the_same_seed_draws_the_same_images_for_any_encoder() -> None:
    other = Features(-3 * TRAIN.features + 5, TRAIN.labels, TRAIN.classes, TRAIN.paths, TRAIN.digest)
    mirrored = Features(-3 * VAL.features + 5, VAL.labels, VAL.classes, VAL.paths, VAL.digest)
    a, b = fewshot(TRAIN, VAL, protocol="fewshot-1", draws=3), fewshot(other, mirrored, protocol="fewshot-1", draws=3)
    assert np.mean(a.predictions == b.predictions) > 0.98  # standardised, they are the same but for a sign
    c = fewshot(TRAIN, VAL, protocol="fewshot-1", draws=3, seed=1)
    assert np.mean(a.predictions == c.predictions) < 0.95


def test_a_share_of_few_is_at_least_one() -> None:
    few = make(18, 1)
    assert fewshot(few, VAL, protocol="fewshot-1-percent", draws=2).n_train == 6
    single = few.select([0, 1, 2, 3, 4, 5, 6])
    assert fewshot(single, VAL, protocol="fewshot-10-percent", draws=2).n_train == 6


def test_a_class_that_train_lacks_is_named_and_the_others_are_drawn() -> None:
    with pytest.warns(UserWarning, match="val: 20 images of class 2 cannot be recognised"):
        report = fewshot(TRAIN.select(LABELS != 2), VAL, protocol="fewshot-5", draws=2)
    assert report.n_train == 25
    assert report.per_class["class 2"]["accuracy"] == 0


def test_what_is_refused() -> None:
    with pytest.raises(DataError, match=r"train: fewer than 5 images of class 1, class 2, .*expected as many of each"):
        fewshot(TRAIN.select(range(25)), VAL, protocol="fewshot-5")
    with pytest.raises(RecipeError, match="protocol='fewshot-7': expected one of fewshot-1, fewshot-5"):
        fewshot(TRAIN, VAL, protocol="fewshot-7")
    with pytest.raises(RecipeError, match="draws=1: expected at least 2"):
        fewshot(TRAIN, VAL, protocol="fewshot-5", draws=1)
    assert list(SHOTS) == ["fewshot-1", "fewshot-5", "fewshot-10", "fewshot-1-percent", "fewshot-10-percent"]
