"""Weights where they lie: found by name, path or reference, and read once their hashes are right."""

import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor

from .config import CONFIG_FILE, read_config
from .encoders import EncoderSpec
from .errors import CheckpointError, WeightsError
from .registry import UPSTREAM, find, list_models
from .remote import PREFIX, Repository, announced_hash, parse_reference, set_aside
from .storage import load_tensors

_LOG = logging.getLogger("vision_ssl")

ENCODER_FILE, HEAD_FILE = "model.safetensors", "head.safetensors"
INDEX_FILE = "model.safetensors.index.json"  # of an encoder in several files, in Hugging Face's form
_SHARD = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")


@dataclass(frozen=True)
class _Place:
    """A folder, or a repository that stands for one, and the hashes that its files must have."""

    directory: Path = Path()
    repository: Repository | None = None
    encoder_file: str = ENCODER_FILE
    sha256: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def path(self, file: str) -> Path:
        return self.directory / file if self.repository is None else self.repository.file(file)


@dataclass(frozen=True)
class Located:
    """Weights that were found, with their description; their tensors are fetched and read when asked for.

    Attributes:
        spec: The encoder.
        card: Facts that travel with the weights.
        place: Where they are.
    """

    spec: EncoderSpec
    card: dict[str, Any]
    place: _Place

    def has_head(self) -> bool:
        """Whether there is a projector or decoder; in a repository, whether its card lists one."""
        if self.place.repository is None:
            return (self.place.directory / HEAD_FILE).is_file()
        return HEAD_FILE in self.card.get("sha256", {})

    def encoder(self) -> tuple[Path, dict[str, Tensor]]:
        """Fetch and read the encoder's file, whose hash is the right one if it is known.

        Of the weights of others, it is said in a line what their licence is.

        Raises:
            WeightsError: It is missing, damaged, or another than the registry, the card or the Hub vouches for.
        """
        if facts := self.place.facts:
            _LOG.warning("%s: %s; its hash is %s", facts["name"], facts["licence"], facts["hash"])
        index = self.place.directory / INDEX_FILE
        if self.place.repository is None and not self.place.path(self.place.encoder_file).exists() and index.is_file():
            return index, self._shards(index)
        return self._read(self.place.encoder_file)

    def head(self) -> tuple[Path, dict[str, Tensor]]:
        """Likewise the projector's or decoder's."""
        return self._read(HEAD_FILE)

    def _shards(self, index: Path) -> dict[str, Tensor]:
        """The tensors of all files that an index names, each in the file that the index says."""
        self._verify(index, INDEX_FILE)
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(places.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WeightsError(f"{index} is damaged: expected a weight_map of names and files") from error
        if strange := [file for file in files if not _SHARD.fullmatch(str(file))]:
            raise WeightsError(f"{index} names the file {strange[0]!r:.100}: expected {_SHARD.pattern}")
        tensors: dict[str, Tensor] = {}
        for file in files:
            path, part = self._read(file)
            if part.keys() != {name for name, place in places.items() if place == file}:
                raise WeightsError(f"{path} does not hold the tensors that {index.name} says")
            tensors |= part
        return tensors

    def _read(self, file: str) -> tuple[Path, dict[str, Tensor]]:
        path = self.place.path(file)
        if path.is_file():
            self._verify(path, file)
        try:
            return path, load_tensors(path)[0]
        except CheckpointError as error:
            raise WeightsError(str(error)) from error

    def _verify(self, path: Path, file: str) -> None:
        downloaded = self.place.repository is not None
        vouchers = {"the registry": self.place.sha256.get(file)}
        if downloaded:
            vouchers |= {"its card": self.card.get("sha256", {}).get(file), "the Hub": announced_hash(path)}
        voucher = next((who for who, digest in vouchers.items() if digest is not None), None)
        if voucher is None or (actual := file_hash(path)) == vouchers[voucher]:
            return
        kept = f", and kept as {set_aside(path)}" if downloaded else ""
        raise WeightsError(f"{path} has SHA-256 {actual}, but {voucher} says {vouchers[voucher]}: it is refused{kept}")


def locate(
    name: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Located:
    """Find weights and read their description.

    Args:
        name: As for `load`.
        cache_dir: Where downloads are kept; by default the cache of `huggingface_hub`.
        local_files_only: Download nothing.

    Raises:
        WeightsError: There are none, they cannot be reached, or their description is not one.
    """
    place = _find(name, cache_dir, local_files_only)
    path = place.path(CONFIG_FILE)
    spec, card = read_config(path)
    if place.repository is not None:
        place = replace(place, repository=place.repository.pinned(path))
    return Located(spec, place.facts or card, place)


def _find(name: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None, local_files_only: bool) -> _Place:
    known = find(str(name))
    if known is not None and known.is_local:
        return _Place(known.directory, sha256=known.sha256)
    if known is not None and known.repo:
        repository = Repository(known.repo, known.revision, cache_dir, local_files_only)
        return _Place(repository=repository, sha256=known.sha256, facts=known.facts)
    if known is not None:
        others = [weights.name for weights in UPSTREAM if weights.name.startswith(known.name.partition(".")[0] + ".")]
        hint = f", or {others[0]}, which is downloaded" if others else ""
        raise WeightsError(f"{known.name} is too big for the package, and in clones alone: load its folder there{hint}")
    if str(name).startswith(PREFIX):
        return _Place(repository=Repository(*parse_reference(str(name)), cache_dir, local_files_only))
    path = Path(name)
    if path.suffix == ".safetensors" and (path.parent / CONFIG_FILE).is_file():
        return _Place(path.parent, encoder_file=path.name)
    directory = path / "weights" if (path / "weights" / CONFIG_FILE).is_file() else path
    if (directory / CONFIG_FILE).is_file():
        return _Place(directory)
    if path.is_dir():
        raise WeightsError(f"{path} is not a folder of weights: expected {CONFIG_FILE} and {ENCODER_FILE} in it")
    if path.exists():  # it may be a pickle, and hold code
        raise WeightsError(
            f"{path} is not opened: expected a .safetensors file beside its {CONFIG_FILE}, such as `vision-ssl import` "
            "makes of the checkpoints of other programs"
        )
    close = get_close_matches(str(name), [*list_models(), *(n.partition(".")[0] for n in list_models())], n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the models are {', '.join(list_models())}"
    raise WeightsError(f"{str(name)!r} is neither a known model nor a path: {hint}")


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
