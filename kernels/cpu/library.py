"""The shared library of csrc/: built when bitpress was installed or, where there was no compiler then, on first use."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..user_cache import user_cache

_HERE = Path(__file__).parent
_FLAGS = [
    "-O3",
    "-std=gnu11",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
]
_MOST_SECONDS = 900  # for a compiler; all files take 70 of an idle core
_SEARCHED = ("PATH", "LD_LIBRARY_PATH", "LIBRARY_PATH", "COMPILER_PATH", "CPATH", "C_INCLUDE_PATH")  # by compilers
_POINTER, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


@dataclass(frozen=True)
class Library:
    """The library, and its sets of kernels: the fastest first, `best` the first that this machine can run."""

    lib: ctypes.CDLL
    path: Path
    instructions: tuple[str, ...]
    available: tuple[bool, ...]
    origin: str  # "built at installation", …

    @property
    def best(self) -> int:
        return self.available.index(True)

    @property
    def runnable(self) -> list[str]:
        return [name for name, runs in zip(self.instructions, self.available) if runs]


@functools.cache
def library() -> Library | str:
    """The library, or why there is none."""
    if sys.byteorder != "little":
        return "written for little-endian machines"
    try:
        if installed := _installed():
            return _load(installed, "built at installation")
        return _load(_build(), ", as ".join(["built on first use", *_stale()]))
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        return f"no native library: {_reason(error)}"


def _installed() -> Path | None:
    """The library that was built at installation, if it is of the sources that are here: it holds the text of each.

    After the sources have changed, by `git pull` say, it may lack functions, or lay weights out in another way.
    """
    texts = [source.read_bytes() + b"\0" for source in _sources()]
    for path in sorted(_HERE.glob("_native*.so")):
        content = path.read_bytes()
        if all(text in content for text in texts):
            return path
    return None


def _stale() -> list[str]:
    """What is wrong with the installed library, in a list of one; [] where there is none."""
    return [f"{path.name} is of other sources" for path in sorted(_HERE.glob("_native*.so"))[:1]]


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError) and error.stderr:
        lines = error.stderr.strip().splitlines()
        return f"the compiler failed: {next((line for line in lines if 'error' in line), lines[-1])}"
    return str(error)


def compiler() -> str | None:
    """The path of a C compiler; one in the current folder, which an entry of PATH may mean, is none."""
    path = os.pathsep.join(_absolute("PATH"))
    return shutil.which("cc", path=path) or shutil.which("gcc", path=path) or shutil.which("clang", path=path)


def _absolute(variable: str) -> list[str]:
    """The entries of a search path; an empty or relative one means the current folder, which may be anybody's."""
    return [entry for entry in os.environ.get(variable, "").split(os.pathsep) if os.path.isabs(entry)]


def pending() -> str | None:
    """What the first use does before it can compute, in words; None where the library is there, or cannot be."""
    command = compiler()
    with contextlib.suppress(OSError):
        if sys.byteorder == "little" and command and not _installed():
            return None if _compiled(command, _cache()) else f"compiled by {command} on first use, once"
    return None


def _name(command: str) -> str:
    """What a library is called that this compiler makes of csrc/."""
    digest = hashlib.sha256("\0".join([command, platform.machine(), *_FLAGS]).encode())
    for source in _sources():
        digest.update(source.read_bytes())
    return f"native-{digest.hexdigest()[:16]}"


def _sources() -> list[Path]:
    return sorted((_HERE / "csrc").glob("*.[ch]"))


def _compiled(command: str, cache: Path) -> Path | None:
    """The library that was compiled before, as it was written."""
    for path in cache.glob(f"{_name(command)}-*.so"):
        with contextlib.suppress(FileNotFoundError):  # another process removed it first
            if _is_ours(path) and path.name == f"{_name(command)}-{_sha256(path.read_bytes())}.so":
                return path
            path.unlink()  # damaged: it is built again
    return None


