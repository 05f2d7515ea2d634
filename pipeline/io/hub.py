"""What the model hub's errors mean to a user, in one line each."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from pipeline.errors import UserError


@contextlib.contextmanager
def hub_errors(what: str, offline_choice: str) -> Iterator[None]:
    """Turns an error of the hub's client into a UserError that begins with `what`; any other error passes.

    what: key, kind, repository and revision. offline_choice: the selection that needs no hub.
    """
    try:
        yield
    except Exception as error:
        meaning = _meaning(error, offline_choice)
        if meaning is None:
            raise
        raise UserError(f"{what}: {meaning}") from error


def _meaning(error: BaseException, offline_choice: str) -> str | None:
    import httpx2
    from huggingface_hub import constants, errors

    # `datasets` wraps the hub's own exceptions, so the cause is looked for down the chain; the most special goes first.
    chain = _chain(error)
    way_out = f"or choose `{offline_choice}`, which needs no network"
    if _any(chain, errors.GatedRepoError):
        return "access is gated: accept its terms on the hub's page and log in with `hf auth login`"
    if _any(chain, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if _any(chain, errors.RepositoryNotFoundError):
        return "the hub has no such repository (a private one needs `hf auth login`)"
    if constants.is_offline_mode() and (_any(chain, OSError) or _any(chain, errors.EntryNotFoundError)):
        return f"not in the local cache, and HF_HUB_OFFLINE forbids to fetch it: unset it, {way_out}"
    if answer := _any(chain, errors.HfHubHTTPError):
        status = answer.response.status_code
        advice = "check your token (`hf auth login`)" if status in (401, 403) else "try again later"
        return f"the hub at {_endpoint()} answered {status}: {advice}, {way_out}"
    if broken := _any(chain, httpx2.TransportError) or _any(chain, ConnectionError, errors.LocalEntryNotFoundError):
        cause = f"{type(broken).__name__}: {broken}".split("\n")[0]
        return f"the hub at {_endpoint()} cannot be reached ({cause}): check the network or HF_ENDPOINT, {way_out}"
    return None


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
