"""Failures of the Hub in our own words: the client's may repeat what a server said, a token among it."""

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

# HTTPError: the transport's own (no connection, broken off). OSError: most of huggingface_hub's, and the disk's.
# RuntimeError: Xet's. The others: an answer that is not the Hub's, such as a log-in page.
HUB_ERRORS = (HTTPError, OSError, RuntimeError, ValueError, LookupError, TypeError)

LONGEST_WAIT = 120  # seconds; a server that asks for more is not waited for, but the user is told
_PASSING = (408, 429, 500, 502, 503, 504)  # status codes after which the same request may succeed
_REFUSED_CARD = "Invalid metadata in README.md"  # how the client's message begins
_LONGEST_QUOTE = 200  # characters of what the server said

# What failed (an exception, or a status code), and the sentence about it when a model is downloaded and when one is
# uploaded. The first line that fits counts; None leaves it to a later one.
_TOKEN_REFUSED = "the Hub answered {code} for {name}; your token is not accepted: `hf auth login` again"
_FAILURES: tuple[tuple[type[Exception] | int, str | None, str | None], ...] = (
    (
        GatedRepoError,
        "{name} is gated: accept its terms on its page, then `hf auth login` with an account that may read it",
        "{name} is gated, and {token} has no access{quote}; accept its terms on its page, then run again",
    ),
    (
        RevisionNotFoundError,
        "{name} has no revision {revision}; look up its branches, tags and commits on its page",
        None,
    ),
    (
        RepositoryNotFoundError,
        "{name} is no folder here, and not on the Hub or private: check the spelling, or `hf auth login`",
        None,
    ),
    (
        401,
        _TOKEN_REFUSED,
        "the Hub does not accept {token}{quote}; `hf auth login` again, or set HF_TOKEN to another",
    ),
    (403, _TOKEN_REFUSED, "{token} may not write to {name}{quote}; use one with write access to it"),
    (
        404,
        None,
        "{name} is not on the Hub, or hidden from {token}{quote}; check the spelling and the token's access",
    ),
    (409, None, "something else is being done to {name} on the Hub{quote}; {again}"),
    (
        412,
        None,
        "{name} was changed by somebody else meanwhile, and nothing of it was overwritten; look at it, run again",
    ),
    (429, None, "the Hub takes no more requests from this account for now{quote}; wait {wait}, then {again}"),
    (
        HfHubHTTPError,
        "the Hub answered {code} for {name}; try again later",
        "the Hub answered {code} for {name}{quote}; {again}",
    ),
    (
        OfflineModeIsEnabled,
        "{name} is not wholly in the local cache, and HF_HUB_OFFLINE forbids asking the Hub; unset it",
        "{name}: HF_HUB_OFFLINE forbids asking the Hub; unset it",
    ),
    (
        HTTPError,
        "the connection to the Hub failed for {name} ({kind}); check the network and run again",
        "the connection to the Hub failed for {name} ({kind}); check the network and {again}",
    ),
    (
        Exception,
        "the download of {name} failed: {reason}; run again to go on from there",
        "publishing {name} failed: {reason}; {again}",
    ),
)


def download_error(error: Exception, name: str, revision: str | None = None) -> BitpressError:
    """The error to raise when a download failed: ConfigError for a name that no Hub id has, DiskError where the Hub's
    cache cannot be written, HubError for the rest."""
    error = _cause(error)
    if isinstance(error, HFValidationError):
        return ConfigError(f"{name} is not a Hub id: {error}")
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError):
        return DiskError(f"{error.filename or name}: cannot be written to the Hub's cache: {error.strerror}")
    sentences = [(failure, download) for failure, download, _ in _FAILURES]
    return HubError(_sentence(error, sentences, name=name, revision=revision or ""))


def upload_error(error: Exception, repo: str, account: str) -> HubError:
    """The error to raise when the Hub refused something about a repository, with what to do.

    Args:
        account: the owner of the token; "" as long as nobody knows.
    """
    if isinstance(error, ValueError) and str(error).startswith(_REFUSED_CARD):
        reasons = "; ".join(_first_line(line.removeprefix("- ")) for line in str(error).splitlines()[1:])
        return HubError(
            f"the Hub does not take the card's metadata ({reasons}), and another try does not help: mend these in "
            "the README.md of the model that was quantized, and quantize it anew"
        )
    sentences = [(failure, upload) for failure, _, upload in _FAILURES]
    token = f"{account}'s token" if account else "the token"
    return HubError(_sentence(_cause(error), sentences, name=repo, token=token))


def seconds_to_wait(error: Exception, wait: float | None) -> float | None:
    """Seconds to wait before the same request is tried again; None where that would not help.

    Args:
        wait: how long, where the Hub does not say; None after the last try.
    """
    cause = _cause(error)
    if wait is None:
        return None
    if isinstance(cause, HfHubHTTPError):
        asked = _retry_after(cause)
        if cause.response.status_code not in _PASSING or (asked or 0) > LONGEST_WAIT:
            return None
        return wait if asked is None else asked
    return wait if isinstance(cause, HTTPError) else None


def _sentence(error: Exception, sentences: list[tuple[type[Exception] | int, str | None]], **facts: str) -> str:
    """The first sentence that fits the error, its facts filled in."""
    code = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    template = next(
        sentence
        for failure, sentence in sentences
        if sentence and (failure == code if isinstance(failure, int) else isinstance(error, failure))
    )
    quote, wait = "", "some minutes"
    if isinstance(error, HfHubHTTPError):
        message = _first_line(error.server_message or "")
        quote = f" ({message})" if message else ""
        asked = _retry_after(error)
        wait = f"{asked} seconds" if asked else wait
    kind = type(error).__name__
    reason = _first_line(str(error)) or kind
    again = "run again: what is uploaded is kept"
    return template.format(code=code, quote=quote, wait=wait, kind=kind, reason=reason, again=again, **facts)


def _retry_after(error: HfHubHTTPError) -> int | None:
    """The seconds that the Hub asks to wait."""
    value = error.response.headers.get("Retry-After", "")
    return int(value) if value.isdecimal() else None


def _first_line(text: str) -> str:
    """The first line, without what a token or a terminal would suffer from."""
    line = next(iter(printable(redact(text)).splitlines()), "").strip()
    return line[:_LONGEST_QUOTE]


def _cause(error: Exception) -> Exception:
    """The failure itself. The client wraps the errors of its threads, and says "not in the cache" of every download
    that failed."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, HTTPError):
            return link
        link = link.__cause__
    return error
