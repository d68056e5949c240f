"""Find the most similar images of a folder: `python search_by_image.py QUERY FOLDER`."""

import sys

import torch.nn.functional as F
from PIL import Image

import vision_ssl


def main(query: str, folder: str) -> None:
    """Print the five images of `folder` whose features are closest to those of `query`."""
    encoder = vision_ssl.load("simclr_resnet18")
    index = vision_ssl.extract(encoder, folder)
    feature = encoder(encoder.preprocess(Image.open(query))[None]).detach()
    similarity = F.cosine_similarity(index.features, feature)
    for position in similarity.argsort(descending=True)[:5].tolist():
        print(f"{similarity[position]:.3f}  {index.paths[position]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
