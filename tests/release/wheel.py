"""Builds the release: the sdist, and the wheel for Linux on x86-64 that carries the native library.

    python tests/release/wheel.py --out dist          # needs gcc, binutils and setuptools
    python tests/release/wheel.py --out dist --try    # and tries both, each in a fresh environment

The library calls a dozen functions of glibc. The wheel's tag names the oldest glibc that has all of them, as binutils
reads it from the library; a wheel without the library is an error.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# glibc 2.34 gave these new versions when it took the threads into libc; the old ones are still there, and the same.
OLD_VERSIONS = """
__asm__(".symver pthread_create,pthread_create@GLIBC_2.2.5");
__asm__(".symver pthread_join,pthread_join@GLIBC_2.2.5");
"""
OLDEST = (2, 17)  # that a tag may name: manylinux2014's
LIBRARY = re.compile(r"bitpress/kernels/cpu/_native[\w.-]*\.so")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1]{})"
PLATFORM = ", {'--build-option': ['--plat-name', sys.argv[2]]}"


def build_sdist(out: Path) -> Path:
    """The source archive of this repository."""
    subprocess.run([sys.executable, "-c", BUILD.format("sdist", ""), str(out)], cwd=ROOT, check=True, text=True)
    return max(out.glob("bitpress-*.tar.gz"), key=lambda path: path.stat().st_mtime_ns)


def glibc(library: Path) -> tuple[int, int]:
    """The oldest glibc that has every function that a library calls."""
    table = subprocess.run(["objdump", "-T", str(library)], check=True, capture_output=True, text=True).stdout
    versions = {(int(major), int(minor)) for major, minor in re.findall(r"GLIBC_(\d+)\.(\d+)", table)}
    return max(versions | {OLDEST})


def build_wheel(sdist: Path, out: Path) -> Path:
    """The wheel of a source archive, by the tag that its library deserves."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        source = folder / sdist.name.removesuffix(".tar.gz")
        (folder / "old_versions.h").write_text(OLD_VERSIONS)
        environment = os.environ | {"CFLAGS": f"-include {folder / 'old_versions.h'}"}
        tag = "linux_x86_64"
        for _ in range(2):  # the library tells its tag once it is built; the second build takes it as it is
            command = [sys.executable, "-c", BUILD.format("wheel", PLATFORM), str(folder), tag]
            subprocess.run(command, cwd=source, env=environment, check=True, text=True)
            [wheel] = folder.glob(f"bitpress-*-{tag}.whl")
            with zipfile.ZipFile(wheel) as contents:
                libraries = [each for each in contents.namelist() if LIBRARY.fullmatch(each)]
                if len(libraries) != 1:
                    raise SystemExit(f"{wheel.name} carries {len(libraries)} native libraries, expected one")
                tag = "manylinux_{}_{}_x86_64".format(*glibc(Path(contents.extract(libraries[0], folder))))
        out.mkdir(parents=True, exist_ok=True)
        return wheel.replace(out / wheel.name)


def try_out(package: Path, compiler: bool) -> None:
    """Install a package in a fresh environment and run the demo from a folder of its own.

    Args:
        compiler: whether one may be found, on PATH or anywhere else that bitpress looks.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        programs, elsewhere = folder / "venv" / "bin", folder / "elsewhere"
        elsewhere.mkdir()
        path = f"{programs}:{os.environ['PATH']}" if compiler else str(programs)
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CC")}
        environment |= {"PATH": path, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache")}
        pinned = ["--constraint", str(ROOT / "constraints.txt")]
        for command in (
            [programs / "pip", "install", "--quiet", *pinned, "torch", str(package)],
            [programs / "bitpress", "--version"],
            [programs / "bitpress", "run", "demo", "--quick"],
            [programs / "bitpress", "doctor", "runs/demo-quick/int4-g32"],
            [programs / "python", "-c", "from bitpress.kernels.cpu.library import library; print(library().origin)"],
        ):
            subprocess.run(command, cwd=elsewhere, env=environment, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--try", dest="tried", action="store_true", help="install each in a fresh environment, and run")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    archive = build_sdist(options.out.resolve())
    built = build_wheel(archive, options.out.resolve())
    if options.tried:
        try_out(built, compiler=False)
        try_out(archive, compiler=True)
    print(f"{archive}\n{built}")
