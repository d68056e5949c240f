"""Checkpoints: everything that a stopped run needs to go on, in one safetensors file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import CheckpointError
from .storage import load_tensors, save_tensors


def save_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer, facts: dict[str, Any]) -> None:
    """Save the model, the optimiser's state, and plain facts such as the step.

    Learning rates and the like are not saved: they follow from the recipe and the step.

    Raises:
        CheckpointError: The disk refuses; the previous checkpoint stays whole.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    save_tensors(path, tensors, facts)


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Put a checkpoint into the model and the optimiser, and return its facts.

    Raises:
        CheckpointError: The file is missing or damaged, or belongs to another model.
    """
    tensors, facts = load_tensors(path)
    weights: dict[str, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "model":
            weights[rest] = tensor
        elif kind == "optimizer":
            index, _, key = rest.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        else:
            raise CheckpointError(f"{path} is not a checkpoint: it holds {name!r}")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise CheckpointError(
                f"{path} belongs to another model: {name} has the shape {found.get(name)} in it, "
                f"but expected is {expected.get(name)}"
            )
    model.load_state_dict(weights)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, kept in state.items():
        for name, tensor in kept.items():
            if tensor.shape == parameters[number].shape:
                # In the parameter's order of memory, such as channels_last: fused optimisers go by it alone.
                kept[name] = torch.empty_like(parameters[number]).copy_(tensor)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return facts
