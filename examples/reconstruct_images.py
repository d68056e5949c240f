"""Draw what MAE fills in: `python reconstruct_images.py OUT.png [IMAGE ...]`."""

import sys
from pathlib import Path

from PIL import Image

from vision_ssl.data import photographs
from vision_ssl.plots import reconstruction
from vision_ssl.restore import reconstruct


def main(out: str, *paths: str) -> None:
    """Reconstruct images, or the packaged photographs, with half and with three quarters removed."""
    images: list[Image.Image] = [Image.open(path) for path in paths]
    images = images or list(photographs().values())
    path = Path(out)
    for mask_ratio in (0.5, 0.75):
        views = reconstruct("mae_vit_small", images, mask_ratio=mask_ratio)
        print(reconstruction(*views, path.with_stem(f"{path.stem}-{mask_ratio}")))


if __name__ == "__main__":
    main(*sys.argv[1:])
