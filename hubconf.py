"""Entry points of torch.hub: `torch.hub.load("path/of/a/clone", "mae_vit_small", source="local")`."""

from typing import Any as _Any  # torch.hub lists every callable without the underscore

import vision_ssl

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors", "PIL", "numpy", "tqdm"]


def simclr_resnet18(**options: _Any) -> _Any:
    """SimCLR ResNet-18 for 64 px images, features (B, 512); options as for `vision_ssl.load`."""
    return vision_ssl.load("simclr_resnet18", **options)


def simclr_resnet50(**options: _Any) -> _Any:
    """SimCLR ResNet-50 for 64 px images, features (B, 2048); options as for `vision_ssl.load`."""
    return vision_ssl.load("simclr_resnet50", **options)


def mae_resnet18(**options: _Any) -> _Any:
    """MAE ResNet-18 for 64 px images, features (B, 512); options as for `vision_ssl.load`."""
    return vision_ssl.load("mae_resnet18", **options)


def mae_vit_small(**options: _Any) -> _Any:
    """MAE ViT-Small/8 for 64 px images, features (B, 384); options as for `vision_ssl.load`."""
    return vision_ssl.load("mae_vit_small", **options)


def mae_vit_tiny(**options: _Any) -> _Any:
    """MAE ViT-Tiny/8 for 64 px images, features (B, 192); options as for `vision_ssl.load`."""
    return vision_ssl.load("mae_vit_tiny", **options)


def mae_vit_base(**options: _Any) -> _Any:
    """MAE ViT-Base/8 for 64 px images, features (B, 768); options as for `vision_ssl.load`."""
    return vision_ssl.load("mae_vit_base", **options)


def mae_vit_large(**options: _Any) -> _Any:
    """MAE ViT-Large/16 of its authors, for 224 px images, features (B, 1024), CC-BY-NC-4.0; options as above."""
    return vision_ssl.load("mae_vit_large", **options)


def mae_vit_huge(**options: _Any) -> _Any:
    """MAE ViT-Huge/14 of its authors, for 224 px images, features (B, 1280), CC-BY-NC-4.0; options as above."""
    return vision_ssl.load("mae_vit_huge", **options)


def encoder(name: str, **options: _Any) -> _Any:
    """Any encoder, features (B, D): a name, a folder, or `hf:owner/repo`; options as for `vision_ssl.load`."""
    return vision_ssl.load(name, **options)
