"""The models that the package knows, as data. Importing this module does not import torch."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

PACKAGED = Path(__file__).parent / "weights"
CLONED = Path(__file__).parents[1] / "weights"  # at the root of a clone: models too big for the wheel


@dataclass(frozen=True)
class Weights:
    """Published weights: the bytes under a tag never change.

    Attributes:
        name: `architecture.tag`, such as `simclr_resnet18.tiny_imagenet`.
        summary: What it is, in a line.
        sha256: File name to hash, for each file of tensors, and for the index of an encoder in several. A downloaded
            file that is not listed is checked against the hash that the Hub itself announces.
        repo: Its repository on the Hub, `owner/name`; empty where there is none.
        revision: The commit of `repo` that this is.
        facts: The card of weights whose `config.json` has none, since others published them.
    """

    name: str
    summary: str
    sha256: dict[str, str]
    repo: str = ""
    revision: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """Where it is without a download: in the package, or in the clone."""
        packaged = PACKAGED / self.name
        return packaged if packaged.is_dir() else CLONED / self.name

    @property
    def is_packaged(self) -> bool:
        """Whether it comes with the package."""
        return self.directory.parent == PACKAGED

    @property
    def is_local(self) -> bool:
        """Whether it is there without a download."""
        return (self.directory / "config.json").is_file()

    @property
    def config(self) -> dict[str, Any]:
        """Its `config.json`: what timm needs, and our card under `vision_ssl`."""
        return cast(dict[str, Any], json.loads((self.directory / "config.json").read_text(encoding="utf-8")))

    @property
    def card(self) -> dict[str, Any]:
        """The facts that travel with it."""
        return self.facts or cast(dict[str, Any], self.config["vision_ssl"])

    @property
    def own_scores(self) -> list[dict[str, Any]]:
        """What was measured on the data set that it was pretrained on; nothing while it is not there."""
        if not self.is_local:
            return []
        return [score for score in self.card["scores"] if self.card["data"]["name"].startswith(score["data"])]


# Newest last: a bare name such as `simclr_resnet18` means its newest tag.
WEIGHTS: tuple[Weights, ...] = (
    Weights(
        "simclr_resnet18.tiny_imagenet_v2",
        "SimCLR, ResNet-18 with stem 3x3, 64 px, 73 epochs of Tiny ImageNet",
        {
            "model.safetensors": "8d0f7e8c33c1d670c8442e607c98f181f7dd767f7aa33d6b6333d2aa0cf8431b",
            "head.safetensors": "39120863a2aadf42b8dd4bf8a3db0237d243f1817ee95e5fe0e8728df933c0a8",
        },
    ),
    Weights(
        "mae_vit_small.tiny_imagenet_v3",
        "MAE, ViT-Small with patches of 8 px, 64 px, 42 epochs of Tiny ImageNet",
        {
            "model.safetensors": "297be08865424ff2217db67c79a4ab50c8c95e94c022777d4ca45f59737ceda0",
            "head.safetensors": "6da7e54676faf769694962d41c168c8e724df931547fa4fa5f8c3f9d79bf0d0a",
        },
    ),
    Weights(
        "mae_vit_tiny.tiny_imagenet",
        "MAE, ViT-Tiny with patches of 8 px, 64 px, 60 epochs of Tiny ImageNet",
        {
            "model.safetensors": "f7ec63aa46cd294c051f8bac127b2b694ed07ed9d0a9108e888d8bc26e7d0b9b",
            "head.safetensors": "bcc755ab8e1c6dcf86a4782b1694a9434115ea8d6b4ca8898e5a8c3fb821b237",
        },
    ),
    Weights(
        "simclr_resnet50.tiny_imagenet",
        "SimCLR, ResNet-50 with stem 3x3, 64 px, 40 epochs of Tiny ImageNet; in a clone alone",
        {
            "model.safetensors": "6bc5826ae8cff459e5d1a4d2ef1d4dc72a3abc2cc5580dcdbd48d3b080af2983",
            "head.safetensors": "8cc78e07edb8021c8b4690fd572a681540f5d3f309a2e8606ac89c13aac5b527",
        },
    ),
    Weights(
        "mae_resnet18.tiny_imagenet",
        "MAE, ResNet-18 with stem 3x3, 64 px, 36 epochs of Tiny ImageNet; in a clone alone",
        {
            "model.safetensors": "8731d7e69bd17bac3d9f96b4c6804fb777cf017421ffb747bab72b74bc61f526",
            "head.safetensors": "5cf7590fae090291d13908239d7f415f532d9ff75077d234a07a4477b89b32d3",
        },
    ),
    Weights(
        "mae_vit_base.tiny_imagenet",
        "MAE, ViT-Base with patches of 8 px, 64 px, 62 epochs of Tiny ImageNet; in a clone alone",
        {
            "model-00001-of-00002.safetensors": "c887221b72df774d4bb6d92e6c4591b9147228ca22acd86905a2074a8a7a337d",
            "model-00002-of-00002.safetensors": "8c11c5cd579678ce7325f844e93d07765d09cbc9dd8c64024e17fe5b04186db2",
            "model.safetensors.index.json": "6045d0d0351f67916361e903fc84894af6c03658675872d288833ef570bb8f57",
            "head.safetensors": "7ce23eebd387fa14d6a1d98c99022bc20b4ad4cf68e8e0be9ba2c92ab48c02c8",
        },
    ),
)


def _mae(size: str, patch_size: int, revision: str, sha256: dict[str, str]) -> Weights:
    """MAE of its authors (He et al. 2022), in the repositories where timm publishes it; encoders alone."""
    repo = f"timm/vit_{size}_patch{patch_size}_224.mae"
    return Weights(
        f"mae_vit_{size}.in1k",
        f"MAE of its authors, ViT-{size.title()} with patches of {patch_size} px, 224 px, ImageNet-1k; CC-BY-NC-4.0",
        sha256,
        repo=repo,
        revision=revision,
        facts={
            "method": "mae",
            "name": f"mae_vit_{size}.in1k",
            "data": {"name": "ImageNet-1k"},
            "source": f"hf:{repo}@{revision}, from https://github.com/facebookresearch/mae",
            "licence": "CC-BY-NC-4.0: not for commercial use",
            "sha256": sha256,
            "hash": "pinned" if sha256 else "not pinned: the file is checked against the hash that the Hub announces",
            "scores": [],
        },
    )


# Weights of others, downloaded from the Hub when they are first asked for.
UPSTREAM: tuple[Weights, ...] = (
    _mae("base", 16, "9085cfddecbe125d73b95d25b7d4eb4832f216fa", {}),
    _mae(
        "large",
        16,
        "c6421a822d7e8973bab74ed0d00695a506410faf",
        {"model.safetensors": "d58a1a547a07c3c41917c23069dcaadab6f469a8cf793a3cba5fe404c344ab68"},
    ),
    _mae(
        "huge",
        14,
        "007fb32550ad33651c5dd46afd86251f452b0334",
        {"model.safetensors": "4c1c77c532753bf1d5dc5ec1dd7052d819986a6532df5e1c81b821611948be98"},
    ),
)


def list_models() -> list[str]:
    """Names of the models that `load` knows: our own, then those that it downloads."""
    return [weights.name for weights in (*WEIGHTS, *UPSTREAM)]


def find(name: str) -> Weights | None:
    """The weights of a full name, or the newest of a bare one; None if the registry does not know it."""
    for weights in reversed((*UPSTREAM, *WEIGHTS)):
        if name in (weights.name, weights.name.partition(".")[0]):
            return weights
    return None
