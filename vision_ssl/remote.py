"""Repositories on the Hugging Face Hub: their files in the local cache, and their errors in one line.

`huggingface_hub` does the work, so that its cache, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` hold here too. It
resumes a download that was cut, waits and tries again when the Hub asks for it, and gives a file its name once it is
whole. It is imported when something is asked of the Hub.
"""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import VisionSSLError, WeightsError

PREFIX = "hf:"

_NAME = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_REPO = re.compile(rf"{_NAME}/{_NAME}", re.ASCII)
_REVISION = re.compile(r"\w(?:[\w./-]*\w)?", re.ASCII)


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub at one revision.

    Attributes:
        repo: `owner/name`.
        revision: A branch, tag or commit; by default what the repository's main branch is now.
        cache_dir: Where files are kept; by default the cache of `huggingface_hub`.
        local_files_only: Never ask the Hub.
    """

    repo: str
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False

    def file(self, name: str) -> Path:
        """The path of a file in the cache, downloaded if it is not there.

        Raises:
            WeightsError: There is none, or it cannot be reached.
        """
        from huggingface_hub import constants, hf_hub_download

        root = Path(self.cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()
        with one_line_errors(f"load {name} of {self.repo}", self.repo):
            path = hf_hub_download(
                self.repo,
                name,
                revision=self.revision,
                cache_dir=root,
                local_files_only=self.local_files_only,
                library_name="vision_ssl",
            )
        if not Path(path).resolve().is_relative_to(root):
            raise WeightsError(f"{path} is a link out of the cache: it is refused; delete it to download the file anew")
        return Path(path)

    def pinned(self, file: Path) -> "Repository":
        """This repository at the commit that a downloaded file belongs to, whatever is pushed in the meantime."""
        return Repository(self.repo, file.parent.name, self.cache_dir, self.local_files_only)


def parse_reference(reference: str) -> tuple[str, str | None]:
    """The repository and the revision that `hf:owner/repo@revision` names.

    Raises:
        WeightsError: It is no such reference.
    """
    repo, at, revision = reference.removeprefix(PREFIX).partition("@")
    if not is_repo(repo) or (at and (".." in revision or not _REVISION.fullmatch(revision))):
        raise WeightsError(f"{reference!r} names no repository: expected hf:owner/repo or hf:owner/repo@revision")
    return repo, revision or None


def is_repo(name: str) -> bool:
    """Whether this may be the name of a repository, `owner/name`: no path that leads elsewhere."""
    return ".." not in name and _REPO.fullmatch(name) is not None


def announced_hash(path: Path) -> str | None:
    """The SHA-256 under which the Hub listed a file of the cache, which is the name that the cache gives its content.

    None for small files, which the Hub lists otherwise, and where the cache cannot make links.
    """
    name = path.resolve().name
    return name if re.fullmatch("[0-9a-f]{64}", name) else None


def set_aside(path: Path) -> Path:
    """Take a file out of the cache's sight, so that it is downloaded anew next time; return where it is now."""
    content = path.resolve()
    refused = content.with_name(f"{content.name}.refused")
    content.replace(refused)
    path.unlink(missing_ok=True)  # the link to it, which now leads nowhere
    return refused


@contextmanager
def one_line_errors(purpose: str, repo: str) -> Iterator[None]:
    """Turn whatever `huggingface_hub` raises into one line that says what to do.

    Raises:
        WeightsError: Anything went wrong inside.
    """
    try:
        yield
    except VisionSSLError:
        raise
    except Exception as error:  # its HTTP library, and that library's errors, differ from version to version
        raise WeightsError(f"cannot {purpose}: {_explain(error, repo)}") from error


def _explain(error: BaseException, repo: str) -> str:
    from huggingface_hub import constants, errors, get_token

    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    answers = [answer for cause in causes if (answer := getattr(cause, "response", None)) is not None]
    status = answers[0].status_code if answers else None
    token = "the token of HF_TOKEN or `hf auth login`"
    access = f"{token} does not open it" if get_token() else "set HF_TOKEN, or log in by `hf auth login`"
    if any(isinstance(cause, errors.GatedRepoError) for cause in causes):
        return f"its owner grants access on request, at {constants.ENDPOINT}/{repo}: {access}"
    if any(isinstance(cause, errors.RevisionNotFoundError) for cause in causes):
        return "the repository has no such revision"
    if any(isinstance(cause, errors.RepositoryNotFoundError) for cause in causes):
        return f"there is no such repository, or it is private: {access}"
    if status in (401, 403):
        return f"the Hub forbids it: {access}"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return "the repository has no such file"
    if status is not None:
        return f"{constants.ENDPOINT} answered {status}: try again later"
    wanted = isinstance(error, errors.LocalEntryNotFoundError)  # for a download
    missing = "it is not in the cache, and " if wanted else ""
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes) or (wanted and len(causes) == 1):
        return f"{missing}HF_HUB_OFFLINE{' or local_files_only' if wanted else ''} forbids to ask the Hub"
    if wanted or any(isinstance(cause, ConnectionError | TimeoutError | socket.gaierror) for cause in causes):
        return f"{missing}{constants.ENDPOINT} cannot be reached: check the network, or HF_ENDPOINT"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
