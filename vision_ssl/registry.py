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

    @property
    def card(self) -> dict[str, Any]:
        """The facts that travel with it."""
        return cast(dict[str, Any], self.config["vision_ssl"])

    @property
    def own_scores(self) -> list[dict[str, Any]]:
        """What was measured on the data set that it was pretrained on."""
        return [score for score in self.card["scores"] if self.card["data"]["name"].startswith(score["data"])]


# Newest last: a bare name such as `simclr_resnet18` means its newest tag.
WEIGHTS: tuple[Weights, ...] = (
    Weights(
        "simclr_resnet18.tiny_imagenet",
        "SimCLR, ResNet-18 with stem 7x7, 64 px, 4 epochs of Tiny ImageNet on a CPU",
        {
            "model.safetensors": "eb171c08a831682e964dc752be2e4a238efce6dc7abe14b2fb5c21cc77ad2873",
            "head.safetensors": "11e9af949f419bf1a635876aeaa755a0f441ce2f76703054cf8da46e12f4d528",
        },
    ),
    Weights(
        "mae_vit_small.tiny_imagenet",
        "MAE, ViT-Small with patches of 8 px, 64 px, 4 epochs of Tiny ImageNet on a CPU",
        {
            "model.safetensors": "30f26d6ec6a4b2b2863d4abf3d088a2ad0157982f3ef0fd844cbe371f67dc753",
            "head.safetensors": "aebdaa992cce4502cb3f4890e0f3290b8c71fd1e0e0aa746e6e533db9849bc41",
        },
    ),
)


def list_models() -> list[str]:
    """Names of the packaged weights, as `load` takes them."""
    return [weights.name for weights in WEIGHTS]


def find(name: str) -> Weights | None:
    """The weights of a full name, or the newest of a bare one; None if the registry does not know it."""
    for weights in reversed(WEIGHTS):
        if name in (weights.name, weights.name.partition(".")[0]):
            return weights
    return None
