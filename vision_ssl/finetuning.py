"""Fine-tuning: an encoder is trained end to end with a new head, as MAE does (He et al. 2022, appendix A.1).

Views are made of whole batches: a random crop, mirroring and random erasing of each image, then mixup or CutMix. The
paper's RandAugment, which works image by image, is left out.
"""

import copy
import math
import os
import time
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import DropPath  # type: ignore[attr-defined]  # timm exports by plain imports
from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]  # likewise
from torch import Tensor, nn
from torch.optim import AdamW
from tqdm import tqdm

from . import hub
from .augment import Draws, crop_resize, in_blocks, random_boxes
from .cpu import use_fast_kernels
from .data import ImageSet, Preprocess, Source, normalise
from .device import brought_near, fastest_convolutions, native_bf16
from .errors import RecipeError, TrainingError
from .features import images_for
from .leakage import warn_of_twins
from .optim import schedule_factor
from .options import FineTuning
from .pairs import check_pair, in_top, report
from .report import Report

BETAS = (0.9, 0.999)
CROPPED = (0.2, 1.0)  # share of the area, as MAE pretrains
ERASED = (0.02, 1 / 3)  # share of the area (Zhong et al. 2020, "Random Erasing Data Augmentation")
ERASED_RATIO = (0.3, 1 / 0.3)  # width / height
SCORED = 256  # images at a time


def finetune(
    encoder: nn.Module | str | os.PathLike[str],
    *,
    train: Source,
    val: Source,
    classes: int | None = None,
    device: str | torch.device | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    time_limit: float | None = None,
    in_place: bool = False,
    seed: int = 0,
    preset: str = "mae",
    **settings: Any,
) -> Report:
    """Train an encoder and a new linear head together on labelled images, and score them once on others.

    It computes in bfloat16 where the device does so natively; the weights are float32. What is random depends on the
    seed, and on the device.

    Args:
        encoder: A timm module with a `preprocess`, as `load` returns it, or what `load` takes.
        train: Labelled images to train on (of a source with several splits, "train").
        val: Labelled images to score on (of a source with several splits, "val"), once, at the end.
        classes: Only the first so many classes by name take part; by default all.
        device: Where to compute; by default where the encoder is.
        cache_dir: Where the decoded images are kept.
        time_limit: Minutes after which no further epoch begins. Better results come of fewer epochs that finish.
        in_place: Train the given module itself, which then has the new head and float32 weights; by default it is
            copied.
        seed: Of the head, the order of the images, the views, and the bootstrap.
        preset: Settings to start from: "mae", or "small-data" for some thousand images or fewer.
        **settings: Fields of `FineTuning`, which change single ones.

    Returns:
        A report, whose training accuracy is that on the training images without augmentation.

    Raises:
        DataError: A source cannot be read or has no labels, or the two do not fit together.
        RecipeError: A preset or setting is unknown or out of range, or the encoder is no timm module.
        TrainingError: The loss is not finite.

    Warns:
        UserWarning: `val` has a class that `train` lacks, or some of its images are in `train` too.
    """
    how = FineTuning.of(preset, **settings)
    module = encoder if isinstance(encoder, nn.Module) else hub.load(encoder)
    options: dict[str, Any] = {"classes": classes, "cache_dir": cache_dir, "require_labels": True}
    train_images, preprocess = images_for(module, train, split="train", **options)
    val_images, _ = images_for(module, val, split="val", **options)
    labels = check_pair(train_images, val_images)
    warn_of_twins(train_images, val_images)
    if len(labels) < how.batch_size:
        raise RecipeError(f"batch_size={how.batch_size}: expected at most {len(labels):,}, the number of images")
    where = next(module.parameters()).device if device is None else torch.device(device)
    with torch.random.fork_rng([where] if where.type == "cuda" else []), fastest_convolutions():
        torch.manual_seed(seed)
        model = with_head(module if in_place else copy.deepcopy(module), len(train_images.classes), how.drop_path)
        done = _train(model.to(where, torch.float32), train_images, preprocess, how, where, seed, time_limit)
    train_hits = (_predict(model, train_images, preprocess, where)[0] == labels).double().mean()
    predictions, top5 = _predict(model, val_images, preprocess, where)
    return report(
        "finetune",
        predictions,
        train_images,
        val_images,
        asdict(how) | {"epochs_done": done},
        seed,
        top5=top5,
        train_accuracy=100 * float(train_hits),
    )


