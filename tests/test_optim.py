import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from vision_ssl.errors import RecipeError
from vision_ssl.optim import LARS, build_optimizer, parameter_groups, schedule_factor
from vision_ssl.recipes import MAE, Recipe, SimCLR


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def give_gradient(p: nn.Parameter, *values: float) -> None:
    p.grad = torch.tensor(values, dtype=p.dtype)


def test_first_lars_step_by_hand() -> None:
    weight = parameter(3.0, 4.0)  # norm 5
    optimizer = LARS([weight], lr=2.0, weight_decay=0.1)
    give_gradient(weight, 0.6, 0.8)  # with the decay (0.9, 1.2), norm 1.5
    optimizer.step()
    # lr * trust * 5 / 1.5 = 1 / 150 of (0.9, 1.2)
    assert weight.tolist() == pytest.approx([3.0 - 0.006, 4.0 - 0.008], abs=1e-12)


def test_lars_over_many_steps_follows_the_paper() -> None:
    lr, momentum, decay, trust = 0.7, 0.8, 0.03, 0.02
    weight = parameter(1.0, -2.0, 0.5)
    optimizer = LARS([weight], lr=lr, momentum=momentum, weight_decay=decay, trust_coefficient=trust)
    w, v = [1.0, -2.0, 0.5], [0.0, 0.0, 0.0]
    for step in range(5):
        gradient = [math.sin(step + i) for i in range(3)]
        update = [g + decay * x for g, x in zip(gradient, w, strict=True)]
        ratio = trust * math.hypot(*w) / math.hypot(*update)
        v = [momentum * old + ratio * u for old, u in zip(v, update, strict=True)]
        w = [x - lr * m for x, m in zip(w, v, strict=True)]
        give_gradient(weight, *gradient)
        optimizer.step()
    assert weight.tolist() == pytest.approx(w, abs=1e-12)


def test_lars_does_not_depend_on_the_scale_of_the_gradient() -> None:
    ends = []
    for scale in (1e-3, 1.0, 1e4):
        weight = parameter(1.0, 2.0)
        give_gradient(weight, scale, -scale)
        LARS([weight], lr=1.0).step()
        ends.append(weight.tolist())
    assert ends[0] == pytest.approx(ends[1])
    assert ends[2] == pytest.approx(ends[1])


def test_biases_and_norms_take_plain_momentum_steps_without_decay() -> None:
    model, same = (
        nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)),
        nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)),
    )
    same.load_state_dict(model.state_dict())
    ours = build_optimizer("lars", model, lr=0.1, weight_decay=0.5, betas=(0.9, 0.999))
    plain = SGD(same.parameters(), lr=0.1, momentum=0.9)
    for seed in range(3):
        for p, q in zip(model.parameters(), same.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            q.grad = p.grad.clone()
        ours.step()
        plain.step()
    for name, value in same.state_dict().items():
        equal = torch.allclose(model.state_dict()[name], value, atol=1e-7)
        assert equal == (name != "0.weight"), name


def test_lars_moves_weights_of_zero_and_survives_gradients_of_zero() -> None:
    zero, still = parameter(0.0, 0.0), parameter(1.0, 1.0)
    give_gradient(zero, 3.0, 4.0)
    give_gradient(still, 0.0, 0.0)
    untouched = parameter(1.0)
    LARS([zero, still, untouched], lr=0.1).step()
    assert zero.tolist() == pytest.approx([-0.3, -0.4])
    assert still.tolist() == [1.0, 1.0]
    assert untouched.tolist() == [1.0]


def test_lars_takes_a_closure() -> None:
    weight = parameter(2.0)
    optimizer = LARS([weight], lr=1.0)

    def loss() -> float:
        optimizer.zero_grad()
        square = weight.square().sum()
        square.backward()
        return square.item()

    assert optimizer.step(loss) == 4.0
    assert weight.item() == pytest.approx(2.0 - 0.001 * 2.0)


RECIPES = [
    SimCLR(image_size=32, batch_size=4),
    SimCLR(encoder="vit_tiny", image_size=32, batch_size=4),
    MAE(encoder="vit_tiny", image_size=32),
    MAE(encoder="resnet18", image_size=32),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.method}-{recipe.encoder}")
def test_every_trained_parameter_is_in_one_group_and_only_weights_decay(recipe: Recipe) -> None:
    with torch.device("meta"):  # names and shapes are enough
        model = recipe.build()
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    decay, plain = parameter_groups(model, weight_decay=0.3)
    assert (decay["weight_decay"], decay["adapt"]) == (0.3, True)
    assert (plain["weight_decay"], plain["adapt"]) == (0.0, False)
    grouped = [id(p) for group in (decay, plain) for p in group["params"]]
    assert sorted(grouped) == sorted(names)

    tokens = ("cls_token", "mask_token", "pos_embed")
    norms = {
        f"{module_name}.weight"
        for module_name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm | nn.BatchNorm1d | nn.BatchNorm2d)
    }
    expected = {name for name in names.values() if name.endswith((".bias", *tokens)) or name in norms}
    assert {names[id(p)] for p in plain["params"]} == expected
    assert any(name.endswith("cls_token") for name in expected) == recipe.encoder.startswith("vit")


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    decay, plain = parameter_groups(model, weight_decay=0.1)
    assert decay["params"] == []
    assert plain["params"] == [model.bias]


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("lars", LARS, {"momentum": 0.9, "trust_coefficient": 0.001}),
        ("adamw", AdamW, {"betas": (0.8, 0.95)}),
        ("adam", Adam, {"betas": (0.8, 0.95)}),
        ("sgd", SGD, {"momentum": 0.9, "nesterov": False, "dampening": 0}),
    ],
)
def test_optimisers_get_their_settings(name: str, kind: type, expected: dict[str, object]) -> None:
    optimizer = build_optimizer(name, nn.Linear(2, 2), lr=0.5, weight_decay=0.1, betas=(0.8, 0.95))
    assert type(optimizer) is kind
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for group in optimizer.param_groups:
        assert {key: group[key] for key in expected} == expected


