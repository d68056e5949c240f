"""Optimisers, parameter groups and learning-rate schedules."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from .errors import RecipeError


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, algorithm 1), as SimCLR uses it.

    For a weight w with gradient g, let u = g + weight_decay * w. The momentum gathers trust * |w| / |u| * u,
    and the step is `lr` times the momentum. Groups with `adapt=False` (biases and norms) gather u as it is.

    Args:
        params: Parameters or groups, as for any torch optimiser; a group may set `adapt`.
        lr: Learning rate.
        momentum: Factor of the momentum.
        weight_decay: Decay of the groups that do not set their own.
        trust_coefficient: The factor called eta in the paper.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch's overloads
        """Take one step; `closure`, if given, recomputes and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # One call for all parameters: on a GPU, to start a kernel for each takes longer than to run it.
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            updates = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
            if group["adapt"]:
                norms, update_norms = (torch.stack(torch._foreach_norm(of)) for of in (parameters, updates))
                # A weight or gradient of zero has no direction to trust: it takes the plain step.
                trusted = (norms > 0) & (update_norms > 0)
                ratios = group["trust_coefficient"] * norms / update_norms.clamp_min(1e-30)
                torch._foreach_mul_(updates, torch.where(trusted, ratios, 1.0).unbind())
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, updates)
            torch._foreach_add_(parameters, momenta, alpha=-group["lr"])
        return loss


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights, which decay, and the rest, which neither decay nor adapt under LARS.

    The rest is every vector (biases, norms) and every token or position embedding, recognised by its leading
    dimension of one.
    """
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            vector = parameter.ndim <= 1 or (parameter.ndim == 3 and parameter.shape[0] == 1)
            (plain if vector else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay, "adapt": True},
        {"params": plain, "weight_decay": 0.0, "adapt": False},
    ]


def build_optimizer(
    name: str, model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]
) -> Optimizer:
    """Build `lars`, `adamw`, `adam` (weight decay coupled to the gradient, as in torch's Adam) or `sgd`.

    Raises:
        RecipeError: The name is not one of these.
    """
    groups = parameter_groups(model, weight_decay)
    if name == "lars":
        return LARS(groups, lr)
    for group in groups:
        del group["adapt"]
    if name == "adamw":
        return AdamW(groups, lr=lr, betas=betas, fused=True)
    if name == "adam":
        return Adam(groups, lr=lr, betas=betas, fused=True)
    if name == "sgd":
        return SGD(groups, lr=lr, momentum=0.9, fused=True)
    raise RecipeError(f"optimizer={name!r} is unknown: expected lars, adamw, adam or sgd")


def schedule_factor(step: int, *, steps: int, warmup_steps: int, warmup: str, schedule: str) -> float:
    """Factor of the peak learning rate at a step.

    Args:
        step: From 0 to `steps - 1`.
        steps: Steps of the whole run.
        warmup_steps: Steps before the schedule proper begins.
        warmup: `linear` (from 1 / warmup_steps up to 1) or `constant` (1 throughout).
        schedule: `cosine` (a half cosine from 1 to 0 over the remaining steps, Loshchilov & Hutter 2017,
            equation 5) or `constant`.

    Returns:
        A number in [0, 1].
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps if warmup == "linear" else 1.0
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
