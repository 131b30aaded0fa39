"""Files -> a repository on the Hub: in one commit or pull request, and looked at afterwards."""

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fishertool.errors import FishertoolError, HubError, UsageError, some

MAIN = "main"
PULL_REQUESTS = "refs/pr/"
MADE_BY_THE_HUB = ".gitattributes"
PATHS_A_REQUEST = 500
LOG_IN = "run `hf auth login`, or set HF_TOKEN to a token that may write"
NOT_CONNECTED = {"ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError"}
"""Errors of an HTTP client from before a request is sent."""
LOST = {"TransportError", "ConnectionError", "Timeout"}
GATEWAYS = (502, 504)
ADVICE = {
    401: f"the token is not accepted; {LOG_IN}",
    403: "the token may not do that; give it the right to write there",
    412: "the repository changed meanwhile; push again",
}


@dataclass(frozen=True)
class Upload:
    """One file. Of `content` in memory, or where it lies."""

    name: str
    """In the repository."""
    content: Path | bytes
    bytes: int
    sha256: str
    yields: bool = False
    """Whether a file of that name that is there already stays."""


@dataclass(frozen=True)
class Pushed:
    """`repository`, `commit` and `pull_request` are addresses."""

    repository: str
    commit: str
    pull_request: str | None
    revision: str
    """Where the files are: a commit's SHA, or a pull request's ref."""
    created: bool
    sent: tuple[Upload, ...]
    removed: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Target:
    """A branch as it is before the push."""

    files: frozenset[str]
    sha: str | None
    created: bool


def check_repository(repo: str) -> None:
    """Raises UsageError for what is no `org/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo}: not a Hub id: {' '.join(str(error).split())}") from error
    if repo.count("/") != 1:
        raise UsageError(f"{repo}: not a Hub id such as org/name; say whose it is to be")


def publish(
    repo: str,
    uploads: Sequence[Upload],
    *,
    is_replaced: Callable[[str], bool],
    private: bool,
    revision: str | None,
    pull_request: bool | None,
    message: str,
    bars: bool,
) -> Pushed:
    """Send all files in one commit, which the Hub takes whole or not at all.

    What `is_replaced` names of the files that are there goes in the same commit. By default
    (`pull_request` is None) it is a pull request where the main branch has files. A repository or
    branch that is missing is made. The token is the one that huggingface_hub finds.

    Raises HubError for whatever the Hub or the network refuse, and if the files that are there
    afterwards are not those that were sent; UsageError if a repository that is to be private is not.
    """
    from huggingface_hub import (
        CommitOperationAdd,
        CommitOperationDelete,
        HfApi,
        constants,
        get_token,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # the rest is told here
    if not bars:
        disable_progress_bars()
    token, address = None, None
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            token = get_token()
            if token is None:
                raise HubError(f"{repo}: not logged in to the Hub; {LOG_IN}")
            api = HfApi(token=token)
            target = _target(api, repo, private, revision)
            sent = [one for one in uploads if not (one.yields and one.name in target.files)]
            removed = sorted(filter(is_replaced, target.files))
            if pull_request is None:
                has_files = bool(target.files - {MADE_BY_THE_HUB})
                pull_request = has_files and revision in (None, MAIN)
            with _said_of_a_new_one(repo, target.created):
                commit = api.create_commit(
                    repo,
                    [
                        *(CommitOperationDelete(name, is_folder=False) for name in removed),
                        *(CommitOperationAdd(one.name, one.content) for one in sent),
                    ],
                    commit_message=message,
                    revision=revision,
                    create_pr=pull_request,
                    parent_commit=target.sha,
                )
            place, address = commit.pr_revision or commit.oid, commit.pr_url or commit.commit_url
            _check_what_is_there(api, repo, place, sent, address)
    except FishertoolError:
        raise
    except Exception as error:  # of the Hub, a proxy, the HTTP client, JSON, the disk
        how = f"sent, but what is at {address} is not checked" if address else "not published"
        if _is_lost_commit(error):
            where = "discussions" if pull_request else f"commits/{revision or MAIN}"
            how = (
                "whether it is published is not known, as the connection was lost after the commit was "
                f"sent; look at {constants.ENDPOINT}/{repo}/{where}, and push again if it is not there"
            )
        raise HubError(f"{repo}: {how}: {_reason(error, token)}") from error
    said = [" ".join(str(one.message).split()) for one in told]
    if commit.oid == target.sha:
        said.append(f"{repo}: has all of it already; nothing was sent")
    return Pushed(
        repository=commit.repo_url.url,
        commit=commit.commit_url,
        pull_request=commit.pr_url,
        revision=place,
        created=target.created,
        sent=tuple(sent),
        removed=tuple(removed),
        warnings=tuple(said),
    )


def _target(api: Any, repo: str, private: bool, revision: str | None) -> _Target:
    """The branch that is pushed to, made where it is missing."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    created = False
    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError as error:
        if isinstance(error, GatedRepoError) or error.response.status_code == 401:
            raise
        api.create_repo(repo, private=private or None)
        created = True
        info = api.model_info(repo)
    if private and not info.private:
        raise UsageError(
            f"{repo}: is public, so --private cannot be had; make it private in its settings, or "
            "choose another name"
        )
    if revision not in (None, MAIN):
        try:
            info = api.model_info(repo, revision=revision)
        except RevisionNotFoundError:
            if revision.startswith(PULL_REQUESTS):
                raise
            api.create_branch(repo, branch=revision)  # of the main branch, with its files
    return _Target(frozenset(one.rfilename for one in info.siblings or ()), info.sha, created)


