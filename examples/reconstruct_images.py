"""Draw what MAE fills in: `python reconstruct_images.py OUT.png [IMAGE ...]`."""

import sys

from PIL import Image

from vision_ssl.data import photographs
from vision_ssl.plots import reconstruction
from vision_ssl.restore import reconstruct


def main(out: str, *paths: str) -> None:
    """Reconstruct images, or the packaged photographs, with half and with three quarters removed."""
    images: list[Image.Image] = [Image.open(path) for path in paths]
    images = images or list(photographs().values())
    for mask_ratio in (0.5, 0.75):
        views = reconstruct("mae_vit_small", images, mask_ratio=mask_ratio)
        print(reconstruction(*views, out.replace(".png", f"-{mask_ratio}.png")))


if __name__ == "__main__":
    main(*sys.argv[1:])
