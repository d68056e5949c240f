from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from vision_ssl import logistic, neighbours, probe
from vision_ssl.data import ImageSet, Preprocess
from vision_ssl.errors import DataError, RecipeError
from vision_ssl.features import Features
from vision_ssl.logistic import Classifier, choose_l2, logistic_regression
from vision_ssl.neighbours import knn, knn_sweep
from vision_ssl.options import Protocol
from vision_ssl.probe import evaluate, linear, resubstitution
from vision_ssl.report import Report


def make(n: int, dim: int, n_classes: int, *, signal: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated features of classes whose means are `signal` deviations apart; the same classes for each seed."""
    fixed = torch.Generator().manual_seed(99)
    means = signal * torch.randn(n_classes, dim, generator=fixed)
    mixing = torch.randn(dim, dim, generator=fixed) / torch.arange(1, dim + 1).sqrt()[:, None]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % n_classes
    return means[labels] + torch.randn(n, dim, generator=generator) @ mixing, labels


def wrap(features: Tensor, labels: Tensor | None, name: str, n_classes: int = 3) -> Features:
    classes = tuple(f"class {label}" for label in range(n_classes)) if labels is not None else ()
    return Features(features, labels, classes, tuple(map(str, range(len(features)))), name)


def pair(n: int = 90, dim: int = 8, n_classes: int = 3, signal: float = 0.5) -> tuple[Features, Features]:
    train, val = (make(n, dim, n_classes, signal=signal, seed=seed) for seed in (1, 2))
    return wrap(*train, "train", n_classes), wrap(*val, "val", n_classes)


def standardised(features: Tensor) -> Tensor:
    std, mean = torch.std_mean(features.double(), dim=0, correction=0)
    return (features - mean) / torch.where(std > 1e-6, std, 1)


def objective(features: Tensor, labels: Tensor, l2: float, weight: Tensor, bias: Tensor) -> float:
    cross_entropy = F.cross_entropy(features @ weight + bias, labels)
    return float(cross_entropy + l2 / 2 * weight.square().sum())


def objective_of(fitted: Classifier, features: Tensor, labels: Tensor, l2: float) -> float:
    std = features.double().std(dim=0, correction=0)
    return objective(standardised(features), labels, l2, fitted.weight * std[:, None], fitted.bias.double())


# --- logistic regression -------------------------------------------------------------------------------------


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize(("n", "dim", "n_classes"), [(300, 20, 5), (40, 60, 3), (200, 10, 2)])
def test_logistic_regression_is_scikit_learns(n: int, dim: int, n_classes: int, l2: float) -> None:
    features, labels = make(n, dim, n_classes, signal=0.3)
    features = 100 + features * torch.logspace(-2, 3, dim)  # each dimension has a scale of its own
    fitted = logistic_regression(features, labels, n_classes, l2)

    x = standardised(features)
    # Of two classes scikit-learn fits one vector: the difference of ours, whose penalty is half as large.
    strength = 1 / (n * l2) if n_classes > 2 else 2 / (n * l2)
    reference = LogisticRegression(C=strength, tol=1e-10, max_iter=100_000).fit(x.numpy(), labels.numpy())
    weight, bias = torch.from_numpy(reference.coef_.T), torch.from_numpy(reference.intercept_)
    if n_classes == 2:
        weight, bias = torch.cat([-weight, weight], dim=1) / 2, torch.cat([-bias, bias]) / 2
    expected = objective(x, labels, l2, weight, bias)

    assert objective_of(fitted, features, labels, l2) == pytest.approx(expected, rel=1e-4)
    agree = fitted.predict(features).numpy() == reference.predict(x.numpy())
    assert agree.mean() >= 0.99


@pytest.mark.parametrize(("signal", "l2"), [(0.05, 1e-2), (0.3, 1e-3), (0.3, 1e-5), (2.0, 1e-6)])
def test_the_solver_arrives_where_scikit_learn_does(signal: float, l2: float) -> None:
    """From classes that overlap to classes that are separable, where probabilities underflow."""
    features, labels = make(1500, 48, 10, signal=signal)
    x = standardised(features)
    reference = LogisticRegression(C=1 / (1500 * l2), tol=1e-9, max_iter=100_000).fit(x.numpy(), labels.numpy())
    weight, bias = torch.from_numpy(reference.coef_.T), torch.from_numpy(reference.intercept_)
    expected = objective(x, labels, l2, weight, bias)
    fitted = logistic_regression(features, labels, 10, l2)
    assert objective_of(fitted, features, labels, l2) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@settings(deadline=None, max_examples=15)
@given(shift=st.floats(-100, 100), scale=st.floats(0.1, 100), l2=st.sampled_from([1e-1, 1e-3]), dim=st.integers(1, 30))
def test_logistic_regression_does_not_see_shift_and_scale(shift: float, scale: float, l2: float, dim: int) -> None:
    features, labels = make(60, dim, 3)
    moved = features * scale + shift
    plain, other = (logistic_regression(x, labels, 3, l2) for x in (features, moved))
    logits, moved_logits = ((x - fit.mean) @ fit.weight + fit.bias for x, fit in ((features, plain), (moved, other)))
    torch.testing.assert_close(logits, moved_logits, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("rounding", [0, 2e-8])
def test_a_constant_feature_changes_nothing(rounding: float) -> None:
    features, labels = make(90, 6, 3, signal=0.3)
    constant = 0.1 + rounding * (labels == 1).float()[:, None]  # as if the kernels had rounded one class otherwise
    assert len(constant.unique()) == (2 if rounding else 1)
    fitted = logistic_regression(torch.cat([features, constant], dim=1), labels, 3, 1e-2)
    assert fitted.weight[-1].abs().max() == 0
    plain = logistic_regression(features, labels, 3, 1e-2)
    torch.testing.assert_close(fitted.weight[:-1], plain.weight, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(("n", "dim", "rank"), [(90, 6, 6), (20, 50, 20)])
def test_work_grows_with_the_smaller_of_images_and_dimensions(n: int, dim: int, rank: int) -> None:
    features, _ = make(n, dim, 3)
    axes = logistic._Axes.of(features)
    assert axes.rotation.shape == (dim, rank)
    projected = axes.project(features).double()
    torch.testing.assert_close(
        projected @ projected.T, standardised(features) @ standardised(features).T, atol=1e-3, rtol=1e-3
    )
    covariance = projected.T @ projected
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3 * covariance.max()


def test_features_that_are_all_constant() -> None:
    labels = torch.tensor([0, 1, 1, 1, 2])
    fitted = logistic_regression(torch.ones(5, 4), labels, 3, 1e-2)
    assert fitted.predict(torch.ones(5, 4)).tolist() == [1] * 5


def test_a_class_without_images_is_never_predicted() -> None:
    features, labels = make(90, 6, 3)
    assert set(logistic_regression(features, labels * 2, 6, 1e-4).predict(features).tolist()) == {0, 2, 4}


def test_small_blocks_give_the_same_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = make(50, 6, 3, signal=0.3)
    whole = logistic_regression(features, labels, 3, 1e-2)
    monkeypatch.setattr(logistic, "BLOCK", 21)
    parts = logistic_regression(features, labels, 3, 1e-2)
    torch.testing.assert_close(parts.weight, whole.weight, atol=1e-3, rtol=1e-2)
    assert torch.equal(parts.predict(features), whole.predict(features))


def test_solver_says_when_it_did_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "MAX_BURSTS", 1)
    with pytest.warns(UserWarning, match="did not converge in 10 iterations"):
        logistic_regression(*make(90, 6, 3), 3, 1e-3)


# --- the choice of l2 ----------------------------------------------------------------------------------------


def test_l2_follows_the_noise() -> None:
    weak, strong = (choose_l2(*make(300, 10, 3, signal=signal), 3, seed=0)["l2"] for signal in (2.0, 0.05))
    assert weak < 0.02 < strong


def test_l2_is_the_best_of_the_grid_on_held_out_images(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = make(200, 20, 4, signal=0.3)
    monkeypatch.setattr(logistic, "PATIENCE", 100)
    chosen = choose_l2(features, labels, 4, seed=3)
    held = logistic._stratified(labels, 0.2, torch.Generator().manual_seed(3))
    losses = []
    for l2 in logistic.L2_GRID:
        fitted = logistic_regression(features[~held], labels[~held], 4, l2)
        logits = (features[held] - fitted.mean) @ fitted.weight + fitted.bias
        losses.append(float(F.cross_entropy(logits, labels[held])))
    assert chosen["l2_of_selection"] == logistic.L2_GRID[int(np.argmin(losses))]
    monkeypatch.undo()
    assert choose_l2(features, labels, 4, seed=3) == chosen  # stopping early found the same


def test_l2_weighs_against_all_images_as_it_did_against_those_it_was_chosen_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logistic, "SELECTION_IMAGES", 100)
    chosen = choose_l2(*make(400, 10, 4, signal=0.3), 4, seed=0)
    assert (chosen["selection_fitted_on"], chosen["selection_scored_on"]) == (80, 20)
    assert chosen["l2"] == pytest.approx(chosen["l2_of_selection"] * 80 / 400)


@pytest.mark.parametrize(("grid", "edge"), [((1e-1, 1e-2), True), ((1e4, 1e-1, 1e-2, 1e-7, 1e-8), False)])
def test_an_l2_at_the_edge_of_the_grid_is_noted(
    monkeypatch: pytest.MonkeyPatch, grid: tuple[float, ...], edge: bool
) -> None:
    monkeypatch.setattr(logistic, "L2_GRID", grid)
    assert choose_l2(*make(300, 10, 3, signal=0.3), 3, seed=0)["l2_at_grid_edge"] is edge


def test_l2_needs_an_image_to_hold_out() -> None:
    features = wrap(torch.randn(3, 4), torch.arange(3), "train")
    with pytest.raises(DataError, match="train: 3 images of as many classes, expected two of a class"):
        linear(features, wrap(torch.randn(3, 4), torch.arange(3), "val"))


@settings(deadline=None, max_examples=50)
@given(
    labels=arrays.arrays(np.int64, st.integers(1, 60), elements=st.integers(0, 5)),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 9),
)
def test_stratified_takes_its_share_of_each_class(labels: np.ndarray, fraction: float, seed: int) -> None:
    chosen = logistic._stratified(torch.from_numpy(labels), fraction, torch.Generator().manual_seed(seed)).numpy()
    for label in np.unique(labels):
        count, taken = np.sum(labels == label), np.sum(chosen[labels == label])
        assert taken == 0 if count == 1 else 1 <= taken < count
        assert abs(taken - fraction * count) <= 1
    again = logistic._stratified(torch.from_numpy(labels), fraction, torch.Generator().manual_seed(seed))
    assert np.array_equal(again, chosen)


def test_stratified_is_random() -> None:
    labels = torch.zeros(20, dtype=torch.int64)
    masks = {tuple(logistic._stratified(labels, 0.5, torch.Generator().manual_seed(s)).tolist()) for s in range(5)}
    assert len(masks) == 5


# --- the linear probe ----------------------------------------------------------------------------------------


def test_linear_probe() -> None:
    train, val = pair(n=300, signal=0.6)
    report = linear(train, val, seed=5)
    assert report.protocol == "linear"
    assert report.accuracy > 80
    assert report.train_accuracy is not None
    assert report.train_accuracy >= report.accuracy
    assert (report.n_train, report.n_val, report.seed) == (300, 300, 5)
    assert (report.train_digest, report.val_digest) == ("train", "val")
    assert report.settings["l2"] > 0
    assert report.targets.tolist() == cast(Tensor, val.labels).tolist()
    assert np.mean(report.predictions == report.targets) == pytest.approx(report.accuracy / 100)
    fitted = logistic_regression(train.features, cast(Tensor, train.labels), 3, report.settings["l2"])
    logits = (train.features - fitted.mean) @ fitted.weight + fitted.bias
    loss = float(F.cross_entropy(logits, cast(Tensor, train.labels)))
    assert report.train_loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.filterwarnings("ignore:resubstitution")
def test_autocast_around_an_encoder_changes_nothing_of_a_probe() -> None:
    train, val = pair(n=600, dim=20, n_classes=3, signal=0.2)

    def measure() -> list[Report]:
        return [linear(train, val), resubstitution(val)]

    expected = measure()
    with torch.autocast("cpu", torch.bfloat16):
        found = measure()
    for again, report in zip(found, expected, strict=True):
        assert np.array_equal(again.predictions, report.predictions)
        assert (again.train_accuracy, again.train_loss) == (report.train_accuracy, report.train_loss)
        assert again.settings == report.settings


def test_top5_is_scikit_learns() -> None:
    train, val = pair(n=280, n_classes=7, signal=0.3)
    report = linear(train, val)
    fitted = logistic_regression(train.features, cast(Tensor, train.labels), 7, report.settings["l2"])
    logits = fitted.logits(val.features).numpy()
    assert report.scores == {"top5_accuracy": pytest.approx(100 * top_k_accuracy_score(report.targets, logits, k=5))}
    assert report.accuracy < report.scores["top5_accuracy"] < 100
    assert linear(*pair(n_classes=5)).scores == {}


def test_validation_labels_choose_nothing() -> None:
    train, val = pair()
    shuffled = wrap(val.features, cast(Tensor, val.labels).roll(1), "val")
    report, other = linear(train, val), linear(train, shuffled)
    assert report.settings == other.settings
    assert np.array_equal(report.predictions, other.predictions)
    assert report.accuracy != other.accuracy


def test_validation_features_do_not_move_each_other() -> None:
    train, val = pair()
    alone = linear(train, val.select([7])).predictions
    assert alone.tolist() == linear(train, val).predictions[[7]].tolist()


def test_the_trap_of_resubstitution() -> None:
    """Features without any information look perfect to it, and are at chance for the held-out probe."""
    train, val = pair(n=60, dim=80, signal=0)
    with pytest.warns(UserWarning, match="this is a training accuracy"):
        trap = resubstitution(val, seed=2)
    assert trap.protocol == "resubstitution"
    assert trap.accuracy == trap.train_accuracy == 100
    assert (trap.n_train, trap.n_val, trap.seed) == (60, 60, 2)
    assert trap.train_digest == trap.val_digest == "val"
    assert linear(train, val).accuracy < 60


# --- kNN -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30, derandomize=True)  # votes that differ by a rounding may go either way
@given(k=st.integers(1, 40), temperature=st.sampled_from([0.02, 0.07, 1.0, None]), seed=st.integers(0, 99))
def test_knn_is_scikit_learns(k: int, temperature: float | None, seed: int) -> None:
    features, labels = make(40, 6, 4, seed=seed)
    queries, targets = make(30, 6, 4, seed=seed + 100)
    weights: Any = "uniform" if temperature is None else lambda distance: np.exp((1 - distance) / temperature)
    reference = KNeighborsClassifier(k, weights=weights, metric="cosine", algorithm="brute")
    reference.fit(features.double().numpy(), labels.numpy())
    report = knn(wrap(features, labels, "a", 4), wrap(queries, targets, "b", 4), k=k, temperature=temperature)
    assert np.array_equal(report.predictions, reference.predict(queries.double().numpy()))


@settings(deadline=None, max_examples=20, derandomize=True)
@given(k=st.integers(1, 40), seed=st.integers(0, 99))
def test_euclidean_knn_is_scikit_learns(k: int, seed: int) -> None:
    features, labels = make(40, 6, 4, seed=seed)
    queries, targets = make(30, 6, 4, seed=seed + 100)
    reference = KNeighborsClassifier(k, algorithm="brute").fit(features.double().numpy(), labels.numpy())
    train, val = wrap(features, labels, "a", 4), wrap(queries, targets, "b", 4)
    report = knn(train, val, k=k, temperature=None, metric="euclidean")
    assert np.array_equal(report.predictions, reference.predict(queries.double().numpy()))


def test_of_unit_vectors_both_metrics_are_the_same() -> None:
    train, val = (wrap(F.normalize(part.features), part.labels, part.digest) for part in pair())
    cosine = knn(train, val, k=5, temperature=None)
    assert np.array_equal(knn(train, val, k=5, temperature=None, metric="euclidean").predictions, cosine.predictions)


def test_knn_report() -> None:
    train, val = pair()
    report = knn(train, val, seed=4)
    assert report.protocol == "knn-20"
    assert report.settings == {"k": 20, "temperature": 0.07, "metric": "cosine"}
    assert report.train_accuracy is report.train_loss is None
    assert (report.n_train, report.n_val, report.seed) == (90, 90, 4)
    assert report.targets.tolist() == cast(Tensor, val.labels).tolist()
    assert knn(train, val, k=5, temperature=None).protocol == "knn-5-unweighted"
    euclidean = knn(train, val, k=5, temperature=None, metric="euclidean")
    assert euclidean.protocol == "knn-5-unweighted-euclidean"


def test_knn_compares_directions_and_not_lengths() -> None:
    train, val = pair()
    lengths = torch.rand(90, 1) + 0.1
    scaled = wrap(train.features * lengths, train.labels, "scaled")
    assert np.array_equal(knn(scaled, val).predictions, knn(train, val).predictions)


def test_knn_never_holds_more_than_a_block_of_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = pair()
    expected = knn(train, val, k=3).predictions
    sizes = []
    vote = neighbours._vote

    def spy(similarity: Tensor, *args: Any) -> Iterator[Tensor]:
        sizes.append(similarity.numel())
        return vote(similarity, *args)

    monkeypatch.setattr(neighbours, "_vote", spy)
    monkeypatch.setattr(neighbours, "BLOCK", 700)
    assert np.array_equal(knn(train, val, k=3).predictions, expected)
    assert max(sizes) <= 700
    assert sum(sizes) == 90 * 90


@settings(deadline=None, max_examples=100)
@given(
    similarity=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 30)),
        elements=st.integers(-2, 2).map(float),
    ),
    group=st.sampled_from([1, 2, 3, neighbours.GROUP]),
    data=st.data(),
)
def test_of_equally_near_neighbours_the_first_count(similarity: np.ndarray, group: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, similarity.shape[1]))
    expected = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "GROUP", group)
        nearest = neighbours._nearest(torch.from_numpy(similarity), k).numpy()
    assert np.array_equal(np.sort(nearest, axis=1), np.sort(expected, axis=1))


@pytest.mark.parametrize("levels", [20, 1000, 1 << 23])  # many equal similarities, some, hardly any
@pytest.mark.parametrize("n", [300, 1003])  # too few for groups, and groups with columns to spare
def test_nearest_are_the_first_of_a_full_sort(n: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(n)
    similarity = torch.randint(levels, (200, n), generator=generator).float() / levels
    similarity[:100] = similarity[:100].sort(dim=1).values  # the largest side by side, in the last columns
    expected = similarity.argsort(dim=1, descending=True, stable=True)[:, :20]
    nearest = neighbours._nearest(similarity, 20)
    assert torch.equal(nearest.sort(dim=1).values, expected.sort(dim=1).values)


def test_of_classes_with_equal_votes_the_first_wins() -> None:
    train = wrap(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([2, 1]), "train")
    val = wrap(torch.tensor([[1.0, 1.0]]), torch.tensor([0]), "val")
    with pytest.warns(UserWarning, match="cannot be recognised"):
        assert knn(train, val, k=2).predictions.tolist() == [1]


def test_knn_at_a_very_low_temperature_is_the_nearest_neighbour() -> None:
    train, val = pair()
    assert np.array_equal(knn(train, val, temperature=1e-6).predictions, knn(train, val, k=1).predictions)


def test_knn_of_features_that_are_all_zero() -> None:
    train, val = pair()
    with pytest.warns(UserWarning, match="train: all 90 features are equal"):
        report = knn(wrap(torch.zeros(90, 8), train.labels, "zero"), val, k=2)
    assert report.predictions.tolist() == [0] * 90


@pytest.mark.parametrize("temperature", [0.07, None])
@pytest.mark.parametrize("given", [1, 2])
def test_several_k_by_one_search_are_what_each_is_alone(given: int, temperature: float | None) -> None:
    parts = pair(signal=0.2)[:given]
    ks = (40, 1, 7)
    for k, report in zip(ks, knn_sweep(*parts, ks=ks, temperature=temperature, seed=3), strict=True):
        alone = knn(*parts, k=k, temperature=temperature, seed=3)
        assert (report.protocol, report.settings, report.scores) == (alone.protocol, alone.settings, alone.scores)
        assert np.array_equal(report.predictions, alone.predictions)
        assert report.interval == alone.interval


@pytest.mark.parametrize("options", [{}, {"temperature": None, "metric": "euclidean"}])
def test_leave_one_out_is_each_image_against_the_others(monkeypatch: pytest.MonkeyPatch, options: Any) -> None:
    every = pair(signal=0.2)[0]
    report = knn(every, k=5, **options)
    assert report.protocol == "knn-5" + ("-unweighted-euclidean" if options else "") + "-leave-one-out"
    assert (report.n_train, report.n_val, report.train_digest, report.val_digest) == (89, 90, "train", "train")
    others = torch.arange(90)
    for index in range(0, 90, 7):
        alone = knn(every.select(others != index), every.select([index]), k=5, **options)
        assert report.predictions[index] == alone.predictions[0]
    monkeypatch.setattr(neighbours, "QUERIES", 13)
    assert np.array_equal(knn(every, k=5, **options).predictions, report.predictions)


def test_a_sweep_needs_a_k() -> None:
    with pytest.raises(RecipeError, match="k: got none, expected at least one number of neighbours"):
        knn_sweep(*pair(), ks=())


def test_leave_one_out_has_one_neighbour_less() -> None:
    every = pair()[0]
    assert knn(every, k=89).n_train == 89
    with pytest.raises(RecipeError, match="k=90: expected 1 to 89"):
        knn(every, k=90)


def test_top5_of_votes_counts_classes_that_have_one() -> None:
    labels = torch.arange(8)
    train = wrap(torch.eye(8), labels, "train", 8)
    close = wrap(0.1 * torch.arange(8, 0, -1).repeat(8, 1) + torch.eye(8) * 1e-3, labels, "val", 8)
    five, six = (knn(train, close, k=k, temperature=None) for k in (5, 6))
    assert five.scores == {"top5_accuracy": 100 * 5 / 8}  # the five nearest are images of classes 0 to 4
    assert six.scores == {"top5_accuracy": 100 * 5 / 8}  # of six votes that are alike, the first five classes
    assert knn(train, close, k=4).scores == {}
    alike = torch.tensor([0, 0, 0, 0, 0, 1, 2])  # five neighbours of class 0 leave no vote to any other
    train = wrap(F.one_hot(alike, 3).float(), alike, "train", 8)
    queries = wrap(torch.tensor([[9.0, 1.0, 0.0]] * 2), torch.tensor([0, 1]), "val", 8)
    assert knn(train, queries, k=5, temperature=None).scores == {"top5_accuracy": 50}


# --- what is refused -----------------------------------------------------------------------------------------


def with_value(features: Features, value: float) -> Features:
    changed = features.features.clone()
    changed[[4, 7], 2] = value
    return wrap(changed, features.labels, features.digest)


TRAIN, VAL = pair()


@pytest.mark.parametrize("measure", [linear, knn])
@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (wrap(TRAIN.features, None, "t"), VAL, "train: got 90 features without labels"),
        (TRAIN, wrap(VAL.features, None, "v"), "val: got 90 features without labels"),
        (with_value(TRAIN, float("nan")), VAL, "train: 2 of 90 features hold NaN or infinity, the first is of 4"),
        (TRAIN, with_value(VAL, float("-inf")), "val: 2 of 90 features hold NaN or infinity, the first is of 4"),
        (
            wrap(TRAIN.features, torch.ones(90, dtype=torch.int64), "t"),
            VAL,
            "train: 90 images of 1 class, expected at least 2",
        ),
        (TRAIN, wrap(VAL.features[:, :5], VAL.labels, "v"), "val: features have width 5, expected 8 as in train"),
        (
            TRAIN,
            wrap(VAL.features, VAL.labels, "v", 4),
            "val: class 3 is 'class 3', expected None as in train",
        ),
        (
            TRAIN,
            Features(VAL.features, VAL.labels, ("class 0", "x", "class 2"), VAL.paths, "v"),
            "val: class 1 is 'x', expected 'class 1' as in train",
        ),
        (TRAIN, TRAIN, "val: holds the same images as train, expected others"),
        (TRAIN, VAL.select([]), "predictions: got 0 for 0 targets"),
        (
            replace(TRAIN, encoder="resnet18"),
            replace(VAL, encoder="resnet34"),
            "val: encoder of the features is 'resnet34', expected 'resnet18' as in train",
        ),
        (
            replace(TRAIN, preprocess="at 64 px"),
            replace(VAL, preprocess="at 32 px"),
            "val: preprocess of the features is 'at 32 px', expected 'at 64 px' as in train",
        ),
    ],
)
def test_features_that_a_probe_refuses(measure: Any, train: Features, val: Features, message: str) -> None:
    with pytest.raises(DataError, match=message):
        measure(train, val)


@pytest.mark.parametrize("measure", [linear, knn])
def test_a_class_that_only_validation_has_is_named(measure: Any) -> None:
    train = TRAIN.select(cast(Tensor, TRAIN.labels) != 1)
    with pytest.warns(UserWarning, match="val: 30 images of class 1 cannot be recognised") as caught:
        report = measure(train, VAL)
    assert caught[0].filename == __file__
    assert report.per_class["class 1"]["accuracy"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0: expected 1 to 90"),
        ({"k": 91}, "k=91: expected 1 to 90, the number of training images"),
        ({"temperature": 0.0}, "temperature=0.0: expected above 0"),
        ({"temperature": float("nan")}, "temperature=nan: expected above 0"),
        ({"metric": "manhattan"}, "metric='manhattan': expected 'cosine' or 'euclidean'"),
        ({"metric": "euclidean"}, "temperature=0.07: expected None, since votes by Euclidean distance count alike"),
    ],
)
def test_settings_that_knn_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        knn(TRAIN, VAL, **options)


@pytest.mark.filterwarnings("ignore:resubstitution")
@pytest.mark.parametrize(
    ("features", "message"),
    [
        (wrap(VAL.features, None, "v"), "features: got 90 features without labels"),
        (with_value(VAL, float("nan")), "features: 2 of 90 features hold NaN"),
        (VAL.select([0, 3]), "features: 2 images of 1 class"),
    ],
)
def test_features_that_resubstitution_refuses(features: Features, message: str) -> None:
    with pytest.raises(DataError, match=message):
        resubstitution(features)


# --- from images ---------------------------------------------------------------------------------------------


@pytest.fixture
def encoder() -> nn.Module:
    """Mean colour, as an encoder."""
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    module.preprocess = Preprocess(8, (0.5,) * 3, (0.25,) * 3)  # type: ignore[assignment]  # nn.Module wants tensors
    return module


def image_set(seed: int, n: int = 60) -> ImageSet:
    """Noise with a channel that stands out: the class."""
    labels = torch.arange(n) % 3
    pixels = torch.randint(150, (n, 3, 8, 8), generator=torch.Generator().manual_seed(seed))
    pixels[torch.arange(n), labels] += 100
    names = ("class 0", "class 1", "class 2")
    return ImageSet(pixels.byte(), labels, names, tuple(map(str, range(n))), f"noise {seed}", str(seed) * 64)


def test_evaluate_extracts_and_probes(encoder: nn.Module) -> None:
    report = evaluate(encoder, train=image_set(1), val=image_set(2), seed=3)
    assert not {"pooling", "layers"} & set(report.settings)  # as always
    assert (report.protocol, report.accuracy, report.seed) == ("linear", 100, 3)
    assert (report.train_digest, report.val_digest) == ("1" * 64, "2" * 64)
    near = evaluate(encoder, train=image_set(1), val=image_set(2), protocol="knn", seed=3)
    assert (near.protocol, near.accuracy, near.seed) == ("knn-20", 100, 3)


def test_evaluate_resubstitution_reads_the_validation_images_alone(encoder: nn.Module) -> None:
    with pytest.warns(UserWarning, match="training accuracy"):
        report = evaluate(encoder, train="not-there", val=image_set(2), protocol="resubstitution", seed=3)
    assert (report.protocol, report.val_digest, report.seed) == ("resubstitution", "2" * 64, 3)


@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_evaluate_takes_the_split_that_the_argument_says(
    encoder: nn.Module, monkeypatch: pytest.MonkeyPatch, protocol: Any
) -> None:
    opened, extracted = [], []

    def images_for(encoder: nn.Module, source: Any, **options: Any) -> tuple[ImageSet, None]:
        opened.append((source, options))
        return image_set({"train": 1, "val": 2}[options["split"]]), None

    def extract(encoder: nn.Module, source: ImageSet, **options: Any) -> Features:
        extracted.append((source.digest[0], options))
        return {"1": TRAIN, "2": VAL}[source.digest[0]]

    monkeypatch.setattr(probe, "images_for", images_for)
    monkeypatch.setattr(probe, "extract", extract)
    where: Any = {"pooling": "both", "layers": 2, "device": "cpu"}
    report = evaluate(encoder, train="a", val="b", protocol=protocol, classes=3, cache_dir="cache", **where)
    assert (report.settings["pooling"], report.settings["layers"]) == ("both", 2)
    common = {"classes": 3, "cache_dir": "cache", "require_labels": True}
    assert opened == [("a", {"split": "train", **common}), ("b", {"split": "val", **common})]
    assert extracted == [("1", where), ("2", where)]


@pytest.mark.parametrize("protocol", ["linear", "knn", "retrieval"])
def test_evaluate_points_out_images_that_are_in_both_splits(encoder: nn.Module, protocol: Any) -> None:
    train, val = image_set(1), image_set(2)
    pixels = val.pixels.clone()
    pixels[:2], pixels[5] = train.pixels[3], train.pixels[8]
    with pytest.warns(UserWarning, match=f"val: of {len(val)} images, 3 are in train too, pixel by pixel"):
        evaluate(encoder, train=train, val=replace(val, pixels=pixels), protocol=protocol)


def test_evaluate_takes_features_as_they_are() -> None:
    broken = nn.Identity()  # without a preprocess it cannot extract anything
    expected = linear(TRAIN, VAL)
    report = evaluate(broken, train=TRAIN, val=VAL)
    assert np.array_equal(report.predictions, expected.predictions)


def measured(protocol: Any, **sources: Any) -> str:
    return evaluate(nn.Identity(), protocol=protocol, **sources).protocol


@pytest.mark.parametrize(
    "protocol", sorted({*get_args(Protocol)} - {"attentive", "knn", "resubstitution", *probe.CROP_PROBES})
)
def test_a_protocol_is_named_in_its_report(protocol: str) -> None:
    train, val = pair(n=60)
    assert measured(protocol, train=train, val=val) == protocol


@pytest.mark.parametrize("split", ["train", "val"])
def test_evaluate_with_one_split_leaves_one_image_out(split: str) -> None:
    assert measured("knn", **{split: TRAIN}) == "knn-20-leave-one-out"
    assert measured("retrieval", **{split: TRAIN}) == "retrieval-leave-one-out"
    assert measured("cluster", **{split: TRAIN}) == "cluster"


@pytest.mark.parametrize(
    ("protocol", "sources", "missing"),
    [
        ("linear", {"train": TRAIN}, "val"),
        ("linear-sgd", {"val": TRAIN}, "train"),
        ("fewshot-1", {"val": TRAIN}, "train"),
        ("knn", {}, "val"),
        ("cluster", {}, "train"),
    ],
)
def test_evaluate_names_the_split_that_it_lacks(protocol: str, sources: Any, missing: str) -> None:
    with pytest.raises(DataError, match=f"{missing}=None: expected labelled images, for the protocol '{protocol}'"):
        measured(protocol, **sources)


def test_evaluate_passes_on_how_neighbours_vote() -> None:
    report = evaluate(nn.Identity(), train=TRAIN, val=VAL, protocol="knn", k=5, temperature=None, metric="euclidean")
    assert report.protocol == "knn-5-unweighted-euclidean"


@pytest.mark.parametrize("protocol", ["linear", "knn", "resubstitution"])
@pytest.mark.filterwarnings("ignore:resubstitution")
def test_evaluate_on_the_first_classes(encoder: nn.Module, protocol: Any) -> None:
    report = evaluate(encoder, train=image_set(1), val=image_set(2), protocol=protocol, classes=2)
    assert list(report.per_class) == ["class 0", "class 1"]
    assert (report.n_train, report.n_val, report.accuracy) == (40, 40, 100)


def test_evaluate_refuses_what_it_cannot_measure(encoder: nn.Module) -> None:
    known = "linear, linear-sgd, .*, attentive, knn, fewshot-1, .*, retrieval, cluster, resubstitution"
    with pytest.raises(RecipeError, match=f"protocol='svm': expected one of {known}"):
        evaluate(encoder, train="a", val="b", protocol=cast(Any, "svm"))
    images = image_set(1)
    unlabelled = ImageSet(images.pixels, None, (), images.paths, "noise", "9" * 64)
    with pytest.raises(DataError, match="source noise: looked for labels"):
        evaluate(encoder, train=unlabelled, val=image_set(2))
