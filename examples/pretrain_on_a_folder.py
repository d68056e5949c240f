"""Pretrain on unlabelled images and use the result: `python pretrain_on_a_folder.py FOLDER RUN`."""

import sys

import vision_ssl
from vision_ssl import SimCLR


def main(folder: str, out: str, **settings: object) -> None:
    """Go on from packaged weights on one's own images; `settings` are fields of `SimCLR` or `RunOptions`."""
    run = SimCLR.train(folder, init="simclr_resnet18", out=out, **settings)
    print(f"{len(run.metrics):,} lines of metrics, the last: {run.metrics[-1]}")
    features = vision_ssl.extract(run.encoder, folder)
    print(f"features {tuple(features.features.shape)} of the same images")


if __name__ == "__main__":
    main(*sys.argv[1:])
