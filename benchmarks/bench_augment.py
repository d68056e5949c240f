"""SimCLR's two views of decoded images on one thread, against lightly's SimCLRTransform with the same strengths.

Run it by `python -m benchmarks.bench_augment`.
"""

from dataclasses import replace

import torch
from lightly.transforms.simclr_transform import SimCLRTransform
from torchvision.transforms.functional import (  # type: ignore[import-untyped]  # it ships no types
    pil_to_tensor,
    to_pil_image,
)

from benchmarks.timing import Comparison, record
from vision_ssl import SimCLR
from vision_ssl.augment import Draws
from vision_ssl.data import photographs

BATCH = 256


def recipe(size: int) -> SimCLR:
    """What `SimCLRTransform` does by default."""
    return SimCLR(
        image_size=size,
        crop_scale=(0.08, 1.0),
        jitter=(0.8, 0.8, 0.8, 0.2),
        jitter_probability=0.8,
        grayscale=0.2,
        blur=0.5,
        blur_kernel=2 * (size // 20) + 1,
    )


def images(size: int) -> torch.Tensor:
    """uint8 (BATCH, 3, size, size), cut from the packaged photographs."""
    generator = torch.Generator().manual_seed(0)
    sources = [pil_to_tensor(picture.convert("RGB")) for picture in photographs().values()]
    cuts = []
    for number in range(BATCH):
        source = sources[number % len(sources)]
        top, left = (int(torch.randint(side - size, (), generator=generator)) for side in source.shape[1:])
        cuts.append(source[:, top : top + size, left : left + size])
    return torch.stack(cuts)


def comparison(size: int, least: float, *, fast: bool) -> Comparison:
    """A row for one image size; each contender ends with two float32 batches."""
    pixels, settings, transform = images(size), replace(recipe(size), fast_views=fast), SimCLRTransform(input_size=size)
    pictures = [to_pil_image(image) for image in pixels]
    whole = slice(0, BATCH)

    def ours() -> object:
        return settings.augment(pixels, Draws(0, rows=whole, total=BATCH, device=pixels.device))

    def theirs() -> object:
        views = [transform(picture) for picture in pictures]
        return torch.stack([first for first, _ in views]), torch.stack([second for _, second in views])

    return Comparison(
        f"two SimCLR views of {BATCH} decoded {size} px images, {'fast' if fast else 'exact'}, 1 thread, eager",
        ours,
        {"lightly": theirs},
        {"lightly": least},
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = [(64, 2.5, False), (32, 7.0, False), (64, 7.0, True), (32, 18.0, True)]
    record("augment", [comparison(size, least, fast=fast) for size, least, fast in rows])
