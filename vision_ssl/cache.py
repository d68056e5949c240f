"""The decode-once cache: uint8 images in memory-mapped files, each named by the content it holds.

An entry is a directory with `pixels.u8`, the images one after another, and `meta.json`. It is built in a
temporary directory beside it and renamed into place: it is whole or absent, whoever dies or builds it twice.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .decode import DECODER_VERSION, Pixels, decode_file
from .errors import CheckpointError, DataError
from .storage import save_text

Result = TypeVar("Result")

MAX_BAD_FRACTION = 0.05

_UNREADABLE = "unreadable"  # stands for the hash of a file that cannot be opened
_IN_FLIGHT = 256  # files handed to the threads at a time: bounds what is decoded and not yet written
_AT_A_TIME = 4  # files a thread takes: with small files, handing over each one would take longer than its work
_STALE_SECONDS = 24 * 3600  # a temporary directory not written to for a day belongs to a builder that died
_BAR: dict[str, Any] = {"disable": None, "delay": 3, "unit": " images"}  # only on a terminal, after 3 s


class Bad(NamedTuple):
    """An image that could not be decoded."""

    name: str
    why: str

    def __str__(self) -> str:
        """Return both, for a message."""
        return f"{self.name} ({self.why})"


@dataclass(frozen=True)
class Cached:
    """One entry.

    Attributes:
        pixels: uint8 (n, C, S, S), a private memory map: a write to it never reaches the disk.
        digest: sha256 hex of what the images were made from; the entry's name.
        skipped: Images left out, by their index in the source.
    """

    pixels: Tensor
    digest: str
    skipped: dict[int, Bad]


def files(root: Path, paths: Sequence[str], size: int, directory: Path) -> Cached:
    """Decode `root / path` for each path, or find the result of an earlier time.

    The entry is named by the relative paths, the bytes of the files, and `size`. The digest of the bytes is
    remembered beside paths, file sizes and modification times: unchanged files are not read again.

    Raises:
        DataError: More than 5 % of the files are bad, or the cache cannot be written.
    """
    digest = resized_digest(_content_digest(root, paths, directory), size)

    def read(path: str) -> Pixels | Bad:
        try:
            return decode_file(root / path, size)
        except DataError as error:
            return Bad(path, str(error))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files: what matters is whether they decode
        images = _in_threads(read, paths)
        return find(directory, digest) or fill(directory, str(root), images, len(paths), digest)


def resized_digest(content: str, size: int) -> str:
    """Name of the entry for images of digest `content`, decoded at `size`."""
    return _sha256(content, str(size), f"decoder {DECODER_VERSION}")


def find(directory: Path, digest: str) -> Cached | None:
    """Map an entry, or None where it is absent or damaged."""
    entry = directory / digest
    try:
        meta = json.loads((entry / "meta.json").read_text())
        shape = (meta["count"], *meta["shape"])
        if (entry / "pixels.u8").stat().st_size != math.prod(shape):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    pixels = torch.from_file(str(entry / "pixels.u8"), shared=False, size=math.prod(shape), dtype=torch.uint8)
    return Cached(pixels.view(shape), digest, {index: Bad(name, why) for index, name, why in meta["skipped"]})


def fill(
    directory: Path, source: str, images: Iterable[Pixels | Bad], count: int | None, digest: str | None = None
) -> Cached:
    """Write images of one shape to an entry, one after another.

    Args:
        directory: The cache.
        source: What error messages call the source.
        images: uint8 (C, S, S) each, or what could not be decoded.
        count: How many there are, where that is known.
        digest: Name of the entry; by default the sha256 of what is written.

    Raises:
        DataError: There are no images, more than 5 % are bad, or the cache cannot be written.
    """
    skipped: dict[int, Bad] = {}
    content = hashlib.sha256()
    with _Builder(directory, count or 0) as builder:
        for index, image in enumerate(tqdm(images, source, count, **_BAR)):
            if isinstance(image, Bad):
                skipped[index] = image
                continue
            builder.add(image)
            if digest is None:
                content.update(repr(image.shape).encode() + image.tobytes())
        total = builder.count + len(skipped)
        if total == 0:
            raise DataError(f"source {source}: looked for images, found none")
        if len(skipped) > MAX_BAD_FRACTION * total:
            raise DataError(
                f"source {source}: {len(skipped):,} of {total:,} images cannot be decoded, more than "
                f"{MAX_BAD_FRACTION:.0%}: {first_few(list(map(str, skipped.values())))}"
            )
        return builder.publish(digest or _sha256(content.hexdigest(), repr(list(skipped))), skipped)


def first_few(texts: Sequence[str], limit: int = 5) -> str:
    """Join a few texts in one line, and count the others."""
    rest = len(texts) - limit
    return ", ".join(texts[:limit]) + (f" and {rest:,} more" if rest > 0 else "")


def _in_threads(function: Callable[[str], Result], items: Sequence[str]) -> Iterator[Result]:
    """Map in order with a thread for each core: Pillow and hashlib release the interpreter's lock."""

    def several(start: int) -> list[Result]:
        return [function(item) for item in items[start : start + _AT_A_TIME]]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(items), _IN_FLIGHT):
            for results in pool.map(several, range(start, min(start + _IN_FLIGHT, len(items)), _AT_A_TIME)):
                yield from results


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _content_digest(root: Path, paths: Sequence[str], directory: Path) -> str:
    fingerprint = _sha256(str(root.resolve()), *paths, *(_stat(f"{root}/{path}") for path in paths))
    remembered = directory / "fingerprints" / fingerprint
    with contextlib.suppress(OSError):
        digest = remembered.read_text()
        if len(digest) == 64:  # shorter: the machine stopped before the text reached the disk
            return digest
    hashing = _in_threads(lambda path: _hash_file(root / path), paths)
    hashes = list(tqdm(hashing, f"{root}: hashing", len(paths), **_BAR))
    digest = _sha256(*paths, *hashes)
    if _UNREADABLE not in hashes:  # a permission may change without a trace in size and time
        with contextlib.suppress(CheckpointError):  # only speed is lost
            save_text(remembered, digest)
    return digest


