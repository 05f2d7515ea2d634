"""Requests to the model hub: retries, verification of what it sends, and one line for each error."""

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
WAIT_SECONDS = (1.0, 4.0)  # before the second and the third attempt
ANSWER_SECONDS = 30  # timeout of a silent hub, unless HF_HUB_DOWNLOAD_TIMEOUT is set


class DamagedError(Exception):
    """A file in the local cache does not have the digest that the hub announced."""


def from_hub(what: str, offline_choice: str, fetch: Callable[[], T]) -> T:
    """Return the result of `fetch`, retried after temporary failures.

    what: key, repository and revision, for messages. offline_choice: the selection in params.yaml that needs no hub.
    Raises UserError for an error of the hub or its client; other errors pass.
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
    """Compare the files of a snapshot in the local cache with their digests; the client compares sizes only. Deletes
    the files that differ, so that they are downloaded again, and raises DamagedError.

    The cache names a file by the digest that the hub announced. On file systems without symbolic links it does not, and
    nothing is compared.
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
    """The file's sha256 if its name is one (large files), else git's blob hash."""
    with content.open("rb") as file:
        if len(content.name) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        blob = hashlib.sha1(b"blob %d\0" % content.stat().st_size, usedforsecurity=False)
        while chunk := file.read(1 << 20):
            blob.update(chunk)
        return blob.hexdigest()


def _limit_waiting() -> None:
    """Set timeouts for the hub's client: some of its requests would wait for ever."""
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
    """Whether the same request may soon succeed. It will not if no server listens at the address."""
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

    # `datasets` wraps the hub's exceptions, so the whole chain is searched, for the most specific ones first
    chain = _chain(error)
    way_out = f"or choose `{offline_choice}`, which needs no network"
    if damaged := _any(chain, DamagedError):
        return f"{damaged} is not the file that the hub at {_endpoint()} announced: try again later, {way_out}"
    if _any(chain, errors.GatedRepoError):
        return "access is gated: accept its terms on the hub's page and log in with `hf auth login`"
    if _any(chain, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    answer = _any(chain, errors.HfHubHTTPError)
    # The hub answers in JSON, and its client takes any 401 for a missing repository.
    page = answer and "html" in answer.response.headers.get("content-type", "")
    if answer and (answer.response.status_code == 407 or (page and answer.response.status_code in (401, 403))):
        return (
            f"a proxy or a log-in page answered {answer.response.status_code} for the hub at {_endpoint()}: "
            f"see HTTPS_PROXY and NO_PROXY, {way_out}"
        )
    if _any(chain, errors.RepositoryNotFoundError):
        return "the hub has no such repository (a private one needs `hf auth login`)"
    if constants.is_offline_mode() and (_any(chain, OSError) or _any(chain, errors.EntryNotFoundError)):
        return f"not in the local cache, and HF_HUB_OFFLINE forbids downloads: unset it, {way_out}"
    if answer:
        status = answer.response.status_code
        advice = "check your token (`hf auth login`)" if status in (401, 403) else "try again later"
        return f"the hub at {_endpoint()} answered {status}: {advice}, {way_out}"
    if broken := _any(chain, httpx2.TransportError) or _any(chain, ConnectionError, errors.LocalEntryNotFoundError):
        cause = f"{type(broken).__name__}: {broken}".split("\n")[0]
        return f"the hub at {_endpoint()} cannot be reached ({cause}): check the network or HF_ENDPOINT, {way_out}"
    if isinstance(error, json.JSONDecodeError):
        return (
            f"the hub at {_endpoint()} did not answer in JSON; it may be a network's log-in page: check both, {way_out}"
        )
    if cut := _cut_short(chain):
        return f"the hub at {_endpoint()} sent only a part of a file ({cut}): try again later, {way_out}"
    return None


def _cut_short(chain: list[BaseException]) -> str:
    """The client's message for a download of the wrong size, an OSError without a class of its own."""
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
