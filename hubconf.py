"""Entry points of torch.hub: `torch.hub.load("path/of/a/clone", "mae_vit_small", source="local")`."""

from typing import Any as _Any  # torch.hub lists every callable without the underscore

import vision_ssl

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors", "PIL", "numpy", "tqdm"]


def simclr_resnet18(**options: _Any) -> _Any:
    """SimCLR ResNet-18 for 64 px images, features (B, 512); options as for `vision_ssl.load`."""
    return vision_ssl.load("simclr_resnet18", **options)


def mae_vit_small(**options: _Any) -> _Any:
    """MAE ViT-Small/8 for 64 px images, features (B, 384); options as for `vision_ssl.load`."""
    return vision_ssl.load("mae_vit_small", **options)
