"""Features of ViT-S/16 at 224 px: from JPEG files, and from one image, against timm's transform and model in a loop.

Run it by `python -m benchmarks.bench_extract`. The weights are random, and the same in both. Ours computes in bfloat16
where the machine does so natively, the peer in float32; before anything is timed, their features must agree.
"""

import copy
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor

from benchmarks.bench_decode import write_crops
from benchmarks.timing import Comparison, record
from vision_ssl import extract
from vision_ssl.data import channel_statistics
from vision_ssl.device import native_bf16
from vision_ssl.encoders import resolve_encoder
from vision_ssl.hub import attach

SIDE, FILES, BATCH = 224, 64, 8
LEAST_COSINE = 0.999


def main() -> None:
    """Time both rows."""
    torch.manual_seed(0)
    theirs = resolve_encoder("vit_small", image_size=SIDE).build().eval()
    bf16 = native_bf16(torch.device("cpu"))
    ours, precision = attach(copy.deepcopy(theirs), SIDE, 3, card={}), partial(torch.autocast, "cpu", enabled=bf16)
    mean, std = channel_statistics(3)
    transform = create_transform((3, SIDE, SIDE), interpolation="bicubic", mean=mean, std=std, crop_pct=1.0)

    def their_batch(paths: list[Path]) -> Tensor:
        return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        root = Path(folder) / "photographs"
        paths = write_crops(root, 500, 375, FILES, 90)
        picture = Image.open(paths[0]).convert("RGB")

        def our_features() -> Tensor:
            with precision(), tempfile.TemporaryDirectory() as cache:  # a new one, so that every round decodes
                return extract(ours, root, cache_dir=cache, batch_size=BATCH).features

        def their_features() -> Tensor:
            return torch.cat([theirs(their_batch(paths[at : at + BATCH])) for at in range(0, FILES, BATCH)])

        def our_vector() -> Tensor:
            with precision():
                vector: Tensor = ours(ours.preprocess(picture)[None])
            return vector

        def their_vector() -> Tensor:
            vector: Tensor = theirs(transform(picture)[None])
            return vector

        pairs = [(our_features, their_features), (our_vector, their_vector)]
        cosine = min(F.cosine_similarity(own().float(), their()).min().item() for own, their in pairs)
        if cosine < LEAST_COSINE:
            raise SystemExit(f"the least cosine of our features and timm's is {cosine}: expected {LEAST_COSINE}")
        setting = f"ours in {'bf16' if bf16 else 'fp32'}, {torch.get_num_threads()} threads"
        rows = [
            Comparison(
                f"{FILES} JPEG files of 500 x 375 to features of ViT-S/16 at {SIDE} px, {setting}",
                our_features,
                {"timm, fp32": their_features},
                {"timm, fp32": 3.8},
            ),
            Comparison(
                f"one decoded image to its features of ViT-S/16 at {SIDE} px, {setting}",
                our_vector,
                {"timm, fp32": their_vector},
                {"timm, fp32": 2},
            ),
        ]
        record("extract", rows, rounds=5, facts={"least_cosine": round(cosine, 6)})


if __name__ == "__main__":
    main()
