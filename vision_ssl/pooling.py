"""Pooling: one vector for an image from the tokens of a ViT."""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from .errors import RecipeError
from .logistic import choose_l2

Pooling = Literal["avg", "token", "both"]

DEPTHS = (1, 4)  # last layers whose mean is tried


class Choice(NamedTuple):
    """A way to pool that was chosen.

    Attributes:
        pooling: Which tokens.
        layers: Of how many of the last layers.
        columns: Where its features are among those of `candidates`.
        losses: Held-out cross-entropy (nats) of each way that was tried.
    """

    pooling: Pooling
    layers: int
    columns: slice
    losses: dict[str, float]


def check_pooling(encoder: Any, pooling: str, layers: int) -> None:
    """Check that an encoder can be pooled so.

    Raises:
        RecipeError: There is no such way, or not for this encoder.
    """
    if pooling not in get_args(Pooling):
        raise RecipeError(f"pooling={pooling!r}: expected one of {', '.join(get_args(Pooling))}")
    if (pooling, layers) == ("avg", 1):
        return
    if getattr(encoder, "num_prefix_tokens", 0) != 1:
        name = type(encoder).__name__
        raise RecipeError(f"pooling={pooling!r}, layers={layers}: expected avg of 1, since {name} has no class token")
    if not 1 <= layers <= len(encoder.blocks):
        raise RecipeError(f"layers={layers}: expected 1 to {len(encoder.blocks)}, the blocks of the encoder")


def like_weights(encoder: nn.Module, images: Tensor) -> Tensor:
    """Normalised images in the precision of an encoder's weights, which may be less than float32."""
    dtypes = (weights.dtype for weights in encoder.parameters() if weights.is_floating_point())
    return images.to(next(dtypes, images.dtype))


def pool(encoder: nn.Module, images: Tensor, pooling: Pooling, layers: int) -> Tensor:
    """Features of normalised images (B, C, S, S), after the final norm, in the precision of the encoder.

    "avg" is the mean of the patch tokens (of one layer, what the encoder itself returns), "token" the class token,
    and "both" the second followed by the first; each is the mean over the last so many layers.

    Returns:
        (B, D), or (B, 2 D) for "both".
    """
    if (pooling, layers) == ("avg", 1):
        return encoder(like_weights(encoder, images))  # type: ignore[no-any-return]  # as modules are called
    token, patches = _last_layers(encoder, images, layers)
    parts = {"avg": [patches], "token": [token], "both": [token, patches]}[pooling]
    return torch.cat([part.mean(dim=0) for part in parts], dim=1)


def candidates(encoder: nn.Module, images: Tensor) -> Tensor:
    """What `choose_pooling` chooses from, by one pass: "both" of each of `DEPTHS`, (B, 4 D)."""
    token, patches = _last_layers(encoder, images, max(DEPTHS))
    return torch.cat([part[-layers:].mean(dim=0) for layers in DEPTHS for part in (token, patches)], dim=1)


def choose_pooling(features: Tensor, labels: Tensor, n_classes: int, seed: int) -> Choice:
    """Find the pooling with the lowest cross-entropy on held-out images of the training set.

    Each is tried with the classifier of the linear probe, its l2 chosen by the same held-out images.

    Args:
        features: What `candidates` made of the training images, float32 (n, 4 D).
        labels: int64 (n,).
        n_classes: Number of classes.
        seed: Of the held-out split.

    Raises:
        DataError: No class has two images.
    """
    dim = features.shape[1] // (2 * len(DEPTHS))
    ways: list[tuple[Pooling, int, slice]] = []
    for index, layers in enumerate(DEPTHS):
        start = 2 * dim * index
        ways.append(("avg", layers, slice(start + dim, start + 2 * dim)))
        ways.append(("token", layers, slice(start, start + dim)))
        ways.append(("both", layers, slice(start, start + 2 * dim)))
    found = [choose_l2(features[:, columns], labels, n_classes, seed)["selection_loss"] for _, _, columns in ways]
    losses = {f"{pooling} of {layers}": loss for (pooling, layers, _), loss in zip(ways, found, strict=True)}
    return Choice(*ways[found.index(min(found))], losses)


def _last_layers(encoder: Any, images: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """Class tokens and means of the patch tokens after each of the last layers, both (layers, B, D)."""
    states = encoder.forward_intermediates(
        like_weights(encoder, images),
        indices=layers,
        norm=True,
        return_prefix_tokens=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    return torch.stack([token[:, 0] for _, token in states]), torch.stack(
        [patches.mean(dim=1) for patches, _ in states]
    )
