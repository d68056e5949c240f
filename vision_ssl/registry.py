"""The models that the package knows, as data. Importing this module does not import torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

PACKAGED = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Weights:
    """Published weights: the bytes under a tag never change.

    Attributes:
        name: `architecture.tag`, such as `simclr_resnet18.tiny_imagenet`.
        summary: What it is, in a line.
        sha256: File name to hash, for each file of tensors.
    """

    name: str
    summary: str
    sha256: dict[str, str]

    @property
    def directory(self) -> Path:
        """Where the package keeps it."""
        return PACKAGED / self.name

    @property
    def config(self) -> dict[str, Any]:
        """Its `config.json`: what timm needs, and our card under `vision_ssl`."""
        return cast(dict[str, Any], json.loads((self.directory / "config.json").read_text(encoding="utf-8")))


# Newest last: a bare name such as `simclr_resnet18` means its newest tag.
WEIGHTS: tuple[Weights, ...] = ()


def list_models() -> list[str]:
    """Names of the packaged weights, as `load` takes them."""
    return [weights.name for weights in WEIGHTS]


def find(name: str) -> Weights | None:
    """The weights of a full name, or the newest of a bare one; None if the registry does not know it."""
    for weights in reversed(WEIGHTS):
        if name in (weights.name, weights.name.partition(".")[0]):
            return weights
    return None
