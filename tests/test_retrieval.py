import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from vision_ssl import neighbours
from vision_ssl.errors import DataError
from vision_ssl.features import Features
from vision_ssl.neighbours import knn
from vision_ssl.report import Report
from vision_ssl.retrieval import average_precision, retrieval


def make(n: int, seed: int, n_classes: int = 4) -> Features:
    labels = torch.arange(n) % n_classes
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 6, generator=generator) + 0.5 * F.one_hot(labels, 6)
    names = tuple(f"class {label}" for label in range(n_classes))
    return Features(features, labels, names, tuple(map(str, range(n))), f"seed {seed}")


def slowly(gallery: Features, queries: Features, index: int, *, skip: int | None) -> tuple[float, list[float]]:
    """Average precision of one query by scikit-learn, and whether its nearest 1, 5, 10 have one of its class."""
    assert gallery.labels is not None
    assert queries.labels is not None
    keep = torch.arange(len(gallery)) != (-1 if skip is None else skip)
    similarity = F.cosine_similarity(gallery.features, queries.features[index][None])[keep].numpy()
    relevant = (gallery.labels == queries.labels[index])[keep].numpy()
    ranked = relevant[np.argsort(-similarity)]
    return float(average_precision_score(relevant, similarity)), [float(ranked[:k].any()) for k in (1, 5, 10)]


def check(report: Report, expected: list[tuple[float, list[float]]]) -> None:
    assert report.scores["mean_average_precision"] == pytest.approx(np.mean([precision for precision, _ in expected]))
    recalls = np.mean([recall for _, recall in expected], axis=0)
    assert [report.scores[f"recall_at_{k}"] for k in (1, 5, 10)] == pytest.approx(recalls)
    assert report.accuracy == pytest.approx(100 * recalls[0])
    assert recalls[0] < recalls[1] < recalls[2] < 1 or report.n_val < 40  # they can tell the ranks apart


@pytest.mark.parametrize("rows", [128, 7])
def test_retrieval_is_scikit_learns(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(neighbours, "QUERIES", rows)
    gallery, queries = make(60, 1, n_classes=6), make(45, 2, n_classes=6)
    report = retrieval(gallery, queries, seed=3)
    check(report, [slowly(gallery, queries, index, skip=None) for index in range(45)])
    assert (report.protocol, report.seed, report.n_train, report.n_val) == ("retrieval", 3, 60, 45)
    assert np.array_equal(report.predictions, knn(gallery, queries, k=1).predictions)


@pytest.mark.parametrize("rows", [128, 7])
def test_one_set_searches_itself_without_the_image_that_asks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(neighbours, "QUERIES", rows)
    every = make(48, 1, n_classes=6)
    report = retrieval(every)
    check(report, [slowly(every, every, index, skip=index) for index in range(48)])
    assert (report.protocol, report.n_train, report.n_val) == ("retrieval-leave-one-out", 47, 48)
    assert report.train_digest == report.val_digest == "seed 1"


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_average_precision_by_its_definition(found: list[bool]) -> None:
    precisions = [sum(found[: rank + 1]) / (rank + 1) for rank, hit in enumerate(found) if hit]
    expected = sum(precisions) / len(precisions) if precisions else 0.0
    assert average_precision(torch.tensor([found])).tolist() == pytest.approx([expected])


def test_a_query_whose_class_the_gallery_lacks_counts_zero() -> None:
    gallery, queries = make(40, 1), make(40, 2)
    assert gallery.labels is not None
    known = gallery.select(gallery.labels != 1)
    with pytest.warns(UserWarning, match="10 images of class 1 cannot be recognised"):
        report = retrieval(known, queries)
    assert queries.labels is not None
    others = queries.select(queries.labels != 1)
    for name, value in retrieval(known, others).scores.items():
        assert report.scores[name] == pytest.approx(value * 30 / 40)


def test_what_is_refused() -> None:
    with pytest.raises(DataError, match="gallery: 10 images of 1 class"):
        retrieval(make(40, 1).select(range(0, 40, 4)))
    with pytest.raises(DataError, match="val: holds the same images as train"):
        retrieval(make(40, 1), make(40, 1))