def test_weight_decay_is_coupled_in_adam_and_decoupled_in_adamw() -> None:
    ends = {}
    for name in ("adam", "adamw", "sgd"):
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 2.0)
        model.weight.grad = torch.zeros(1, 1)
        build_optimizer(name, model, lr=0.1, weight_decay=0.05, betas=(0.9, 0.999)).step()
        ends[name] = model.weight.item()
    # Coupled, the decay is the gradient, whose size Adam divides away; decoupled, it shrinks the weight by
    # lr * decay; and plain SGD takes a step of lr * decay * weight.
    assert ends == pytest.approx({"adam": 2.0 - 0.1, "adamw": 2.0 * (1 - 0.1 * 0.05), "sgd": 2.0 * (1 - 0.1 * 0.05)})


def test_unknown_optimiser_is_named() -> None:
    with pytest.raises(RecipeError, match=r"^optimizer='lion' is unknown: expected lars, adamw, adam or"):
        build_optimizer("lion", nn.Linear(1, 1), lr=0.1, weight_decay=0.0, betas=(0.9, 0.999))


def curve(steps: int, warmup_steps: int, warmup: str = "linear", schedule: str = "cosine") -> list[float]:
    return [
        schedule_factor(step, steps=steps, warmup_steps=warmup_steps, warmup=warmup, schedule=schedule)
        for step in range(steps)
    ]


def test_linear_warmup_then_cosine() -> None:
    factors = curve(12, 4)
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    eighths = [1.0, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]  # of a half cosine
    assert factors[4:] == pytest.approx(eighths, abs=1e-6)


def test_constant_warmup_then_cosine() -> None:
    assert curve(7, 3, warmup="constant") == pytest.approx([1, 1, 1, 1, 0.853553, 0.5, 0.146447], abs=1e-6)


@pytest.mark.parametrize("warmup", ["linear", "constant"])
def test_constant_schedule_stays_at_the_peak(warmup: str) -> None:
    assert curve(6, 2, warmup=warmup, schedule="constant")[2:] == [1, 1, 1, 1]


def test_cosine_without_warmup_equals_torch() -> None:
    optimizer = SGD([parameter(1.0)], lr=1.0)
    scheduler = CosineAnnealingLR(optimizer, T_max=20)
    expected = []
    for _ in range(20):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert curve(20, 0) == pytest.approx(expected)


@pytest.mark.parametrize(("steps", "warmup_steps"), [(1, 0), (1, 1), (3, 10), (5, 5)])
def test_short_runs_stay_in_range(steps: int, warmup_steps: int) -> None:
    factors = curve(steps, warmup_steps)
    assert all(0 < factor <= 1 for factor in factors)
    assert factors == pytest.approx(
        [min(1, (step + 1) / max(1, warmup_steps)) for step in range(steps)]  # all of it is warm-up
    )
