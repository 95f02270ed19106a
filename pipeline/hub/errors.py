"""What goes wrong while writing to the Hub, in our words: the client's own may repeat what a server said."""

from collections.abc import Iterator

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from bitpress.eval.report.words import printable

from ..errors import BitpressError, ConfigError, DiskError, HubError
from ..system.redact import redact

LONGEST_WAIT = 120  # seconds; who asks for more is told to the user
_AGAIN = (408, 429, 500, 502, 503, 504)
_KEPT = "run again: what is uploaded is kept"
_LONGEST_QUOTE = 200  # characters of what the server said


def pause(error: Exception, wait: float | None) -> float | None:
    """Seconds to wait before trying again; None where that would not help, or was tried often enough.

    Args:
        wait: how long, where the Hub does not say; None after the last try.
    """
    cause = _cause(error)
    if wait is None:
        return None
    if isinstance(cause, HfHubHTTPError):
        asked = _asked(cause)
        if cause.response.status_code not in _AGAIN or (asked or 0) > LONGEST_WAIT:
            return None
        return wait if asked is None else asked
    return wait if isinstance(cause, HTTPError) else None


def sentence(error: Exception, repo: str, account: str) -> str:
    """What happened to a repository, and what to do."""
    cause = _cause(error)
    if isinstance(cause, HfHubHTTPError):
        return _answered(cause, repo, f"{account}'s token" if account else "the token")
    if isinstance(cause, OfflineModeIsEnabled):
        return f"{repo}: HF_HUB_OFFLINE forbids asking the Hub; unset it"
    kind = type(cause).__name__
    if isinstance(cause, HTTPError):
        return f"the connection to the Hub failed for {repo} ({kind}); check the network and {_KEPT}"
    said = _quoted(str(cause))
    return f"publishing {repo} failed: {said or kind}; {_KEPT}"


def _answered(error: HfHubHTTPError, repo: str, token: str) -> str:
    code = error.response.status_code
    said = _quoted(getattr(error, "server_message", None) or "")
    quote = f" ({said})" if said else ""
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated, and {token} has no access{quote}; accept its terms on its page, then run again"
    if code == 429:
        asked = _asked(error)
        when = f"wait {asked} seconds" if asked else "wait some minutes"
        return f"the Hub takes no more requests from this account for now{quote}; {when}, then {_KEPT}"
    words = {
        401: f"the Hub does not accept {token}{quote}; `hf auth login` again, or set HF_TOKEN to another",
        403: f"{token} may not write to {repo}{quote}; use one with write access to it",
        404: f"{repo} is not on the Hub, or hidden from {token}{quote}; check the spelling and the token's access",
        409: f"something else is being done to {repo} on the Hub{quote}; {_KEPT}",
        412: f"{repo} was changed by somebody else meanwhile, and nothing of it was overwritten; look at it, run again",
    }
    return words.get(code, f"the Hub answered {code} for {repo}{quote}; {_KEPT}")


def _asked(error: HfHubHTTPError) -> int | None:
    """The seconds that the Hub asks to wait."""
    value = error.response.headers.get("Retry-After", "")
    return int(value) if value.isdecimal() else None


def _quoted(said: str) -> str:
    """The first line, without what a token or a terminal would suffer from."""
    line = next(iter(printable(redact(said)).splitlines()), "").strip()
    return line[:_LONGEST_QUOTE]


def _cause(error: Exception) -> Exception:
    """Uploads run in threads, whose errors the client wraps."""
    return next((found for found in _chain(error) if isinstance(found, HTTPError)), error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


# HTTPError: the transport's own (no connection, broken off). OSError: most of huggingface_hub's, and the disk's.
# RuntimeError: Xet's. The others: an answer that is not the Hub's, such as a log-in page.
HUB_ERRORS = (HTTPError, OSError, RuntimeError, ValueError, LookupError, TypeError)


def hub_error(error: Exception, name: str, revision: str | None = None) -> BitpressError:
    """What the Hub's failure is to the user; the disk's, on which the cache lies, is one of its own."""
    error = _download_cause(error)
    if isinstance(error, HFValidationError):
        return ConfigError(f"{name} is not a Hub id: {error}")
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError):
        return DiskError(f"{error.filename or name}: cannot be written to the Hub's cache: {error.strerror}")
    return HubError(_explained(error, name, revision))


def _download_cause(error: Exception) -> Exception:
    """huggingface_hub says "not in the cache" of everything; why it had to look there is the cause."""
    told = isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception)
    return error.__cause__ if told else error  # type: ignore[return-value]


def _explained(error: Exception, name: str, revision: str | None) -> str:
    """A sentence on why the Hub did not give something, and what to do."""
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: accept its terms on its page, then `hf auth login` with an account that may read it"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {revision}; look up its branches, tags and commits on its page"
    if isinstance(error, RepositoryNotFoundError):
        return f"{name} is no folder here, and not on the Hub or private: check the spelling, or `hf auth login`"
    if isinstance(error, HfHubHTTPError):
        code = error.response.status_code
        advice = "your token is not accepted: `hf auth login` again" if code in (401, 403) else "try again later"
        return f"the Hub answered {code} for {name}; {advice}"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{name} is not wholly in the local cache, and HF_HUB_OFFLINE forbids asking the Hub; unset it"
    if isinstance(error, HTTPError):
        kind = type(error).__name__
        return f"the connection to the Hub failed for {name} ({kind}); check the network and run again"
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"the download of {name} failed: {first}; run again to go on from there"
