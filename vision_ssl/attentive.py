"""The attentive probe: a classifier that learns where to look among the tokens of a frozen encoder."""

import copy
import os
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from tqdm import tqdm

from .data import ImageSet, Preprocess, Source
from .features import evaluating, images_for
from .logistic import hold_out
from .optim import schedule_factor
from .pairs import check_pair, in_top, report
from .pooling import like_weights
from .report import Report

SCORED = 256  # images at a time


@dataclass(frozen=True, kw_only=True)
class Attentive:
    """How an attentive probe is trained: by AdamW, with a learning rate that follows a half cosine to zero.

    Attributes:
        lrs: Learning rates to choose from, in rising order.
        epochs: Passes over the training images.
        batch_size: Images of a step.
        weight_decay: Of AdamW.
    """

    lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    epochs: int = 10
    batch_size: int = 256
    weight_decay: float = 0.01


class AttentionPool(nn.Module):
    """One learned query attends to the tokens of an image; a linear layer classifies what it gathers.

    Chen et al. 2022, "Context Autoencoder for Self-Supervised Representation Learning", call it attentive probing. A
    LayerNorm before it takes away the scale of the tokens.

    Args:
        dim: Width D of the tokens, which heads of 64 divide where they can.
        n_classes: Number of classes K.
    """

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Parameter(0.02 * torch.randn(dim))
        self.attention = nn.MultiheadAttention(dim, dim // 64 if dim % 64 == 0 else 1, batch_first=True)
        self.head = nn.Linear(dim, n_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, K) of tokens (B, N, D)."""
        tokens = self.norm(tokens)
        query = self.query.expand(len(tokens), 1, -1)
        gathered, _ = self.attention(query, tokens, tokens, need_weights=False)
        return cast(Tensor, self.head(gathered[:, 0]))


def attentive(
    encoder: nn.Module,
    *,
    train: Source,
    val: Source,
    how: Attentive = Attentive(),  # frozen
    device: str | torch.device | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Report:
    """Train an attentive probe on the tokens of training images, and score it on others.

    The tokens are a ViT's patch tokens, or the places of a ResNet's last map. They are not kept, which would take
    (1 + N) times the memory of features: each step computes those of its batch. With 10 epochs, the encoder so reads
    the training images 18 times, without gradients, 8 of which serve to choose the learning rate.

    The learning rate is the one that is most accurate on a held-out fifth of the training images (of equally accurate
    ones the lowest); the probe is then trained on all. Validation images serve for nothing but the scores.

    Args:
        encoder: A frozen encoder with `forward_features` and `preprocess`, as `load` returns.
        train: Labelled images to train on.
        val: Labelled images to score on.
        how: How the probe is trained.
        device: Where to compute; by default where the encoder is.
        cache_dir: Where the decoded images are kept.
        seed: Of the held-out split, the weights, the batches and the bootstrap.

    Raises:
        DataError: A source cannot be read or has no labels, or the two do not fit together.

    Warns:
        UserWarning: `val` has a class that `train` lacks.
    """
    train_images, preprocess = images_for(encoder, train, split="train", cache_dir=cache_dir, require_labels=True)
    val_images, _ = images_for(encoder, val, split="val", cache_dir=cache_dir, require_labels=True)
    labels = check_pair(train_images, val_images)
    held = hold_out(labels, torch.Generator().manual_seed(seed))
    with evaluating(encoder, device) as where:
        tokens = _Tokens(encoder, preprocess, where)
        found = _train(tokens, train_images.select(~held), how, seed)
        part = train_images.select(held)
        accuracies = [_accuracy(probe, tokens, part) for probe in found]
        best = accuracies.index(max(accuracies))
        [probe] = _train(tokens, train_images, replace(how, lrs=(how.lrs[best],)), seed)
        logits = _logits(probe, tokens, val_images)
        train_accuracy = _accuracy(probe, tokens, train_images)
    settings = asdict(how) | {
        "lr": how.lrs[best],
        "lr_at_grid_edge": best in (0, len(how.lrs) - 1),
        "selection_fitted_on": int((~held).sum()),
        "selection_scored_on": int(held.sum()),
        "selection_accuracy": accuracies[best],
    }
    targets = cast(Tensor, val_images.labels)
    return report(
        "attentive",
        logits.argmax(dim=1),
        train_images,
        val_images,
        settings,
        seed,
        top5=in_top(logits, targets),
        train_accuracy=train_accuracy,
    )


@dataclass(frozen=True)
class _Tokens:
    """Computes the tokens of images, on a device."""

    encoder: nn.Module
    preprocess: Preprocess
    device: torch.device

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Tokens (B, N, D) of uint8 images (B, C, S, S)."""
        encoder: Any = self.encoder
        images = like_weights(encoder, self.preprocess.normalise(pixels.to(self.device)))
        states: Tensor = encoder.forward_features(images).float()
        return states.flatten(2).mT if states.ndim == 4 else states[:, encoder.num_prefix_tokens :]


def _train(tokens: _Tokens, images: ImageSet, how: Attentive, seed: int) -> list[AttentionPool]:
    """A probe for each learning rate; all start from the same weights and see the same batches."""
    labels = cast(Tensor, images.labels)
    dim = tokens(images.pixels[:1]).shape[2]
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        first = AttentionPool(dim, len(images.classes))
    probes = [copy.deepcopy(first).to(tokens.device) for _ in how.lrs]
    groups = [{"params": list(probe.parameters()), "lr": lr} for probe, lr in zip(probes, how.lrs, strict=True)]
    optimizer = AdamW(groups, weight_decay=how.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    batches = -(-len(images) // how.batch_size)
    bar = tqdm(total=how.epochs * batches, desc=f"attentive probe on {images.name}", disable=None, delay=3)
    with bar:
        for epoch in range(how.epochs):
            for index, rows in enumerate(torch.randperm(len(images), generator=generator).split(how.batch_size)):
                factor = schedule_factor(
                    epoch * batches + index,
                    steps=how.epochs * batches,
                    warmup_steps=0,
                    warmup="linear",
                    schedule="cosine",
                )
                for group, lr in zip(optimizer.param_groups, how.lrs, strict=True):
                    group["lr"] = lr * factor
                batch, targets = tokens(images.pixels[rows]), labels[rows].to(tokens.device)
                # No probe's loss depends on another's weights, so that the gradient of the sum is that of each.
                torch.stack([F.cross_entropy(probe(batch), targets) for probe in probes]).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                bar.update()
    return probes


@torch.no_grad()
def _logits(probe: AttentionPool, tokens: _Tokens, images: ImageSet) -> Tensor:
    """Logits float32 (n, K), on the CPU."""
    return torch.cat([probe(tokens(part)).cpu() for part in images.pixels.split(SCORED)])


def _accuracy(probe: AttentionPool, tokens: _Tokens, images: ImageSet) -> float:
    hits = _logits(probe, tokens, images).argmax(dim=1) == cast(Tensor, images.labels)
    return 100 * float(hits.double().mean())
