"""Pictures of what an encoder does with single images: neighbours, reconstructions, and what it looks at."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..data import ImageSet
from ..errors import WeightsError
from ..features import Features
from ..hub import Encoder
from ..recipes import MAE
from ..restore import recipe_of, reconstruct
from .glimpses import class_attention, is_vit, map_similarity, token_colours
from .html import Child, Markup, figure, scrolling, tag
from .measured import Samples
from .pictures import enlarged, picture, strength

NEIGHBOURS = 8
SHOWN = 8  # images
RATIOS = (0.5, 0.75, 0.9)  # removed by MAE


def examples(images: ImageSet) -> Tensor:
    """Indices of the first image of each of `SHOWN` classes that are spread evenly: not chosen by any outcome."""
    labels = cast(Tensor, images.labels)
    present = labels.unique()
    chosen = present[torch.linspace(0, len(present) - 1, min(SHOWN, len(present))).round().long()]
    return torch.stack([(labels == label).nonzero()[0, 0] for label in chosen])


def neighbours(samples: Samples, train: Features, val: Features) -> Markup:
    """Some images, each with those of the training images that are nearest to it."""
    queries = examples(samples.val)
    similarity = F.normalize(val.features[queries]) @ F.normalize(train.features).T
    nearest = similarity.topk(min(NEIGHBOURS, len(train)), dim=1).indices
    labels, train_labels = cast(Tensor, val.labels), cast(Tensor, train.labels)
    rows: list[Child] = []
    hits = 0
    for query, found in zip(queries.tolist(), nearest.tolist(), strict=True):
        name = val.classes[labels[query]]
        cells = []
        for index in found:
            other, right = train.classes[train_labels[index]], bool(train_labels[index] == labels[query])
            hits += right
            image = picture(samples.train.pixels[index], f"{other}, {'right' if right else 'wrong'}")
            cells.append(
                tag("li", image, tag("span", f"{'✓' if right else '✗'} {other}"), class_="right" if right else "wrong")
            )
        query_cell = tag("div", picture(samples.val.pixels[query], f"query: {name}"), tag("span", name))
        rows.append(tag("div", query_cell, tag("ol", cells), class_="neighbours"))
    caption = (
        f"Left, validation images, one of each of {len(queries)} classes; beside each, its {nearest.shape[1]} nearest "
        f"training images by cosine similarity, nearest first. ✓ and a solid line: of the same class; ✗ and a dashed "
        f"line: of another. {hits} of {nearest.numel()} are of the same class."
    )
    return figure(rows, caption)


def reconstructions(name: str, images: ImageSet) -> Markup:
    """What MAE is shown, and what it makes of it, for several shares of the image removed."""
    chosen = images.pixels[examples(images)]
    originals = [_pillow(pixels) for pixels in chosen]
    names = _names(images)
    rows: dict[str, Sequence[Tensor]] = {"original": list(chosen)}
    try:
        for ratio in RATIOS:
            _, masked, predicted = reconstruct(name, originals, mask_ratio=ratio)
            removed = f"{100 * ratio:.0f} % removed"
            rows |= {removed: list(masked), f"{removed}, filled in": list(predicted)}
    except WeightsError as error:
        return tag("p", f"There are none: {error}.")
    caption = (
        "The encoder sees what is not gray, and the decoder fills in the rest. What was kept is shown as it was: MAE "
        "is not trained to repeat it."
    )
    if cast(MAE, recipe_of(name)).norm_pix:
        caption += " It predicts each patch in terms of the patch's own mean and contrast, which are given here."
    return figure(_strip(rows, names), caption)


def glimpses(encoder: Encoder, images: ImageSet) -> Markup:
    """What single images look like to the encoder."""
    chosen = images.pixels[examples(images)]
    names, size = _names(images), chosen.shape[-1]
    normalised = encoder.preprocess.normalise(chosen)
    rows: dict[str, Sequence[Tensor]] = {"image": list(chosen)}
    if is_vit(encoder):
        attention = class_attention(encoder, normalised)
        rows["attention"] = [strength(part.clamp(max=part.quantile(0.95)), size) for part in attention]
        rows["tokens"] = [enlarged(part, size) for part in token_colours(encoder, normalised)]
        caption = (
            "Attention: where the class token looks in the last block (mean of the heads), from violet, least, to "
            "yellow, its most favoured twentieth. Tokens: the first three principal components of the patch tokens of "
            "these images, as red, green and blue; parts of one colour are alike to the encoder."
        )
    else:
        similarity = map_similarity(encoder, normalised)
        rows["similarity"] = [strength(part, size) for part in similarity]
        side = similarity.shape[-1]
        caption = (
            f"Similarity: how much a position of the encoder's map ({side} x {side}) is like the mean of all (cosine), "
            "from violet, least, to yellow, most."
        )
    return figure(_strip(rows, names), caption)


def _strip(rows: dict[str, Sequence[Tensor]], names: Sequence[str]) -> Markup:
    """Pictures in rows with a title each, one column an image."""
    cells = (
        (tag("p", title), (picture(image, f"{name}: {title}") for image, name in zip(images, names, strict=True)))
        for title, images in rows.items()
    )
    strip = tag("div", cells, class_="strip", style=f"--columns: {len(names)}")
    return scrolling(", ".join(rows), strip)


def _names(images: ImageSet) -> list[str]:
    labels = cast(Tensor, images.labels)
    return [images.classes[labels[index]] for index in examples(images).tolist()]


def _pillow(pixels: Tensor) -> Image.Image:
    """An image of 1 or 3 channels, uint8 (C, S, S), as MAE's preprocessing takes it."""
    return Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).contiguous().numpy())
