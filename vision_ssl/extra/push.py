"""Publish a run, or a folder of weights, as a repository of the Hugging Face Hub."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..card import model_card
from ..config import CONFIG_FILE
from ..errors import DataError, MissingExtraError, WeightsError
from ..locate import ENCODER_FILE, HEAD_FILE, INDEX_FILE, file_hash, locate
from ..plots import curves
from ..registry import WEIGHTS
from ..remote import is_repo, one_line_errors
from ..report import Report
from ..storage import save_tensors

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD_FILE, PICTURE_FILE, REPORTS_FOLDER = "README.md", "curves.png", "reports"

_SHOWN = ("protocol", "accuracy", "interval", "macro_f1", "n_train", "n_val")


@dataclass(frozen=True)
class Push:
    """What became of a push.

    Attributes:
        repo: `owner/name`.
        sent: Names and sizes in bytes of the files that were new, or in a dry run of all.
        url: The commit that holds all files; None in a dry run.
        notes: What the user should know, a sentence each.
    """

    repo: str
    sent: dict[str, int]
    url: str | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Say it in a few lines."""
        files = [f"  {name}: {size:,} bytes" for name, size in self.sent.items()]
        if self.url is None:
            return "\n".join([f"{self.repo} would hold:", *files, *self.notes])
        return "\n".join([self.url, *(files or ["  nothing is new: no commit was made"]), *self.notes])


def push(run: Path, repo: str, *, private: bool = False, tag: str | None = None, dry_run: bool = False) -> Push:
    """Publish the weights of a run: encoder, head, config, and a model card made from them, in one commit.

    Files that the repository holds already are not sent again: a second push does nothing, and one that was
    interrupted goes on. Scores in the card are those in the weights, and of the reports in the run's `reports` folder.

    Args:
        run: The directory of a run, or a folder of weights.
        repo: `owner/name`; made if it is not there.
        private: Make it private.
        tag: A name for this commit, which never changes its meaning.
        dry_run: Send nothing, and ask nothing of the Hub.

    Raises:
        WeightsError: `run` holds no weights, or not those that their card lists; the Hub refuses or cannot be reached;
            the repository is public while `private` is asked for, or the tag is another commit's.
    """
    if not is_repo(repo):
        raise WeightsError(f"repo={repo!r} is no name of a repository: expected owner/name")
    weights = run / "weights" if (run / "weights" / CONFIG_FILE).is_file() else run
    with TemporaryDirectory() as folder:
        files, notes = _collect(weights, run, repo, Path(folder))
        if dry_run:
            return Push(repo, _sizes(files), None, notes)
        with one_line_errors(f"push to {repo}", repo):
            from huggingface_hub import HfApi

            return _send(HfApi(library_name="vision_ssl"), repo, files, notes, private=private, tag=tag)


def push_zoo(owner: str, *, private: bool = False, tag: str | None = None, dry_run: bool = False) -> list[Push]:
    """Publish every model of this package that is here, each under its own name; see `push`."""
    return [
        push(weights.directory, f"{owner}/{weights.name}", private=private, tag=tag, dry_run=dry_run)
        for weights in WEIGHTS
        if weights.is_local
    ]


def _collect(weights: Path, run: Path, repo: str, folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """All files of the repository; those that are made for it go into `folder`."""
    for names in ((CONFIG_FILE,), (ENCODER_FILE, INDEX_FILE)):  # no name of a model either, which `locate` would take
        if not any((weights / name).is_file() for name in names):
            raise WeightsError(
                f"run={str(run)!r} has no {names[0]}: expected the directory of a run, or a folder of weights"
            )
    located = locate(weights)
    hashes = located.card.get("sha256", {})
    files = {name: weights / name for name in (ENCODER_FILE, HEAD_FILE, CONFIG_FILE) if (weights / name).is_file()}
    if ENCODER_FILE not in files:  # it is in several files: timm takes one
        files[ENCODER_FILE] = folder / ENCODER_FILE
        save_tensors(files[ENCODER_FILE], located.encoder()[1])
    for name, path in files.items():
        if name != CONFIG_FILE and file_hash(path) != hashes.get(name):
            raise WeightsError(
                f"{path} is not the file that {CONFIG_FILE} lists: expected weights as a run exports them"
            )
    config = json.loads(files[CONFIG_FILE].read_text(encoding="utf-8"))
    scores = list(config["vision_ssl"].get("scores", []))
    for path in sorted((run / REPORTS_FOLDER).glob("*.json")):
        report = Report.load(path)
        scores.append({"data": path.stem, **{name: getattr(report, name) for name in _SHOWN}})
    notes = []
    try:
        files[PICTURE_FILE] = curves(run, folder / PICTURE_FILE)
    except (DataError, MissingExtraError) as error:
        notes.append(f"the card has no picture of the curves: {error}")
    picture = PICTURE_FILE if PICTURE_FILE in files else None
    files[CARD_FILE] = folder / CARD_FILE
    files[CARD_FILE].write_text(model_card(repo, config, scores=scores, picture=picture), encoding="utf-8")
    return files, tuple(notes)


def _send(
    api: "HfApi", repo: str, files: Mapping[str, Path], notes: tuple[str, ...], *, private: bool, tag: str | None
) -> Push:
    from huggingface_hub import CommitOperationAdd

    api.create_repo(repo, private=private, exist_ok=True)
    info = api.model_info(repo)
    if private and not info.private:
        raise WeightsError(f"{repo} is public: expected a private repository, or a push that may be seen")
    there = {entry.path: entry for entry in api.list_repo_tree(repo)}
    new = {name: path for name, path in files.items() if not _is_same(path, there.get(name))}
    tags = {each.name: each.target_commit for each in api.list_repo_refs(repo).tags} if tag else {}
    if tag in tags and (new or tags[tag] != info.sha):
        raise WeightsError(f"tag={tag!r} of {repo} is another commit's, {tags[tag]}: expected a new tag")
    commit = info.sha
    if new:
        additions = [CommitOperationAdd(name, path) for name, path in new.items()]
        commit = api.create_commit(repo, additions, commit_message="Weights and card by vision_ssl").oid
    if tag and tag not in tags:
        api.create_tag(repo, tag=tag, revision=commit)
    return Push(repo, _sizes(new), f"{api.endpoint}/{repo}/commit/{commit}", notes)


def _is_same(path: Path, entry: Any) -> bool:
    """Whether the Hub lists this content: by SHA-256 if it keeps the file apart, else by git's hash of it."""
    if entry is None:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == file_hash(path))
    content = path.read_bytes()
    return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def _sizes(files: Mapping[str, Path]) -> dict[str, int]:
    return {name: path.stat().st_size for name, path in files.items()}
