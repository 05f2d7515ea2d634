"""Asking the model hub: patience while it fails, no trust in what it sends, and one line for each of its errors."""

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import UserError

T = TypeVar("T")
WAIT_SECONDS = (1.0, 4.0)  # before the second and the third try
ANSWER_SECONDS = 30  # how long a silent hub is waited for, unless HF_HUB_DOWNLOAD_TIMEOUT says it


class DamagedError(Exception):
    """A file of the local cache is not the one that the hub announced."""


def from_hub(what: str, offline_choice: str, fetch: Callable[[], T]) -> T:
    """The result of `fetch`, which is tried again after a failure that may pass.

    what: key, kind, repository and revision. offline_choice: the selection that needs no hub. Raises UserError that
    begins with `what` for an error of the hub or its client; any other error passes.
    """
    _limit_waiting()
    waits = iter(WAIT_SECONDS)
    while True:
        try:
            return fetch()
        except Exception as error:
            meaning = _meaning(error, offline_choice)
            if meaning is None:
                raise
            wait = next(waits, None) if _may_pass(error) else None
            if wait is None:
                raise UserError(f"{what}: {meaning}") from error
        cause = re.split(r": | \(", meaning)[0]
        print(f"note: {what}: {cause}; trying again in {wait:g} s", file=sys.stderr)
        time.sleep(wait)


def drop_damaged(snapshot: Path) -> None:
    """Compares the files of a snapshot in the local cache with their digests, which the client does not do: to it, a file
    of the right size is right. Deletes what differs, so that it is fetched anew, and raises DamagedError.

    The cache names a file's content by the digest that the hub announced; where it cannot (no symbolic links), nothing
    is compared.
    """
    damaged = []
    for path in sorted(path for path in snapshot.rglob("*") if path.is_symlink()):
        content = path.resolve()
        if content.is_file() and content.name != _digest(content):
            damaged.append(path.relative_to(snapshot).as_posix())
            content.unlink()
            path.unlink()
    if damaged:
        raise DamagedError(damaged[0])


def _digest(content: Path) -> str:
    """In the algorithm that the length of the file's name stands for: git's own, or sha256 for large files."""
    with content.open("rb") as file:
        if len(content.name) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        blob = hashlib.sha1(b"blob %d\0" % content.stat().st_size, usedforsecurity=False)
        while chunk := file.read(1 << 20):
            blob.update(chunk)
        return blob.hexdigest()


def _limit_waiting() -> None:
    """Makes the hub's client give up on a silent hub: some of its requests would wait for ever."""
    import httpx2
    from huggingface_hub import get_session, set_client_factory

    usual = get_session()
    hooks = [hook for hook in usual.event_hooks["request"] if hook is not _bound_timeouts]

    def client() -> httpx2.Client:
        return httpx2.Client(
            event_hooks={"request": [*hooks, _bound_timeouts]},
            follow_redirects=usual.follow_redirects,
            timeout=usual.timeout,
        )

    set_client_factory(client)


def _bound_timeouts(request: Any) -> None:
    from huggingface_hub import constants

    limit = constants.HF_HUB_DOWNLOAD_TIMEOUT if "HF_HUB_DOWNLOAD_TIMEOUT" in os.environ else ANSWER_SECONDS
    asked = request.extensions.get("timeout", {})
    phases = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {phase: min(asked.get(phase) or limit, limit) for phase in phases}


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment. Where nobody listens, it would not."""
    import httpx2
    from huggingface_hub import errors

    chain = _chain(error)
    if answer := _any(chain, errors.HfHubHTTPError):
        return answer.response.status_code in (408, 429) or answer.response.status_code >= 500
    lost = _any(chain, httpx2.TransportError)
    return bool(_any(chain, DamagedError) or _cut_short(chain) or (lost and not isinstance(lost, httpx2.ConnectError)))


def _meaning(error: BaseException, offline_choice: str) -> str | None:
    import httpx2
    from huggingface_hub import constants, errors

    # `datasets` wraps the hub's own exceptions, so the cause is looked for down the chain; the most special goes first.
    chain = _chain(error)
    way_out = f"or choose `{offline_choice}`, which needs no network"
    if damaged := _any(chain, DamagedError):
        return f"{damaged} is not the file that the hub at {_endpoint()} announced: try again later, {way_out}"
    if _any(chain, errors.GatedRepoError):
        return "access is gated: accept its terms on the hub's page and log in with `hf auth login`"
    if _any(chain, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    answer = _any(chain, errors.HfHubHTTPError)
    # The hub answers a program in JSON, and its client takes any 401 for a repository that is not there.
    page = answer and "html" in answer.response.headers.get("content-type", "")
    if answer and (answer.response.status_code == 407 or (page and answer.response.status_code in (401, 403))):
        return (
            f"a proxy or a log-in page answered {answer.response.status_code} for the hub at {_endpoint()}: "
            f"see HTTPS_PROXY and NO_PROXY, {way_out}"
        )
    if _any(chain, errors.RepositoryNotFoundError):
        return "the hub has no such repository (a private one needs `hf auth login`)"
    if constants.is_offline_mode() and (_any(chain, OSError) or _any(chain, errors.EntryNotFoundError)):
        return f"not in the local cache, and HF_HUB_OFFLINE forbids to fetch it: unset it, {way_out}"
    if answer:
        status = answer.response.status_code
        advice = "check your token (`hf auth login`)" if status in (401, 403) else "try again later"
        return f"the hub at {_endpoint()} answered {status}: {advice}, {way_out}"
    if broken := _any(chain, httpx2.TransportError) or _any(chain, ConnectionError, errors.LocalEntryNotFoundError):
        cause = f"{type(broken).__name__}: {broken}".split("\n")[0]
        return f"the hub at {_endpoint()} cannot be reached ({cause}): check the network or HF_ENDPOINT, {way_out}"
    if isinstance(error, json.JSONDecodeError):
        return (
            f"the hub at {_endpoint()} answered no JSON, as a page to log in to a network does: check both, {way_out}"
        )
    if cut := _cut_short(chain):
        return f"the hub at {_endpoint()} sent a part of a file only ({cut}): try again later, {way_out}"
    return None


def _cut_short(chain: list[BaseException]) -> str:
    """What the client says of a download of another size than announced, an OSError without a class of its own."""
    said = (str(error).split("\n")[0] for error in chain if isinstance(error, OSError))
    return next((line for line in said if line.startswith("Consistency check failed")), "")


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    return chain


def _any(chain: list[BaseException], *kinds: type[BaseException]) -> Any:
    return next((error for error in chain if isinstance(error, kinds)), None)


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")