def with_head(model: nn.Module, n_classes: int, drop_path: float) -> nn.Module:
    """Give a timm module a random linear head, and let its residual branches be skipped in training, in place.

    Args:
        model: A ViT or ResNet.
        n_classes: Width of the head.
        drop_path: Probability for the last branch; it falls linearly to 0 at the first (Huang et al. 2016, section 3).

    Raises:
        RecipeError: It is no timm module, or does not pool.
    """
    if not hasattr(model, "reset_classifier"):
        raise RecipeError(f"encoder: {type(model).__name__} has no reset_classifier: expected a timm module")
    pool = getattr(model, "global_pool", None)  # a ViT's is its name, a ResNet's a module that knows it
    if getattr(pool, "pool_type", pool) == "":
        raise RecipeError("encoder: has global_pool='', and does not pool: expected features (B, D)")
    cast(Any, model).reset_classifier(n_classes)
    names = ("drop_path", "drop_path1", "drop_path2")  # of a ResNet's block; of a ViT's
    blocks = [module for module in model.modules() if any(hasattr(module, name) for name in names)]
    for rate, block in zip(torch.linspace(0, drop_path, len(blocks)).tolist(), blocks, strict=True):
        for name in names:
            if hasattr(block, name):
                setattr(block, name, DropPath(rate))
    return model


def layer_groups(model: nn.Module, how: FineTuning) -> list[dict[str, Any]]:
    """Groups of parameters with their `weight_decay`, and `lr_scale`: the share of the learning rate of their layer.

    The head has all of it, and each layer before `layer_decay` times that of the next (Clark et al. 2020, ELECTRA,
    section 3.1). timm knows the layers of its modules.
    """
    plain = cast(Any, model).no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    return cast(
        list[dict[str, Any]],
        param_groups_layer_decay(
            model, weight_decay=how.weight_decay, no_weight_decay_list=plain, layer_decay=how.layer_decay
        ),
    )


def view(images: Tensor, preprocess: Preprocess, draws: Draws, *, erase: float) -> Tensor:
    """Crop, mirror and erase each image of uint8 (B, C, H, W) at random: normalised float32 (B, C, S, S).

    What is erased becomes noise, each value uniform in its range (Zhong et al. 2020).
    """
    channels, height, width = images.shape[1:]
    size = preprocess.size
    boxes = random_boxes(draws, height, width, scale=CROPPED)
    flips = draws.chance(0.5)
    chosen = draws.chance(erase)
    holes = _inside(random_boxes(draws, size, size, scale=ERASED, ratio=ERASED_RATIO), size) & chosen[:, None, None]
    noise = draws.uniform(channels, size, size)
    views = torch.empty(len(images), channels, size, size, device=images.device)
    for rows in in_blocks(views):
        part = crop_resize(images[rows], boxes[rows], flips[rows], size=size, interpolation="bicubic")
        part = torch.where(holes[rows, None], noise[rows], part)
        views[rows] = normalise(part, preprocess.mean, preprocess.std)
    return views


def _inside(boxes: Tensor, size: int) -> Tensor:
    """Mask (B, size, size) of the pixels in boxes (B, 4) of top, left, height, width."""
    pixel = torch.arange(size, device=boxes.device)
    top, left, height, width = boxes[:, :, None].unbind(dim=1)
    rows = (pixel >= top) & (pixel < top + height)
    columns = (pixel >= left) & (pixel < left + width)
    return rows[:, :, None] & columns[:, None]


def smoothed(labels: Tensor, n_classes: int, share: float) -> Tensor:
    """Targets float32 (B, K) of labels int64 (B,), with a share of each spread over all classes.

    Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", section 7.
    """
    return F.one_hot(labels, n_classes) * (1 - share) + share / n_classes


