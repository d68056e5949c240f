"""Clustering: whether the classes lie apart without any label being used."""

import torch
import torch.nn.functional as F

from .errors import MissingExtraError
from .features import Features
from .pairs import check_fit, report
from .report import Report

STARTS = 10


def cluster(features: Features, *, seed: int = 0) -> Report:
    """Find as many clusters as there are classes by k-means, and compare them with the classes.

    Features are scaled to length 1. k-means is scikit-learn's (k-means++, the best of 10 starts by its own
    objective). For the accuracy each cluster stands for one class, by the matching that is right most often
    (Xie et al. 2016, "Unsupervised Deep Embedding for Clustering Analysis", section 4.2): labels of the images that
    are scored choose it.

    Args:
        features: Features to cluster, with labels to compare with.
        seed: Of k-means and the bootstrap.

    Returns:
        A report with the scores `nmi`, the mutual information of clusters and classes, 0..1, normalised by the
        arithmetic mean of their entropies, and `ari`, the adjusted Rand index, -0.5..1 and 0 for chance.

    Raises:
        DataError: Labels are missing or of a single class, or a feature is not finite.
        MissingExtraError: scikit-learn is not installed.

    Warns:
        UserWarning: All features are equal.
    """
    labels = check_fit(features, "features")
    try:
        from scipy.optimize import linear_sum_assignment
        from sklearn.cluster import KMeans
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "eval") from error
    classes, present = labels.unique(return_inverse=True)
    kmeans = KMeans(n_clusters=len(classes), n_init=STARTS, random_state=seed)
    clusters = torch.from_numpy(kmeans.fit_predict(F.normalize(features.features).numpy())).long()
    shared = torch.bincount(clusters * len(classes) + present, minlength=len(classes) ** 2)
    _, matched = linear_sum_assignment(shared.view(len(classes), -1).numpy(), maximize=True)
    predictions = classes[torch.from_numpy(matched)[clusters]]
    found = clusters.numpy()
    scores = {
        "nmi": float(normalized_mutual_info_score(labels.numpy(), found)),
        "ari": float(adjusted_rand_score(labels.numpy(), found)),
    }
    settings = {"clusters": len(classes), "starts": STARTS}
    return report("cluster", predictions, features, features, settings, seed, scores=scores)
