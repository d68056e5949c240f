import sys
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans

from vision_ssl.clustering import cluster
from vision_ssl.errors import DataError, MissingExtraError
from vision_ssl.features import Features


def make(signal: float, *, n: int = 90, n_classes: int = 3) -> Features:
    labels = torch.arange(n) % n_classes
    noise = torch.randn(n, 6, generator=torch.Generator().manual_seed(1))
    features = signal * F.one_hot(labels, 6) + noise
    names = tuple(f"class {label}" for label in range(n_classes))
    return Features(features, labels, names, tuple(map(str, range(n))), "digest")


def entropy(shares: np.ndarray) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize("seed", range(4))  # k-means numbers its clusters otherwise
def test_scores_are_their_definitions(seed: int) -> None:
    features = make(2.0)
    assert features.labels is not None
    labels = features.labels.numpy()
    report = cluster(features, seed=seed)
    found = KMeans(3, n_init=10, random_state=seed).fit_predict(F.normalize(features.features).numpy())
    joint = np.zeros((3, 3))
    np.add.at(joint, (found, labels), 1 / 90)

    mutual = entropy(joint.sum(axis=0)) + entropy(joint.sum(axis=1)) - entropy(joint.ravel())
    mean = (entropy(joint.sum(axis=0)) + entropy(joint.sum(axis=1))) / 2
    assert report.scores["nmi"] == pytest.approx(mutual / mean)

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    together, by_cluster, by_class = (pairs(90 * joint.sum(axis=axis)) for axis in ((), 1, 0))
    expected = by_cluster * by_class / (90 * 89 / 2)
    ari = (together - expected) / ((by_cluster + by_class) / 2 - expected)
    assert report.scores["ari"] == pytest.approx(ari)

    best = max(np.mean(np.array(classes)[found] == labels) for classes in permutations(range(3)))
    assert report.accuracy == pytest.approx(100 * best)
    assert 60 < report.accuracy < 100
    assert (report.protocol, report.seed, report.n_train, report.n_val) == ("cluster", seed, 90, 90)
    assert report.train_digest == report.val_digest == "digest"


def test_classes_far_apart_are_found() -> None:
    report = cluster(make(20.0))
    assert report.accuracy == 100
    assert report.scores == {"nmi": pytest.approx(1), "ari": pytest.approx(1)}


def test_lengths_do_not_count() -> None:
    features = make(2.0)
    longer = torch.rand(90, 1, generator=torch.Generator().manual_seed(0)) * 9 + 1
    scaled = Features(features.features * longer, features.labels, features.classes, features.paths, "other")
    assert np.array_equal(cluster(scaled).predictions, cluster(features).predictions)


def test_classes_without_images_get_no_cluster() -> None:
    features = make(20.0, n_classes=4)
    assert features.labels is not None
    report = cluster(features.select(features.labels != 1))
    assert (report.accuracy, report.settings["clusters"]) == (100, 3)
    assert report.per_class["class 1"]["support"] == 0


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="features: 30 images of 1 class"):
        cluster(make(1.0).select(range(0, 90, 3)))
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(MissingExtraError, match=r'scikit-learn is not installed: pip install "vision-ssl\[eval\]"'):
        cluster(make(1.0))
