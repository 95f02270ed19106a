"""The folder in which bitpress keeps what it can make again, of this user on this machine."""

import os
from pathlib import Path


def user_cache() -> Path | None:
    """bitpress in XDG_CACHE_HOME or ~/.cache, which may not exist yet; None where the user has no home.

    A path in XDG_CACHE_HOME that is not absolute counts for nothing (XDG Base Directory Specification).
    """
    home = os.path.expanduser("~")  # as it stands where there is no home
    base = next(filter(os.path.isabs, [os.environ.get("XDG_CACHE_HOME", ""), os.path.join(home, ".cache")]), None)
    return Path(base) / "bitpress" if base else None
