"""Which images a folder holds, and with which labels: plain folders, Tiny ImageNet, ImageNet-100."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .errors import DataError

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

Split = Literal["train", "val"]


@dataclass(frozen=True)
class Listing:
    """Image files below a root, not opened yet."""

    root: Path
    paths: list[str]  # relative to root, with forward slashes
    labels: list[int] | None
    classes: tuple[str, ...]  # in label order; () without labels
    name: str


def list_folder(root: Path, split: Split, parts: Sequence[str] | None) -> Listing:
    """List the images of a folder in whichever known layout it has; without splits, `split` has no meaning.

    Raises:
        DataError: There are no images, a part or a class is unknown, or a folder cannot be read.
    """
    if (root / "Labels.json").is_file() and any(root.glob("*.X*")):
        return _imagenet100(root, split, parts)
    if parts is not None:
        raise DataError(f"parts {tuple(parts)}: source {root} has none, as only the ImageNet-100 layout has")
    name = root.resolve().name
    if (root / "wnids.txt").is_file():
        return _tiny_imagenet(root, split, f"{name}/{split}")
    held_out = next((folder for folder in ("val", "test") if (root / folder).is_dir()), None)
    if (root / "train").is_dir() and held_out is not None:
        return _train_and_held_out(root, "train" if split == "train" else held_out, f"{name}/{split}")
    paths = _images_in(root, "")
    return _by_class_folder(root, paths, 0, _class_folders(paths, 0), name)


def _train_and_held_out(root: Path, folder: str, name: str) -> Listing:
    """Both splits number their classes by the folders of train/: a class absent from val/ shifts nothing."""
    paths = _images_in(root, f"{folder}/")
    own = _class_folders(paths, 1)
    known = own if folder == "train" else _class_folders(_walk(root, "train/"), 1)
    labelled = all(path.count("/") > 1 for path in paths)
    return _by_class_folder(root, paths, 1, (known or own) if labelled else (), name)


def _tiny_imagenet(root: Path, split: Split, name: str) -> Listing:
    """Labels in the order of wnids.txt; those of the validation images from val_annotations.txt."""
    classes = (root / "wnids.txt").read_text().split()
    paths = _images_in(root, f"{split}/")
    annotations = root / "val" / "val_annotations.txt"
    if split == "train" or not annotations.is_file():
        return _by_class_folder(root, paths, 1, classes, name)
    rows = [line.split("\t") for line in annotations.read_text().splitlines()]
    folder_of = {row[0]: row[1] for row in rows if len(row) > 1}
    folders = [folder_of.get(path.split("/")[-1], path) for path in paths]
    return _labelled(root, paths, folders, classes, name)


def _imagenet100(root: Path, split: Split, parts: Sequence[str] | None) -> Listing:
    """Labels in the order of Labels.json, which maps class folders, spread over the parts, to names."""
    try:
        names = json.loads((root / "Labels.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"source {root}: Labels.json is not JSON: {error}") from error
    if not isinstance(names, dict):
        raise DataError(f"source {root}: expected Labels.json to map class folders to names, found {names!r:.40}")
    available = sorted(path.name for path in root.glob(f"{split}.X*") if path.is_dir())
    chosen = available if parts is None else sorted(set(parts))
    if not chosen or not set(chosen) <= set(available):
        raise DataError(
            f"parts {parts if parts is None else tuple(parts)}: source {root} has these for split {split!r}: "
            f"{', '.join(available) or 'none'}"
        )
    paths = [path for part in chosen for path in _images_in(root, f"{part}/")]
    name = f"{root.resolve().name}/{split if chosen == available else '+'.join(chosen)}"
    return replace(_by_class_folder(root, paths, 1, list(names), name), classes=_distinct(names))


def _distinct(names: dict[str, str]) -> tuple[str, ...]:
    """Class names; of those that stand for several folders (ImageNet has two cranes), each with its folder."""
    counts = Counter(names.values())
    return tuple(f"{name} ({folder})" if counts[name] > 1 else name for folder, name in names.items())


def _class_folders(paths: Sequence[str], depth: int) -> list[str]:
    """Sorted folder names at `depth`, where every image lies in one and there are at least two; else none."""
    parts = [path.split("/") for path in paths]
    if any(len(part) <= depth + 1 for part in parts):
        return []
    names = sorted({part[depth] for part in parts})
    return names if len(names) >= 2 else []


def _by_class_folder(root: Path, paths: list[str], depth: int, classes: Sequence[str], name: str) -> Listing:
    """Label each image by its folder at `depth`; no classes, no labels."""
    if not classes:
        return Listing(root, paths, None, (), name)
    return _labelled(root, paths, [path.split("/")[depth] for path in paths], classes, name)


def _labelled(root: Path, paths: list[str], folders: Sequence[str], classes: Sequence[str], name: str) -> Listing:
    label_of = {class_name: label for label, class_name in enumerate(classes)}
    stray = [path for path, folder in zip(paths, folders, strict=True) if folder not in label_of]
    if stray:
        raise DataError(
            f"source {root}: looked for one of {len(classes)} known classes for each image, found "
            f"{len(stray):,} without, first {stray[0]}"
        )
    return Listing(root, paths, [label_of[folder] for folder in folders], tuple(classes), name)


def _images_in(root: Path, prefix: str) -> list[str]:
    """Sorted paths, relative to `root`, of all image files below the folder `prefix` ("" or "folder/")."""
    folder = root / prefix
    if not folder.is_dir():
        found = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        raise DataError(f"source {root}: looked for the folder {prefix}, found {found}")
    paths = _walk(root, prefix)
    if not paths:
        others = Counter(Path(name).suffix or name for _, _, names in os.walk(folder) for name in names)
        found = ", ".join(f"{count:,} {suffix}" for suffix, count in others.most_common(5)) or "no files"
        wanted = " ".join(IMAGE_SUFFIXES)
        raise DataError(f"source {folder}: looked for images ({wanted}), found {found}")
    return paths


def _walk(root: Path, prefix: str) -> list[str]:
    """Image files below a folder, through links; each real directory once, so that a loop of links ends.

    Entries know from their directory what they are: to ask for each file by its path would take ten times as long.
    """
    paths: list[str] = []
    seen: set[tuple[int, int]] = set()
    waiting = [prefix]
    while waiting:
        relative = waiting.pop()
        identity, entries = _opened(root / relative)
        if identity in seen:
            continue
        seen.add(identity)
        subfolders = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                subfolders.append(f"{relative}{entry.name}/")
            elif entry.name.lower().endswith(IMAGE_SUFFIXES) and (entry.is_symlink() or entry.is_file()):
                paths.append(relative + entry.name)  # a broken link is a bad image; a pipe is none
        waiting += sorted(subfolders, reverse=True)
    return sorted(paths)


def _opened(folder: Path) -> tuple[tuple[int, int], list[os.DirEntry[str]]]:
    """Device and inode of a folder, and its entries."""
    try:
        stat = folder.stat()
        with os.scandir(folder) as entries:
            return (stat.st_dev, stat.st_ino), list(entries)
    except OSError as error:
        raise DataError(f"source {error.filename}: the folder cannot be read: {error.strerror}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
