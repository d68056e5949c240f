"""Speed of the probes: the linear probe against scikit-learn, kNN against faiss and scikit-learn.

Features are a mixture of correlated Gaussians, one per class, whose spectrum decays as that of trained encoders does.
Before anything is timed, all contenders must arrive at the same objective and the same neighbours.

    python -m benchmarks.bench_probe
"""

from typing import cast

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import Tensor

from benchmarks.timing import Comparison, record
from vision_ssl import neighbours
from vision_ssl.features import Features
from vision_ssl.logistic import logistic_regression
from vision_ssl.neighbours import knn

TRAIN, QUERIES, DIM, CLASSES = 20_000, 5_000, 384, 100
K = 20
L2 = 1e-3
SCIKIT_TOLERANCE = 3e-5  # of its gradient: among 1e-4, 3e-5 and 1e-5 the widest that is within CLOSE of the minimum
CLOSE = 1e-4  # of the objective, relative


def mixture(n: int, seed: int) -> Features:
    """Features (n, DIM) of CLASSES classes, which overlap: a linear probe tells about 40 % of new images."""
    fixed = torch.Generator().manual_seed(99)
    spectrum = torch.arange(1, DIM + 1) ** -0.7
    rotation = torch.linalg.qr(torch.randn(DIM, DIM, generator=fixed)).Q
    means = 0.15 * torch.randn(CLASSES, DIM, generator=fixed)
    mean = 0.1 * torch.randn(DIM, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    noise = torch.randn(n, DIM, generator=generator)
    features = ((means[labels] + noise) * spectrum) @ rotation + mean
    return Features(features, labels, tuple(map(str, range(CLASSES))), tuple(map(str, range(n))), f"mixture {seed}")


def linear_row(train: Features, labels: Tensor) -> Comparison:
    """The linear probe at one l2; scikit-learn is given features that are standardised already."""
    std, mean = torch.std_mean(train.features, dim=0, correction=0)
    standard = (train.features - mean) / std
    x, y = standard.numpy(), labels.numpy()
    scikit = LogisticRegression(C=1 / (TRAIN * L2), tol=SCIKIT_TOLERANCE, max_iter=10_000)

    def objective(weight: Tensor, bias: Tensor) -> float:
        cross_entropy = F.cross_entropy(standard.double() @ weight.double() + bias.double(), labels)
        return float(cross_entropy + L2 / 2 * weight.double().square().sum())

    fitted = logistic_regression(train.features, labels, CLASSES, L2)
    scikit.fit(x, y)
    ours = objective(fitted.weight * std[:, None], fitted.bias)
    theirs = objective(torch.from_numpy(scikit.coef_.T), torch.from_numpy(scikit.intercept_))
    print(f"objective {ours:.6f}, scikit-learn {theirs:.6f} after {scikit.n_iter_[0]} iterations", flush=True)
    if abs(ours - theirs) > CLOSE * theirs:
        raise SystemExit("the two did not arrive at the same objective")
    return Comparison(
        f"linear probe, {TRAIN} x {DIM}, {CLASSES} classes, l2 {L2:g}, {torch.get_num_threads()} threads",
        lambda: logistic_regression(train.features, labels, CLASSES, L2),
        {"scikit-learn lbfgs": lambda: scikit.fit(x, y)},
        {"scikit-learn lbfgs": 6},
    )


def knn_row(train: Features, labels: Tensor, val: Features) -> Comparison:
    """KNN with its report; the peers find the neighbours, and scikit-learn's classifier also lets them vote."""
    index, queries = F.normalize(train.features).numpy(), F.normalize(val.features).numpy()
    flat = faiss.IndexFlatIP(DIM)
    flat.add(index)
    x, y, q = train.features.numpy(), labels.numpy(), val.features.numpy()
    peer = NearestNeighbors(n_neighbors=K, metric="cosine", algorithm="brute").fit(x)
    classifier = KNeighborsClassifier(K, metric="cosine", algorithm="brute").fit(x, y)

    found = {
        "vision_ssl": np.concatenate(
            [
                neighbours._nearest(part @ torch.from_numpy(index).T, K).numpy()
                for part in torch.from_numpy(queries).split(500)
            ]
        ),
        "faiss": flat.search(queries, K)[1],
        "scikit-learn": peer.kneighbors(q, return_distance=False),
    }
    exact = queries[:500].astype(float) @ index.T.astype(float)
    last = np.sort(exact, axis=1)[:, -K]
    for name, nearest in found.items():
        short = float((last - np.take_along_axis(exact, nearest[:500], axis=1).min(axis=1)).max())
        print(f"{name}: no neighbour is further than the {K}th of float64 by more than {short:.1e}", flush=True)
        if short > 1e-6 or any(len(set(row)) < K for row in nearest.tolist()):
            raise SystemExit(f"{name} did not find the neighbours")
    return Comparison(
        f"kNN, {QUERIES} queries in {TRAIN} x {DIM}, k {K}, {torch.get_num_threads()} threads",
        lambda: knn(train, val, k=K, temperature=None),
        {
            "faiss IndexFlatIP": lambda: flat.search(queries, K),
            "scikit-learn NearestNeighbors": lambda: peer.kneighbors(q),
            "scikit-learn KNeighborsClassifier": lambda: classifier.predict(q),
        },
        {"faiss IndexFlatIP": 0.8, "scikit-learn NearestNeighbors": 8, "scikit-learn KNeighborsClassifier": 8},
    )


def main() -> None:
    """Check, measure, print and record."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    train, val = mixture(TRAIN, 1), mixture(QUERIES, 2)
    labels = cast(Tensor, train.labels)
    record("probe", [linear_row(train, labels), knn_row(train, labels, val)], rounds=5)


if __name__ == "__main__":
    main()
