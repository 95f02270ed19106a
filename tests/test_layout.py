"""The repository's own rules, as far as a machine can see them."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("pipeline", "kernels", "eval")
REQUIRED = {*FOLDERS, "configs", "tests", "pyproject.toml", "README.md", "LICENSE"}
ALLOWED = REQUIRED | {"CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile", "constraints.txt"}

SHIPPED = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
EVERY = sorted([*SHIPPED, *(ROOT / "tests").rglob("*.py")])
MODULES = sorted(
    "bitpress." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SHIPPED
)

# Names that read like code which runs what it is given; pickles are refused, not read.
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=name_of)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names that a file imports, wherever in it; relative ones resolved."""
    package = ("bitpress", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def ignored() -> list[str]:
    lines = (ROOT / ".gitignore").read_text().splitlines()
    return [line.strip("/") for line in lines if line and not line.startswith("#")]


def markdown() -> list[Path]:
    found = (path for path in ROOT.rglob("*.md") if not set(path.relative_to(ROOT).parts[:-1]) & {"runs", "build"})
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(ROOT).parts))


def run(program: str) -> None:
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_the_top_level_is_fixed():
    present = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    present = {name for name in present if not any(fnmatch(name, pattern) for pattern in ignored())}
    assert present <= ALLOWED
    assert present >= REQUIRED


def test_kernels_gives_way_to_hugging_faces_package():
    """With an __init__.py, `import kernels` in this folder would find ours, and transformers and bitsandbytes break."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_package_is_installed():
    """setuptools is told each package by name: a folder that is forgotten works here and is missing from the wheel."""
    listed = set(re.findall(r'^    "(bitpress\.[\w.]+)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    holding = {"bitpress." + ".".join(path.relative_to(ROOT).parent.parts) for path in SHIPPED}
    assert holding <= listed


@each(EVERY)
def test_imports_run_one_way(path: Path):
    names = set(imports(path))
    ours = {name for name in names if within(name, "bitpress")}
    bare = {name.split(".")[0] for name in names} & {*FOLDERS, "configs"}
    assert not bare, "import bitpress.kernels, not kernels, which is Hugging Face's"
    top = path.relative_to(ROOT).parts[0]
    if top == "kernels":
        assert all(within(name, "bitpress.kernels") for name in ours)
    if top == "eval":
        assert not any(within(name, "bitpress.pipeline") for name in ours)
    if top in FOLDERS:
        assert not any(within(name, "tests") for name in names)


@each(EVERY)
def test_no_error_is_dropped_in_silence(path: Path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            where = f"{name_of(path)}:{node.lineno}"
            assert node.type is not None, f"{where}: a bare except"
            empty = all(isinstance(part, ast.Pass) for part in node.body)
            assert not (empty and path in SHIPPED), f"{where}: except and pass; contextlib.suppress says what is meant"


@each(SHIPPED)
def test_nothing_runs_what_it_reads(path: Path):
    names = {name.split(".")[0] for name in imports(path)}
    assert not names & FORBIDDEN_MODULES
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        where = f"{name_of(path)}:{node.lineno}"
        assert ast.unparse(node.func) not in FORBIDDEN_CALLS, where
        for keyword in node.keywords:
            told = (keyword.arg, ast.unparse(keyword.value))
            assert told[0] not in ("allow_pickle", "weights_only"), where
            assert told not in (("trust_remote_code", "True"), ("shell", "True"), ("strict", "False")), where
            assert not (ast.unparse(node.func) == "YAML" and told[1] in ("'unsafe'", '"unsafe"')), where


@each(EVERY)
def test_no_leftovers_and_no_paths_of_one_machine(path: Path):
    """The words are put together here, so that this file does not hold them."""
    text = path.read_text(encoding="utf-8")
    for word in ("TO" + "DO", "FIX" + "ME", "XX" + "X"):
        assert not re.search(rf"\b{word}\b", text), word
    for folder in ("wo" + "rk", "ro" + "ot", "op" + "t", "ho" + "me"):
        assert not re.search(rf"[\"'\s(=]/{folder}/\w", text), folder


@pytest.mark.parametrize("path", markdown(), ids=name_of)
def test_relative_links_lead_somewhere(path: Path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for link in links:
        target = link.partition("#")[0]
        if target and not re.match(r"[a-z][a-z0-9+.-]*:|//", target):
            assert (path.parent / target).exists(), f"{name_of(path)}: {link}"


def test_nothing_asks_for_a_gpu_at_import():
    """A fork after CUDA has started cannot use it, and a machine without one would have to wait or warn."""
    run(f"""
import importlib, torch
asked = []
def refuse(*args, **kwargs):
    raise AssertionError("asked for a GPU at import")
for name in ("is_available", "device_count", "get_device_properties", "get_device_capability", "current_device",
             "mem_get_info", "init", "_lazy_init"):
    setattr(torch.cuda, name, refuse)
for module in {MODULES}:
    if not module.endswith((".train", ".__main__")):
        importlib.import_module(module)
""")


def test_works_without_what_is_optional():
    """bitsandbytes and datasets are extras, and Triton comes with CUDA builds of torch alone."""
    run(f"""
import sys
for name in ("bitsandbytes", "triton", "datasets", "pyarrow", "lm_eval", "pynvml"):
    sys.modules[name] = None
import importlib
for module in {MODULES}:
    if not module.endswith((".train", ".__main__")):
        importlib.import_module(module)
from bitpress.pipeline import evaluate, load, quantize
""")


def test_the_public_api():
    import bitpress.pipeline

    for name in bitpress.pipeline.__all__:
        assert getattr(bitpress.pipeline, name).__doc__, f"{name} has no docstring"
