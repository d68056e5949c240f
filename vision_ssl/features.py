"""Features: what a frozen encoder makes of images, kept with their labels and where they came from."""

import contextlib
import hashlib
import inspect
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .data import ImageSet, Preprocess, Source, Split, first_classes, open_images
from .device import brought_ahead
from .errors import DataError
from .pooling import Pooling, check_pooling, pool
from .storage import load_tensors, save_tensors

BATCH = 256
# On a CPU: of more, each layer's output is too large for the allocator to keep, and is paged in anew.
CPU_PIXELS, CPU_LEAST = 1 << 17, 8
IN_FLIGHT = {"cuda": 16}  # batches after which the host waits for the device, to take what is ready; elsewhere each

_FACTS = ("classes", "paths", "digest", "encoder", "preprocess")


@dataclass(frozen=True, eq=False)  # tensors have no single answer to ==
class Features:
    """Features of n images.

    Attributes:
        features: float32 (n, D).
        labels: int64 (n,), or None.
        classes: Class names in label order; () without labels.
        paths: Where each image came from, as in `ImageSet`.
        digest: `ImageSet.digest` of the images.
        encoder: What made them, such as "resnet18".
        preprocess: How the images were prepared and the tokens pooled; "" where it is not known.

    Raises:
        DataError: Shapes, types or labels do not fit together.
    """

    features: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    digest: str
    encoder: str = ""
    preprocess: str = ""

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.features.dtype != torch.float32:
            raise DataError(f"features: got {_describe(self.features)}, expected torch.float32 (n, D)")
        if len(self.paths) != len(self.features):
            raise DataError(f"paths: got {len(self.paths):,}, expected one for each of {len(self):,} features")
        if len(set(self.classes)) != len(self.classes):
            raise DataError(f"classes: {len(self.classes)} names of which some are equal, expected different ones")
        if self.labels is None:
            return
        if self.labels.shape != (len(self),) or self.labels.dtype != torch.int64:
            raise DataError(f"labels: got {_describe(self.labels)}, expected torch.int64 ({len(self)},)")
        if len(self) and not (self.labels.min() >= 0 and self.labels.max() < len(self.classes)):
            raise DataError(
                f"labels: got {self.labels.min()} to {self.labels.max()}, expected 0 to {len(self.classes) - 1}, "
                f"since there are {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.features)

    def select(self, indices: Sequence[int] | Tensor | npt.NDArray[Any]) -> "Features":
        """Return those at `indices`, or where a mask is true; class names stay as they are."""
        index = torch.arange(len(self))[torch.as_tensor(indices, dtype=None if len(indices) else torch.int64)]
        return replace(
            self,
            features=self.features[index],
            labels=None if self.labels is None else self.labels[index],
            paths=tuple(self.paths[i] for i in index.tolist()),
            digest=hashlib.sha256(self.digest.encode() + index.numpy().tobytes()).hexdigest(),
        )

    def first_classes(self, count: int) -> "Features":
        """Return those of the first `count` classes by name, which are numbered anew.

        Raises:
            DataError: There are no labels, or fewer than `count` classes.
        """
        index, labels, classes = first_classes(self.labels, self.classes, count)
        return replace(self.select(index), labels=labels, classes=classes)

    def pooled(self, pooling: Pooling, layers: int, columns: slice = slice(None)) -> "Features":
        """Return some columns (by default all), with a note of how they were pooled."""
        preprocess = f"{self.preprocess}; {pooling} of {layers}"
        return replace(self, features=self.features[:, columns].contiguous(), preprocess=preprocess)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: `features`, `labels` if there are any, and the rest as JSON in its header.

        Raises:
            CheckpointError: The disk refuses.
        """
        tensors = {"features": self.features} | ({} if self.labels is None else {"labels": self.labels})
        save_tensors(Path(path), tensors, {name: getattr(self, name) for name in _FACTS})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Features":
        """Read what `save` wrote.

        Raises:
            CheckpointError: There is no such file, or it is damaged.
            DataError: It holds something else than features.
        """
        tensors, facts = load_tensors(Path(path))
        try:
            return cls(
                features=tensors["features"],
                labels=tensors.get("labels"),
                classes=tuple(facts["classes"]),
                paths=tuple(facts["paths"]),
                digest=facts["digest"],
                encoder=facts["encoder"],
                preprocess=facts.get("preprocess", ""),  # an earlier version did not note it
            )
        except KeyError as error:
            raise DataError(f"{path}: expected a file that Features.save wrote, found none of its {error}") from None
        except DataError as error:
            raise DataError(f"{path}: {error}") from None


def extract(
    encoder: nn.Module,
    source: Source,
    *,
    split: Split = "train",
    pooling: Pooling = "avg",
    layers: int = 1,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    require_labels: bool = False,
) -> Features:
    """Run a frozen encoder over a source of images.

    The encoder works in eval mode and is then left as it was. It computes in its own precision, such as bfloat16 after
    `load(..., dtype=torch.bfloat16)`; or call this inside `torch.autocast`.

    Args:
        encoder: Takes (B, C, S, S) in the precision of its weights and returns (B, D). Its `preprocess` says which size
            and channels it wants: encoders from `load` have one.
        source: Images, as `open_images` takes them.
        split: Which split of the source, where it has several.
        pooling: "avg" is what the encoder returns: the mean of a ViT's patch tokens, or of a ResNet's map. Of a ViT
            also "token", its class token, or "both" side by side.
        layers: How many of a ViT's last layers are averaged.
        batch_size: Images at a time; by default 256, and on a CPU 32 of 64 px or 8 of 224 px.
        device: Where to compute, such as "cuda"; by default where the encoder is.
        cache_dir: Where the decoded images are kept.
        require_labels: Refuse a source without labels.

    Returns:
        Features of all images in their order, on the CPU.

    Raises:
        DataError: The source cannot be read, or the encoder lacks a `preprocess` or returns something else.
        RecipeError: The encoder cannot be pooled so.
    """
    check_pooling(encoder, pooling, layers)
    forward = partial(pool, encoder, pooling=pooling, layers=layers)
    options: dict[str, Any] = {"split": split, "device": device, "cache_dir": cache_dir}
    found = extract_with(encoder, forward, source, batch_size=batch_size, require_labels=require_labels, **options)
    return found.pooled(pooling, layers)


def extract_with(
    encoder: nn.Module,
    forward: Callable[[Tensor], Tensor],
    source: Source,
    *,
    split: Split = "train",
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    require_labels: bool = False,
) -> Features:
    """Do as `extract`, with what `forward` makes of normalised images by means of the encoder: (B, D)."""
    if batch_size is not None and batch_size < 1:
        raise DataError(f"batch_size={batch_size}: expected at least 1")
    images, preprocess = images_for(encoder, source, split=split, cache_dir=cache_dir, require_labels=require_labels)
    features, done = torch.empty(0), 0
    with evaluating(encoder, device) as where, tqdm(total=len(images), **_bar(images)) as bar:
        batches = images.pixels.split(batch_size or images_at_a_time(preprocess, where))
        outputs: list[Tensor] = []
        together = IN_FLIGHT.get(where.type, 1)
        for number, pixels in enumerate(brought_ahead(batches, where), 1):
            with torch.inference_mode():
                output = forward(preprocess.normalise(pixels))
            if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(pixels):
                raise DataError(f"encoder: returned {_describe(output)}, expected pooled features ({len(pixels)}, D)")
            outputs.append(output.clone() if together > 1 else output)  # an encoder may use its memory again
            if number % together and number < len(batches):
                continue
            if done == 0:  # whole from the start: batches kept one by one would leave holes in the memory
                features = torch.empty(len(images), output.shape[1])
            ready = torch.cat(outputs)
            features[done : done + len(ready)] = ready
            done += len(ready)
            bar.update(len(ready))
            outputs.clear()
    return _features(features, images, _name(encoder), str(preprocess))


def images_at_a_time(preprocess: Preprocess, device: torch.device) -> int:
    """How many images to encode together without gradients."""
    return max(CPU_LEAST, CPU_PIXELS // preprocess.size**2) if device.type == "cpu" else BATCH


def images_for(
    encoder: nn.Module,
    source: Source,
    *,
    split: Split,
    classes: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    require_labels: bool = False,
) -> tuple[ImageSet, Preprocess]:
    """Open a source, or its first so many classes by name, at the size that an encoder takes.

    Returns:
        The images, and the encoder's preprocessing.

    Raises:
        DataError: The source cannot be read or has other channels or too few classes, or the encoder lacks a
            `preprocess` or takes more than images.
    """
    preprocess = getattr(encoder, "preprocess", None)
    if not isinstance(preprocess, Preprocess):
        raise DataError(
            f"encoder: {type(encoder).__name__} has no preprocess: expected one from vision_ssl.load, or with "
            "encoder.preprocess = Preprocess(size, mean, std)"
        )
    try:
        inspect.signature(encoder.forward).bind("images")
    except ValueError:
        pass  # TorchScript shows no signature
    except TypeError as error:
        raise DataError(
            f"encoder: {type(encoder).__name__} cannot be called with images alone ({error}): expected an encoder, as "
            "load returns it without part='full'"
        ) from error
    for name, least in (("mean", 0.0), ("std", 1e-6)):
        values = getattr(preprocess, name)
        if not all(least <= value <= 1 for value in values):
            raise DataError(f"encoder: its preprocess has {name}={values}, expected within 0..1, the range of pixels")
    images = open_images(source, size=preprocess.size, split=split, cache_dir=cache_dir, require_labels=require_labels)
    channels = images.pixels.shape[1]
    if channels != len(preprocess.mean):
        raise DataError(
            f"source {images.name}: images have {channels} channels, the encoder takes {len(preprocess.mean)}"
        )
    return images if classes is None else images.first_classes(classes), preprocess


def pixel_features(
    source: Source,
    *,
    size: int,
    split: Split = "train",
    cache_dir: str | os.PathLike[str] | None = None,
) -> Features:
    """Take raw pixels as features: the baseline that an encoder must beat.

    Args:
        source: Images, as `open_images` takes them.
        size: Side of the images, pixels.
        split: Which split of the source, where it has several.
        cache_dir: Where the decoded images are kept.

    Returns:
        Features of width D = C * size * size, 0..1.

    Raises:
        DataError: The source cannot be read.
    """
    images = open_images(source, size=size, split=split, cache_dir=cache_dir)
    return _features(images.pixels.flatten(1).float() / 255, images, f"pixels {size} x {size}")


def _features(features: Tensor, images: ImageSet, encoder: str, preprocess: str = "") -> Features:
    return Features(features, images.labels, images.classes, images.paths, images.digest, encoder, preprocess)


@contextlib.contextmanager
def evaluating(encoder: nn.Module, device: str | torch.device | None) -> Iterator[torch.device]:
    """Put the encoder into eval mode on a device, and afterwards each module back into its mode and place."""
    home = next(itertools.chain(encoder.parameters(), encoder.buffers()), torch.empty(0)).device
    modes = {module: module.training for module in encoder.modules()}
    where = home if device is None else torch.device(device)
    try:
        encoder.to(where).eval()
        yield where
    finally:
        encoder.to(home)
        for module, training in modes.items():
            module.training = training


def _name(encoder: nn.Module) -> str:
    """Architecture as timm names it, or the name of the class."""
    config = getattr(encoder, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(encoder).__name__)


def _bar(images: ImageSet) -> dict[str, Any]:
    return {"desc": f"features of {images.name}", "unit": " images", "disable": None, "delay": 3}


def _describe(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