def _stat(path: str) -> str:
    try:
        stat = os.stat(path)  # noqa: PTH116  # a Path for each file would triple the time
    except OSError:
        return _UNREADABLE
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _hash_file(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return _UNREADABLE


class _Builder:
    """Appends images to a file in a temporary directory, then renames the directory to its digest.

    Two builders of the same content do not meet before the rename: the second finds the first one's entry and
    discards its own.
    """

    def __init__(self, directory: Path, expected: int) -> None:
        self.directory, self.expected = directory, expected
        self.count, self.shape = 0, (0,)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            self.building = directory / f".building-{uuid.uuid4().hex}"
            self.building.mkdir()
        except OSError as error:
            raise DataError(f"cache_dir {directory}: cannot be written: {error.strerror}") from error
        self.file = (self.building / "pixels.u8").open("wb", buffering=1 << 20)

    def __enter__(self) -> "_Builder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # on a full disk, closing fails as well
            self.file.close()
        shutil.rmtree(self.building, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise self._disk_full() from error

    def add(self, image: Pixels) -> None:
        if self.count == 0:
            self.shape = image.shape
            if shutil.disk_usage(self.directory).free < self._needed():
                raise self._disk_full()
        self.file.write(np.ascontiguousarray(image).data)
        self.count += 1

    def publish(self, digest: str, skipped: dict[int, Bad]) -> Cached:
        self.file.flush()
        os.fsync(self.file.fileno())  # the rename must not reach the disk before the pixels
        self.file.close()
        meta = {
            "count": self.count,
            "shape": self.shape,
            "skipped": [(index, *bad) for index, bad in skipped.items()],
        }
        (self.building / "meta.json").write_text(json.dumps(meta))
        try:
            self.building.rename(self.directory / digest)
        except OSError:  # an entry is there: another builder's, or a damaged one
            if find(self.directory, digest) is None:
                (self.directory / digest).rename(self.building / "damaged")
                shutil.rmtree(self.building / "damaged")
                self.building.rename(self.directory / digest)
        cached = find(self.directory, digest)
        if cached is None:
            raise DataError(f"cache_dir {self.directory}: {digest} was written but cannot be read back")
        return cached

    def _needed(self) -> int:
        return max(self.expected, self.count) * math.prod(self.shape)

    def _disk_full(self) -> DataError:
        return DataError(
            f"cache_dir {self.directory}: the decoded images need {self._needed():,} bytes, "
            f"{shutil.disk_usage(self.directory).free:,} are free; free more, or name another cache_dir"
        )

    def _remove_stale(self) -> None:
        for building in self.directory.glob(".building-*"):
            with contextlib.suppress(OSError):  # another builder may remove it at the same time
                if time.time() - (building / "pixels.u8").stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(building, ignore_errors=True)