def _check_what_is_there(
    api: Any, repo: str, revision: str, sent: Sequence[Upload], address: str
) -> None:
    """Hold what the Hub says that it has against what was sent."""
    there: dict[str, Any] = {}
    for start in range(0, len(sent), PATHS_A_REQUEST):
        names = [one.name for one in sent[start : start + PATHS_A_REQUEST]]
        there |= {one.path: one for one in api.get_paths_info(repo, names, revision=revision)}
    if wrong := [one.name for one in sent if not _is_there(one, there.get(one.name))]:
        raise HubError(
            f"{repo}: the Hub has other bytes than were sent of {some(wrong)}, or none; take back "
            f"{address} and push again"
        )


def _is_there(upload: Upload, found: Any) -> bool:
    if found is None or getattr(found, "size", None) != upload.bytes:
        return False
    if found.lfs is not None:
        return bool(found.lfs.sha256 == upload.sha256)
    # Small files are in git, which has a digest of its own of their bytes.
    content = upload.content if isinstance(upload.content, bytes) else upload.content.read_bytes()
    as_git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    same = hashlib.sha256(content).hexdigest() == upload.sha256
    return same and bool(found.blob_id == as_git.hexdigest())


@contextmanager
def _said_of_a_new_one(repo: str, created: bool) -> Iterator[None]:
    """A repository that was just made stays, and may be empty."""
    try:
        yield
    except Exception as error:
        if created:
            have = "may have" if _is_lost_commit(error) else "has"
            error.add_note(f"{repo} was made, and {have} none of the files")
        raise


def _is_lost_commit(error: BaseException) -> bool:
    """Whether the Hub may have a commit that it could not answer: the connection was lost after it
    was made, or lost by a gateway."""
    response = getattr(error, "response", None)
    try:
        request = getattr(error if response is None else response, "request", None)
    except RuntimeError:  # of an error before there was one
        return False
    if "/commit/" not in str(getattr(request, "url", "")):
        return False
    # Of the HTTP client, which is another one in other versions of huggingface_hub.
    names = {one.__name__ for one in type(error).__mro__}
    if response is not None:
        return getattr(response, "status_code", None) in GATEWAYS
    return bool(names & LOST) and not names & NOT_CONNECTED


def _reason(error: BaseException, token: str | None) -> str:
    """One line on what went wrong, from the error and what it came of, never with the token."""
    from huggingface_hub import constants

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    statuses = [getattr(getattr(one, "response", None), "status_code", None) for one in chain]
    advice = next((ADVICE[status] for status in statuses if status in ADVICE), None)
    # Of the HTTP client, which is another one in other versions of huggingface_hub.
    transport = "TransportError" in {one.__name__ for one in type(error).__mro__}
    if transport and not _is_lost_commit(error):
        advice = f"{constants.ENDPOINT} is not reached; look at the network, and at HF_ENDPOINT"
    notes = [note for one in chain for note in getattr(one, "__notes__", ())]
    first = str(error) or type(error).__name__
    # An error of the upload says which file, and only its cause says why.
    why = [str(chain[1])] if isinstance(error, RuntimeError) and len(chain) > 1 else []
    told = "; ".join(" ".join(text.split()) for text in (first, *why, advice, *notes) if text)
    return told.replace(token, "***") if token else told
