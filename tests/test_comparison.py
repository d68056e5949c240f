from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

import vision_ssl
from vision_ssl.comparison import compare, mcnemar
from vision_ssl.errors import DataError
from vision_ssl.report import Report, paired_bootstrap


def report(right: npt.NDArray[np.bool_]) -> Report:
    """Of two classes in turn; `right` (n,) or (draws, n) says which images were recognised."""
    targets = np.arange(right.shape[-1]) % 2
    facts: dict[str, Any] = {"n_train": 9, "settings": {}, "seed": 0, "train_digest": "a", "val_digest": "b"}
    return Report.score("linear", np.where(right, targets, 1 - targets), targets, "xy", train_accuracy=None, **facts)


def pair(both: int, only_a: int, only_b: int, neither: int) -> tuple[Report, Report]:
    counts = (both, only_a, only_b, neither)
    return report(np.repeat([True, True, False, False], counts)), report(np.repeat([True, False, True, False], counts))


@settings(deadline=None)
@given(only_a=st.integers(0, 60), only_b=st.integers(0, 60))
def test_mcnemar_is_the_binomial_test_less_what_was_observed(only_a: int, only_b: int) -> None:
    n = only_a + only_b
    if n == 0:
        assert mcnemar(0, 0) == 1
        return
    observed = binom.pmf(only_a, n, 0.5)
    expected = binomtest(only_a, n).pvalue - (observed / 2 if only_a == only_b else observed)
    assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_of_a_published_table() -> None:
    """Bentur et al. 2009, table 1 of Fagerland et al. 2013: mid-p 0.0391."""
    assert mcnemar(1, 7) == mcnemar(7, 1) == pytest.approx(10 / 256)


def test_mcnemar_of_many_images() -> None:
    assert mcnemar(50_000, 51_000) == pytest.approx(2 * binom.cdf(50_000, 101_000, 0.5), rel=0.02)
    assert mcnemar(1_000, 90_000) == 0


def test_a_difference_that_is_shown() -> None:
    a, b = pair(500, 90, 40, 370)
    found = compare(a, b)
    assert found.difference == paired_bootstrap(a, b)
    assert (found.only_a, found.only_b, found.shown) == (90, 40, True)
    assert found.p_value == mcnemar(90, 40)
    low, high = found.difference.interval
    assert str(found) == (
        f"a is better: a - b is +5.0 points (95 % interval {low:+.1f} to {high:+.1f}), McNemar's mid-p 9.8e-06: a "
        "alone is right on 90, b on 40"
    )
    assert str(compare(b, a)).startswith("b is better: a - b is -5.0 points")


def test_a_difference_that_may_be_chance() -> None:
    found = compare(*pair(500, 52, 48, 400))
    assert not found.shown
    assert str(found).startswith("no difference is shown: a - b is +0.4 points")


def test_interval_and_test_must_agree() -> None:
    found = compare(*pair(500, 90, 40, 370))
    assert not replace(found, p_value=0.06).shown
    assert not replace(found, difference=replace(found.difference, interval=(-0.1, 9.0))).shown


def test_a_true_difference_of_zero_is_rarely_shown() -> None:
    rng = np.random.default_rng(0)
    found = [compare(*(report(rng.random(300) < 0.7) for _ in "ab")).shown for _ in range(200)]
    assert 0 < np.mean(found) < 0.08


def test_reports_of_several_draws_have_no_test() -> None:
    right = np.random.default_rng(0).random((4, 200)) < 0.5
    a, b = report(right), report(right & (np.arange(200) % 4 > 0))
    found = compare(a, b)
    assert (found.only_a, found.only_b, found.p_value) == (None, None, None)
    assert found.difference.points == pytest.approx(a.accuracy - b.accuracy)
    assert found.shown
    assert str(found) == f"a is better: a - b is {found.difference}"


def test_other_images_are_refused() -> None:
    with pytest.raises(DataError, match="a and b differ in their test images"):
        compare(report(np.ones(4, dtype=bool)), report(np.ones(6, dtype=bool)))


def test_public_name() -> None:
    assert vision_ssl.compare is compare
