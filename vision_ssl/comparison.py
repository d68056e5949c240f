"""Whether one report is better than another on the same images, or whether it may be chance."""

from dataclasses import dataclass

import numpy as np

from .report import Difference, Report, paired_bootstrap

LEVEL = 0.05  # of McNemar's test, as of the 95 % interval


@dataclass(frozen=True)
class Comparison:
    """How two reports on the same images differ.

    Attributes:
        difference: Accuracy of the first minus that of the second, with its paired bootstrap interval.
        only_a: Images that the first alone got right.
        only_b: Images that the second alone got right.
        p_value: Of McNemar's mid-p test; None for reports of several draws, which it is not made for.
    """

    difference: Difference
    only_a: int | None
    only_b: int | None
    p_value: float | None

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 0 and the test, where there is one, agrees."""
        low, high = self.difference.interval
        return (low > 0 or high < 0) and (self.p_value is None or self.p_value < LEVEL)

    def __str__(self) -> str:
        """Say it in a line."""
        better = "a" if self.difference.points > 0 else "b"
        verdict = f"{better} is better" if self.shown else "no difference is shown"
        test = ""
        if self.p_value is not None:
            test = f", McNemar's mid-p {self.p_value:.2g}: a alone is right on {self.only_a:,}, b on {self.only_b:,}"
        return f"{verdict}: a - b is {self.difference}{test}"


def compare(a: Report, b: Report, *, seed: int = 0) -> Comparison:
    """Compare two reports on the same test images: a difference counts if it is more than chance.

    McNemar's test looks at the images that one alone got right; Dietterich 1998, "Approximate Statistical Tests for
    Comparing Supervised Classification Learning Algorithms", section 3.1, recommends it for a single training set.
    Both it and the interval tell whether other test images would show the difference too; neither knows how much
    another seed of the pretraining would change.

    Args:
        a: What is compared.
        b: With what.
        seed: Of the bootstrap.

    Raises:
        DataError: The reports are not about the same test images in the same order.
    """
    difference = paired_bootstrap(a, b, seed=seed)
    if a.predictions.ndim == 2 or b.predictions.ndim == 2:
        return Comparison(difference, None, None, None)
    right_a, right_b = (report.predictions == report.targets for report in (a, b))
    only_a, only_b = int(np.sum(right_a & ~right_b)), int(np.sum(right_b & ~right_a))
    return Comparison(difference, only_a, only_b, mcnemar(only_a, only_b))


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p-value of McNemar's mid-p test, 0..1.

    Under the null hypothesis, each of the images that one alone got right is as likely the one's as the other's.
    The exact test is conservative; less the probability of what was observed, it keeps its level and gains power
    (Fagerland, Lydersen and Laake 2013, "The McNemar test for binary matched-pairs data", "McNemar mid-p test").

    Args:
        only_a: Images that the first alone got right.
        only_b: Images that the second alone got right.
    """
    n, fewer = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    i = np.arange(fewer)
    steps = np.log(n - i) - np.log(i + 1)  # from the logarithm of one binomial coefficient to the next
    probability = np.exp(np.concatenate([[0.0], np.cumsum(steps)]) - n * np.log(2))  # of 0..fewer
    observed = float(probability[-1])
    return 1 - observed / 2 if only_a == only_b else 2 * float(probability.sum()) - observed
