"""Keeps the current folder, which may be a checkpoint's, from bringing code into a program of ours.

`python -m` and `python -c` put the current folder first in sys.path, and an entry of PYTHONPATH, PATH and the like that
is empty or relative means it too. A torch.py or a cc that lies there must not run. What is named by an absolute path is
the user's own choice.

Imports only what Python itself has imported before: anything else might come from that folder.
"""

import os
import sys

_COMMANDS = "bitpress.pipeline.cli"
_SEARCHED = (
    "PYTHONPATH", "PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH", "LIBRARY_PATH",
    "COMPILER_PATH", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH",
)  # fmt: skip
_KEPT = (
    "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_DATASETS_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE", "TORCH_HOME",
    "TRITON_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
)  # fmt: skip


def is_command() -> bool:
    """Whether this process was started as bitpress's command line, not as a program that uses bitpress."""
    if os.path.basename(next(iter(sys.argv), "")) == "bitpress":
        return True
    return any(option in ("-m", "-c") and _COMMANDS in text for option, text in zip(sys.orig_argv, sys.orig_argv[1:]))


def clean_environment(environment: "os._Environ[str] | dict[str, str]") -> dict[str, str]:
    """The environment, so that it means the same in any folder: no library, module or program is looked for in the
    current one, and caches keep their places."""
    cleaned = dict(environment)
    for name in _SEARCHED:
        if name not in cleaned:
            continue
        entries = [entry for entry in cleaned[name].split(os.pathsep) if os.path.isabs(entry)]
        cleaned[name] = os.pathsep.join(entries)
        if not entries:
            del cleaned[name]  # an empty one means the current folder
    for name in _KEPT:
        if cleaned.get(name) and not cleaned[name].startswith("~"):
            cleaned[name] = os.path.abspath(cleaned[name])
    return cleaned


def leave_current_folder() -> None:
    """Take the current folder out of sys.path and of this process's environment; for programs, not for a library.

    Code from the Hub is out, too, where the user has not asked for it.
    """
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    trusted = {os.path.realpath(entry) for entry in (*named, *_installed()) if os.path.isabs(entry)}
    try:
        current = os.path.realpath(os.getcwd())
    except FileNotFoundError:  # it was deleted
        current = None
    sys.path[:] = [
        entry
        for entry in sys.path
        if os.path.isabs(entry) and (os.path.realpath(entry) != current or os.path.realpath(entry) in trusted)
    ]
    cleaned = clean_environment(os.environ)
    for name in os.environ.keys() - cleaned.keys():
        del os.environ[name]
    os.environ.update(cleaned)
    os.environ.setdefault("USE_HUB_KERNELS", "NO")  # transformers would fetch compiled code for some models by itself


def _installed() -> list[str]:
    """The folders of packages, and of Python's own modules, whatever the current folder is."""
    return [
        os.path.dirname(os.__file__),
        *(path for path in sys.path if path.endswith(("site-packages", "dist-packages"))),
    ]
