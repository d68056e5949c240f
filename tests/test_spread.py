import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vision_ssl.spread import PAIRS, alignment, effective_rank, feature_std, uniformity


def gaussian(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_feature_std_of_equal_and_of_spread_features() -> None:
    assert feature_std(torch.ones(8, 5)).item() == 0
    assert feature_std(gaussian(4000, 64)).item() == pytest.approx(1 / 8, rel=0.01)
    assert feature_std(7 * gaussian(50, 64)).item() == pytest.approx(feature_std(gaussian(50, 64)).item())


@pytest.mark.parametrize(("count", "width"), [(40, 6), (6, 40)])
def test_effective_rank_by_its_definition(count: int, width: int) -> None:
    features = gaussian(count, width) + 5
    values = torch.linalg.svdvals((features - features.mean(dim=0)).double())
    shares = [value / float(values.sum()) for value in values.tolist() if value > 1e-9]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert effective_rank(features) == pytest.approx(expected, rel=1e-5)


def test_effective_rank_counts_dimensions() -> None:
    assert effective_rank(torch.ones(20, 4)) == pytest.approx(1.0)
    line = torch.arange(20.0)[:, None] * torch.tensor([[1.0, -2.0, 0.5]])
    assert effective_rank(line) == pytest.approx(1.0, abs=1e-3)
    corners = torch.cat([torch.eye(5), -torch.eye(5)])
    assert effective_rank(corners) == pytest.approx(5.0)


def test_alignment_of_equal_opposite_and_unrelated_views() -> None:
    first = gaussian(3000, 32)
    assert alignment(first, 3 * first).item() == pytest.approx(0, abs=1e-6)
    assert alignment(first, -first).item() == pytest.approx(4, rel=1e-5)
    assert alignment(first, gaussian(3000, 32, seed=1)).item() == pytest.approx(2, abs=0.02)


def test_uniformity_by_its_definition() -> None:
    projections = gaussian(7, 3)
    unit = F.normalize(projections, dim=1)
    pairs = [math.exp(-2 * float((unit[i] - unit[j]).square().sum())) for i in range(7) for j in range(i)]
    assert uniformity(projections).item() == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)
    assert uniformity(torch.ones(4, 3)).item() == pytest.approx(0, abs=1e-6)
    assert uniformity(gaussian(PAIRS, 128)).item() == pytest.approx(-4, abs=0.1)


def test_uniformity_looks_at_the_first_pairs_alone() -> None:
    projections = gaussian(PAIRS + 50, 4)
    assert torch.equal(uniformity(projections), uniformity(projections[:PAIRS]))