def _build() -> Path:
    """The library in the user's cache, compiled from csrc/ where it is not there, or not as it was written.

    Raises:
        OSError: there is no compiler, or no folder to write to.
        subprocess.SubprocessError: the compiler failed.
    """
    command = compiler()
    if command is None:
        wrong = "; ".join(f"{each}: install bitpress again" for each in _stale())
        raise OSError(
            f"{wrong or 'none came with the installation'}, and there is no C compiler here (cc, gcc or clang)"
        )
    cache = _cache()
    if compiled_before := _compiled(command, cache):
        return compiled_before
    with tempfile.TemporaryDirectory(prefix="bitpress-") as folder:
        compiled = os.path.join(folder, "native.so")
        units = [str(source) for source in _sources() if source.suffix == ".c"]
        environment = dict(os.environ)
        for variable in _SEARCHED:
            environment.pop(variable, None)
            if entries := _absolute(variable):
                environment[variable] = os.pathsep.join(entries)

        def run(*arguments: str) -> None:
            subprocess.run(
                [command, *arguments],
                check=True, capture_output=True, text=True, timeout=_MOST_SECONDS, cwd=folder, env=environment,
            )  # fmt: skip

        objects = [f"{number}.o" for number in range(len(units))]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # one of the files takes half of the time of all
            list(pool.map(lambda unit, own: run(*_FLAGS, "-c", unit, "-o", own), units, objects))
        run("-shared", "-o", compiled, *objects, "-lm", "-lpthread")
        content = Path(compiled).read_bytes()
    path = cache / f"{_name(command)}-{_sha256(content)}.so"
    descriptor, temporary = tempfile.mkstemp(dir=cache, prefix=".native-")  # with mode 0600
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _cache() -> Path:
    """A folder that this user owns and nobody else may write to: what lies in it is loaded, so it is as good as code.

    Raises:
        OSError: there is none.
    """
    cache = user_cache()
    folders = [cache] if cache else []
    folders.append(Path(tempfile.gettempdir()) / f"bitpress-{os.geteuid()}")
    problems = []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if _is_ours(folder) and os.access(folder, os.W_OK):
                return folder
            problems.append(f"{folder} is not this user's alone")
        except OSError as error:
            problems.append(f"{folder}: {error.strerror}")
    raise OSError(f"no folder to keep it in: {'; '.join(problems)}")


def _is_ours(path: Path) -> bool:
    """Whether a file or folder belongs to this user, is no link, and nobody else may write to it."""
    status = path.lstat()
    mode = status.st_mode
    return status.st_uid == os.geteuid() and (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) and not mode & 0o022


def _load(path: Path, origin: str) -> Library:
    lib = ctypes.CDLL(str(path))
    lib.bitpress_kernel_name.restype = ctypes.c_char_p
    lib.bitpress_layout.argtypes = [_POINTER, *[_INT64] * 11]
    lib.bitpress_layout.restype = _INT64
    lib.bitpress_use_huge_pages.argtypes = [_POINTER, _INT64]
    lib.bitpress_page_in.argtypes = [_POINTER, _INT64]
    lib.bitpress_pack.argtypes = [_POINTER, _POINTER, *[_INT64] * 4, _INT]
    lib.bitpress_linear.argtypes = [_POINTER, _POINTER, _INT64, _INT64, _POINTER, _POINTER, _INT, _INT, _INT]
    lib.bitpress_dequantize.argtypes = [_POINTER, _INT64, _INT64, _INT64, _POINTER, _INT, _INT]
    lib.bitpress_dense.argtypes = [_POINTER, _POINTER, _POINTER, *[_INT64] * 4, _INT, _INT]
    lib.bitpress_read.argtypes = [_POINTER, _INT64, _INT, _INT]
    lib.bitpress_read.restype = ctypes.c_uint64
    lib.bitpress_columns.argtypes = [_POINTER, _POINTER, _INT64, *[_POINTER] * 6, _INT64, _INT64, _INT, _INT]
    lib.bitpress_set_fork_join(_torchs_threads())
    kernels = range(lib.bitpress_kernel_count())
    names = tuple(lib.bitpress_kernel_name(index).decode() for index in kernels)
    available = tuple(bool(lib.bitpress_kernel_available(index)) for index in kernels)
    return Library(lib, path, names, available, origin)


def _torchs_threads() -> ctypes.c_void_p:
    """GOMP_parallel of the OpenMP runtime that torch has loaded: its threads serve the library too.

    NULL where there is none: the library then starts threads of its own, call by call.
    """
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    loaded = {line.split(maxsplit=5)[5] for line in lines if "omp" in line.rpartition("/")[2] and ".so" in line}
    for path in sorted(loaded, key=lambda path: ("/torch" not in path, path)):
        function = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p)
    return ctypes.c_void_p(None)