def mix(
    images: Tensor, targets: Tensor, *, mixup: float, cutmix: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Mix each image with its counterpart from the other end of the batch, and their targets by the same share.

    Mixup (Zhang et al. 2018) blends the two; CutMix (Yun et al. 2019) puts a rectangle of one into the other. All
    images of a batch have the same share, which is drawn from a beta distribution, as timm's `Mixup` does.

    Args:
        images: float32 (B, C, S, S).
        targets: float32 (B, K), rows that sum to 1.
        mixup: Parameter of the distribution for mixup, or 0 for none.
        cutmix: Likewise for CutMix; with both, each is as likely.
        rng: Draws on the host, which needs no device to answer.
    """
    if mixup == cutmix == 0:
        return images, targets
    cut = mixup == 0 or (cutmix > 0 and rng.random() < 0.5)
    alpha = cutmix if cut else mixup
    share = float(rng.beta(alpha, alpha))
    if not cut:
        return images.flip(0).lerp(images, share), targets.flip(0).lerp(targets, share)
    size = images.shape[-1]
    centre, half = rng.uniform(0, size, 2), size * math.sqrt(1 - share) / 2
    top, left = (centre - half).round().clip(0, size).astype(int).tolist()
    bottom, right = (centre + half).round().clip(0, size).astype(int).tolist()
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    share = 1 - (bottom - top) * (right - left) / size**2  # of what lies inside the image
    return mixed, targets.flip(0).lerp(targets, share)


def _train(
    model: nn.Module,
    images: ImageSet,
    preprocess: Preprocess,
    how: FineTuning,
    device: torch.device,
    seed: int,
    time_limit: float | None,
) -> int:
    """Train the model in place; return how many epochs it had."""
    bf16 = native_bf16(device)
    if device.type == "cpu":
        use_fast_kernels(model, bf16=bf16)
    model.to(memory_format=torch.channels_last).train()
    optimizer = AdamW(layer_groups(model, how), betas=BETAS, fused=True)
    weights = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    means = [tensor.clone() for tensor in weights] if how.ema else weights
    pixels = brought_near(images.pixels, device)
    labels = cast(Tensor, images.labels).to(pixels.device)
    steps_per_epoch = len(images) // how.batch_size
    warmup_epochs = how.epochs / 20 if how.warmup_epochs is None else how.warmup_epochs
    order = torch.Generator().manual_seed(seed)
    began = time.monotonic()
    bar = tqdm(range(how.epochs), f"fine-tuning on {images.name}", unit=" epochs", disable=None, delay=3)
    for epoch in bar:
        shuffled = torch.randperm(len(images), generator=order).to(pixels.device)
        for index, rows in enumerate(shuffled.split(how.batch_size)[:steps_per_epoch]):
            step = epoch * steps_per_epoch + index
            rng = np.random.default_rng((seed, step))
            factor = schedule_factor(
                step,
                steps=how.epochs * steps_per_epoch,
                warmup_steps=round(warmup_epochs * steps_per_epoch),
                warmup="linear",
                schedule="cosine",
            )
            for group in optimizer.param_groups:
                group["lr"] = how.base_lr * how.batch_size / 256 * factor * group["lr_scale"]
            draws = Draws(int(rng.integers(2**62)), rows=slice(None), total=len(rows), device=device)
            views = view(pixels.index_select(0, rows).to(device), preprocess, draws, erase=how.erase)
            targets = smoothed(labels[rows].to(device), len(images.classes), how.label_smoothing)
            views, targets = mix(views, targets, mixup=how.mixup, cutmix=how.cutmix, rng=rng)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(views), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if how.ema:
                # Low at first, or a short run would be scored by weights from its beginning.
                decay = min(how.ema, (1 + step) / (10 + step))
                torch._foreach_lerp_(means, weights, 1 - decay)
        value = loss.item()
        bar.set_postfix(loss=f"{value:.3f}")
        if not math.isfinite(value):
            raise TrainingError(f"the loss is {value} in epoch {epoch + 1}: try a lower base_lr or a longer warm-up")
        if time_limit is not None and time.monotonic() - began > 60 * time_limit:
            break
    if how.ema:
        torch._foreach_copy_(weights, means)
    return epoch + 1


def _predict(model: nn.Module, images: ImageSet, preprocess: Preprocess, device: torch.device) -> tuple[Tensor, Tensor]:
    """Classes int64 (n,) of images as they are, and whether the label is among the five likeliest; on the CPU."""
    model.eval()
    classes, top5 = [], []
    labels = cast(Tensor, images.labels)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=native_bf16(device)):
        for part, targets in zip(images.pixels.split(SCORED), labels.split(SCORED), strict=True):
            logits = model(preprocess.normalise(part.to(device)))
            classes.append(logits.argmax(dim=1))
            top5.append(in_top(logits, targets.to(device)))
    return torch.cat(classes).cpu(), torch.cat(top5).cpu()
