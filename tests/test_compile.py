"""What `torch.compile` is given on a GPU: each part of a step as one graph, which computes the same."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from vision_ssl.augment import Draws
from vision_ssl.recipes import MAE, Recipe, SimCLR

# What torch says of itself, and keeps from users by filters of its own that errors pass; the second is torch 2.6.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning"),
]

SIZE = 4
PIXELS = torch.randint(256, (SIZE, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SIMCLR = SimCLR(image_size=32, batch_size=SIZE, blur=0.5, grayscale=0.3)
RECIPES = {
    "exact views": SIMCLR,
    "fast views": SimCLR(image_size=32, batch_size=SIZE, blur=0.5, grayscale=0.3, view_size=24, fast_views=True),
    "ViT": MAE(encoder="vit_tiny", image_size=32, batch_size=SIZE, decoder_depth=1),
    "many patches": MAE(encoder="vit_tiny", image_size=80, patch_size=4, batch_size=SIZE, decoder_depth=1),
    "ResNet": MAE(encoder="resnet18", image_size=32, batch_size=SIZE),
}


class Graphs:
    """A backend that runs each graph as it is, and remembers how many there are and how often one ran."""

    def __init__(self) -> None:
        self.compiled = self.calls = 0

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Any:
        self.compiled += 1

        def run(*arguments: Any) -> Any:
            self.calls += 1
            return graph(*arguments)

        return run


def draws(seed: int = 3) -> Draws:
    return Draws(seed, rows=slice(None), total=SIZE, device=torch.device("cpu"))


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    torch.compiler.reset()
    for module in ("augment", "color"):  # as on a GPU
        monkeypatch.setattr(f"vision_ssl.{module}.whole_batch", lambda images: True)
    return RECIPES[request.param]


def test_views(recipe: Recipe) -> None:
    graphs = Graphs()
    compiled = torch.compile(recipe.augment, backend=graphs, fullgraph=True, dynamic=False)
    for seed in (3, 4):
        for own, expected in zip(compiled(PIXELS, draws(seed)), recipe.augment(PIXELS, draws(seed)), strict=True):
            torch.testing.assert_close(own, expected)
    assert (graphs.compiled, graphs.calls) == (1, 2)


def test_model(recipe: Recipe) -> None:
    torch.manual_seed(0)
    model, views, graphs = recipe.build(), recipe.augment(PIXELS, draws()), Graphs()
    keys, twin = list(model.state_dict()), copy.deepcopy(model)
    model.compile(backend=graphs, fullgraph=True, dynamic=False)
    losses = [each(*views)[0] for each in (model, twin)]
    assert (graphs.compiled, graphs.calls) == (1, 1)
    assert list(model.state_dict()) == keys
    assert not hasattr(copy.deepcopy(model), "_orig_mod")
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad)
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
