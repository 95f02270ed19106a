"""The repository's own rules, as far as a machine can see them."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("pipeline", "kernels", "eval")
REQUIRED = {*FOLDERS, "configs", "tests", "pyproject.toml", "README.md", "LICENSE"}
ALLOWED = REQUIRED | {
    "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile", "constraints.txt", "docs", "mkdocs.yml",
}  # fmt: skip

SHIPPED = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
EVERY = sorted([*SHIPPED, *(ROOT / "tests").rglob("*.py")])

# Who may import whom: a folder, or a file that lies beside folders, may import what stands to the right of it.
ORDER = {
    "": "tests -> pipeline -> eval -> kernels",
    "pipeline": "package -> pipeline -> cli -> runs, bench, hf, api, objects -> publish, trackers -> evaluate"
    " -> quantize, checkpoints -> transforms -> methods, models -> formats, data -> hub"
    " -> system, config, storage -> errors",
    "kernels": "bench -> decoder_layer -> linear -> registry -> cpu, triton, external, reference -> base -> qtensor"
    " -> scheme -> weights, activations -> packing -> kv_cache -> caches -> discovery, user_cache,"
    " products",
    "eval": "report -> measure",
}
ALONE = {"demo_model"}  # a script beside its model: it imports nothing of ours, and nothing of ours imports it

# Packages that kernels/ may import.
KERNELS_PACKAGES = {"torch", "triton", "bitsandbytes"}

# Files that import within a function, and why. All others import at their beginning.
LATE_IMPORTS = {
    "pipeline/package/__init__.py": "torch and transformers take seconds, and what is used is imported",
    "pipeline/__init__.py": "torch and transformers take seconds, and a caller may want the errors alone",
    "pipeline/cli/*.py": "a command imports what it needs when it is called, so that the others answer at once",
    "pipeline/evaluate/__main__.py": "an error of an import is one of the process, and told like the others",
    "pipeline/system/progress.py": "every command imports it, and few of them need the libraries that it silences",
    "pipeline/system/redact.py": "every command imports it, and huggingface_hub takes its time",
    "pipeline/data/text.py": "the text is large, pyarrow and datasets are optional",
    "pipeline/formats/gguf.py": "gguf is optional",
    "pipeline/storage/gguf/template.py": "gguf is optional",
    "pipeline/storage/gguf/view.py": "gguf is optional",
    "pipeline/quantize/imatrix.py": "gguf is optional",
    "pipeline/checkpoints/onnx_logits.py": "onnx and onnxruntime-genai are optional",
    "pipeline/methods/nf4.py": "bitsandbytes is optional",
    "pipeline/bench/scripts/*_job.py": "another program's Python runs them, and tests import them without that program",
    "pipeline/checkpoints/doctor.py": "transformers takes two seconds, and what it said of headers is remembered",
    "pipeline/runs/plan.py": "transformers takes two seconds, and a job that was planned before is remembered",
    "pipeline/runs/executors/ray.py": "ray is optional, and a job brings torch and transformers",
    "pipeline/trackers/*.py": "trackers are optional",
    "pipeline/runs/executors/serial.py": "`bitpress list` shows executors, and a job brings torch and transformers",
    "kernels/external/bitsandbytes_nf4.py": "bitsandbytes is optional",
    "eval/report/report.py": "matplotlib takes a second, and only pages with figures need it",
}

# Names that read like code which runs what it is given; pickles are refused, not read.
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=name_of)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path, node: ast.AST) -> list[str]:
    """The absolute dotted names that one node of a file imports, relative ones resolved; [] for any other node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = ("bitpress", *path.relative_to(ROOT).parent.parts)
    base = package[: len(package) - node.level + 1] if node.level else ()
    module = ".".join([*base, *([node.module] if node.module else [])])
    return [module, *(f"{module}.{alias.name}" for alias in node.names)]


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names that a file imports, wherever in it."""
    for node in ast.walk(tree(path)):
        yield from imported(path, node)


def module_of(path: Path) -> str:
    return "bitpress." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path) -> set[str]:
    """The modules of ours that a file imports, itself left out."""
    names = set()
    for node in ast.walk(tree(path)):
        dotted = imported(path, node)
        inner = [name for name in dotted if name in MODULES]
        # `from .folder import module` is an import of the module; of the folder only where it takes more from there
        if isinstance(node, ast.ImportFrom) and len(inner) == len(dotted) > 1:
            inner = inner[1:]
        names.update(inner)
    return names - {module_of(path)}


def unit_of(module: str) -> tuple[str, str]:
    """bitpress.pipeline.formats.gptq -> ("pipeline", "formats"), a place in ORDER; the package itself stands for all
    that lies in it."""
    parts = module.split(".")[1:]
    return parts[0], parts[1] if len(parts) > 1 else parts[0]


def circles(graph: Mapping[str, Iterable[str]]) -> list[set[str]]:
    """The strongly connected components with more than one node (Tarjan, SIAM J. Comput. 1, 1972)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    result: list[set[str]] = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for neighbour in graph.get(node, ()):
            if neighbour not in number:
                visit(neighbour)
            if neighbour in stack:
                lowest[node] = min(lowest[node], lowest[neighbour])
        if lowest[node] == number[node]:
            at = stack.index(node)
            component = set(stack[at:])
            del stack[at:]
            if len(component) > 1:
                result.append(component)

    for node in graph:
        if node not in number:
            visit(node)
    return result


MODULES = {module_of(path) for path in SHIPPED}


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


def test_every_folder_has_its_place():
    """A new folder is put into ORDER, and one that is gone is taken out."""
    units = {unit for module in MODULES if (unit := unit_of(module)) not in ((top, top) for top in ("kernels", "eval"))}
    for top in FOLDERS:
        assert {unit for first, unit in units if first == top} - ALONE == set(re.findall(r"\w+", ORDER[top]))


@each(EVERY)
def test_imports_run_one_way(path: Path):
    """Imports within functions count too."""
    names = set(imports(path))
    bare = {name.split(".")[0] for name in names} & {*FOLDERS, "configs"}
    assert not bare, "import bitpress.kernels, not kernels, which is Hugging Face's"
    top = path.relative_to(ROOT).parts[0]
    tops = re.findall(r"\w+", ORDER[""])
    if top in FOLDERS:
        assert not any(within(name, "tests") for name in names)
        own = unit_of(module_of(path))[1]
        assert own not in ALONE or not any(within(name, "bitpress") for name in names)
    for other in sorted(imported_modules(path)):
        target_top, target = unit_of(other)
        assert tops.index(top) <= tops.index(target_top), other
        if top == target_top and own != target:
            order = re.findall(r"\w+", ORDER[top])
            assert order.index(own) < order.index(target), f"{own} imports {other}: against {ORDER[top]}"


def test_no_circle_of_files():
    assert circles({module_of(path): imported_modules(path) for path in SHIPPED}) == []


def test_no_circle_of_folders():
    graph: dict[str, set[str]] = {}
    for path in SHIPPED:
        own = ".".join(unit_of(module_of(path)))
        graph.setdefault(own, set()).update(".".join(unit_of(name)) for name in imported_modules(path))
        graph[own].discard(own)
    assert circles(graph) == []


def test_circles_are_seen():
    assert circles({"a": "b", "b": "c", "c": "bd", "d": ""}) == [{"b", "c"}]
    assert circles({"a": "bc", "b": "c", "c": ""}) == []


@each(SHIPPED)
def test_late_imports_have_a_reason(path: Path):
    if any(fnmatch(name_of(path), pattern) for pattern in LATE_IMPORTS):
        return
    for function in ast.walk(tree(path)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            late = [name for node in ast.walk(function) for name in imported(path, node)]
            assert not late, f"{function.name} imports {late[0]}: import it at the top, or say why in LATE_IMPORTS"


def test_every_reason_is_needed():
    for pattern in LATE_IMPORTS:
        functions = (
            node for path in ROOT.glob(pattern) for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)
        )
        assert any(isinstance(node, ast.Import | ast.ImportFrom) for f in functions for node in ast.walk(f)), pattern


@each([path for path in SHIPPED if path.relative_to(ROOT).parts[0] == "kernels"])
def test_kernels_need_little(path: Path):
    packages = {name.split(".")[0] for name in imports(path)} - {"bitpress", *sys.stdlib_module_names}
    assert packages <= KERNELS_PACKAGES


@each(EVERY)
def test_no_error_is_dropped_in_silence(path: Path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            where = f"{name_of(path)}:{node.lineno}"
            assert node.type is not None, f"{where}: a bare except"
            empty = all(isinstance(part, ast.Pass) for part in node.body)
            assert not (empty and path in SHIPPED), f"{where}: except and pass; contextlib.suppress says what is meant"


# What prints by itself, past the place that makes text printable; and who may, and why.
PRINTS = {
    "print", "pprint", "Console", "rich.print", "rich.print_json", "typer.echo", "typer.secho", "click.echo",
    "TextStreamer", "traceback.print_exc", "traceback.print_exception", "logging.basicConfig", "logging.StreamHandler",
}  # fmt: skip
MAY_PRINT = {
    "pipeline/cli/console.py": "every command prints through it",
    "pipeline/demo_model/train.py": "a script beside its model, which prints its own figures",
    "pipeline/bench/scripts/*_job.py": "the standard output of another program's process is its answer, in JSON",
}


def prints(module: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and what stands there, wherever a program prints by itself or writes to a standard stream."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in PRINTS:
            yield node.lineno, name
        elif isinstance(node, ast.Attribute) and node.attr in ("write", "writelines", "buffer"):
            stream = ast.unparse(node.value)
            if stream.endswith(("stdout", "stderr", "stdout__", "stderr__")):
                yield node.lineno, f"{stream}.{node.attr}"


@each(SHIPPED)
def test_one_place_prints(path: Path):
    """What checkpoints, servers and file names bring along could steer a terminal: see pipeline/system/printable.py."""
    if not any(fnmatch(name_of(path), pattern) for pattern in MAY_PRINT):
        assert not list(prints(tree(path)))


def test_all_that_prints_is_seen():
    program = "print(x); Console(); sys.stderr.write(x); sys.__stdout__.buffer; traceback.print_exc()"
    assert len(list(prints(ast.parse(program)))) == 5


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


def test_what_imports_ask_for():
    """No module asks for a GPU at import: a fork after CUDA has started cannot use it, and a machine without one would
    have to wait or warn. And all can do without what is optional: extras, and Triton, which comes with CUDA builds of
    torch alone. Two forks of a process that has imported torch and transformers, which take seconds."""
    run(f"""
import importlib, os, sys, torch, transformers
def import_all():
    for module in {sorted(MODULES)}:
        if not module.endswith((".train", ".__main__")):
            importlib.import_module(module)
def refuse(*args, **kwargs):
    raise AssertionError("asked for a GPU at import")
if (child := os.fork()) == 0:
    for name in ("is_available", "device_count", "get_device_properties", "get_device_capability", "current_device",
                 "mem_get_info", "init", "_lazy_init"):
        setattr(torch.cuda, name, refuse)
    import_all()
    sys.exit()
optional = ("bitsandbytes", "triton", "datasets", "pyarrow", "lm_eval", "pynvml")
assert not sys.modules.keys() & optional
sys.modules.update(dict.fromkeys(optional))
import_all()
from bitpress.pipeline import evaluate, load, quantize
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")


def test_the_public_api():
    import bitpress.pipeline

    for name in bitpress.pipeline.__all__:
        assert getattr(bitpress.pipeline, name).__doc__, f"{name} has no docstring"


# Attributes that say who a plug-in is, of objects that are called like one.
IDENTITY = {"name", "code", "quant_method"}
PLUGIN_NOUNS = {"scheme", "weight", "activations", "cache", "format", "fmt", "method", "kernel", "executor"}
# Names of plug-ins that are ordinary words as well: to compare with one is no question.
COMMON_WORDS = {"int", "float", "codebook", "auto", "none", "cpu", "cuda", "reference", "serial", "int8"}
# Where names of plug-ins stand for something else, and what.
OTHER_MEANINGS = {
    "eval/measure/protocols.py": "protocols of perplexity are named after the papers of methods",
    "pipeline/bench/scripts/*_job.py": "the options of another program",
    "pipeline/formats/gguf.py": "MXFP4 and NVFP4 are ggml's types of blocks, too",
    "pipeline/storage/gguf/blocks.py": "MXFP4 and NVFP4 are ggml's types of blocks, too",
}
# A registry finds a plug-in by a name that it was handed; it holds no name itself. So does a scheme, of its two parts.
REGISTRIES = (
    "kernels/registry.py", "kernels/scheme.py", "pipeline/formats/__init__.py", "pipeline/methods/__init__.py",
)  # fmt: skip


def registered() -> dict[str, set[Path]]:
    """Name -> the plug-ins' own files: each name that a plug-in is registered, parsed or stored under, and its class's.

    A module's plug-ins are its PLUGINS: objects, or classes of them.
    """
    owners: dict[str, set[Path]] = {}
    for path in SHIPPED:
        targets = (target for node in tree(path).body if isinstance(node, ast.Assign) for target in node.targets)
        if not any(isinstance(target, ast.Name) and target.id == "PLUGINS" for target in targets):
            continue
        for plugin in importlib.import_module(module_of(path)).PLUGINS:
            values = [getattr(plugin, key, None) for key in IDENTITY]
            for key in ("examples", "schemes", "tags", "hf_methods"):
                values += getattr(plugin, key, ())
            names = {value for value in values if isinstance(value, str)}
            for name in {(plugin if isinstance(plugin, type) else type(plugin)).__name__, *names} - COMMON_WORDS:
                owners.setdefault(name, set()).add(path)
    return owners


def constants(node: ast.AST) -> Iterator[str]:
    """The strings that an operand of a comparison consists of: one, or those of a tuple, list, set or dict's keys."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Tuple | ast.List | ast.Set):
        for element in node.elts:
            yield from constants(element)
    elif isinstance(node, ast.Dict):
        for key in node.keys:
            yield from constants(key) if key else ()


def last_name(node: ast.AST) -> str:
    """The last part of a dotted name: `layer.scheme` -> "scheme"; "" for anything else."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def questions(module: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name, wherever a program may ask which plug-in it has: the names that it compares, and the classes.

    A dict or set whose keys are names of plug-ins asks too, as soon as something is looked up in it.
    """
    for node in ast.walk(module):
        names: list[str] = []
        if isinstance(node, ast.Compare):
            for operand in (node.left, *node.comparators):
                names += [*constants(operand), last_name(operand)]
        elif isinstance(node, ast.Dict | ast.Set):
            names += constants(node)
        elif isinstance(node, ast.MatchValue):
            names += constants(node.value)
        elif isinstance(node, ast.MatchClass):
            names.append(last_name(node.cls))
        elif isinstance(node, ast.Call) and last_name(node.func) in ("isinstance", "issubclass"):
            kinds = node.args[1]
            names += map(last_name, kinds.elts if isinstance(kinds, ast.Tuple) else [kinds])
        elif isinstance(node, ast.Call) and last_name(node.func) in ("startswith", "endswith", "removeprefix"):
            names += [name for argument in node.args for name in constants(argument)]
        line = getattr(node, "lineno", 0)
        yield from ((line, name) for name in names)


def identities(module: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and attribute, wherever what a plug-in is called is compared with something."""
    for node in ast.walk(module):
        if isinstance(node, ast.Compare):
            for operand in (node.left, *node.comparators):
                if isinstance(operand, ast.Attribute) and operand.attr in IDENTITY:
                    owner = last_name(operand.value)
                    if owner in PLUGIN_NOUNS:
                        yield node.lineno, f"{owner}.{operand.attr}"


def test_nobody_asks_a_plugin_who_it_is():
    """What others need to know of a plug-in is an attribute or a method of its protocol."""
    owners = registered()
    own_files = set().union(*owners.values())
    faults = []
    for path in SHIPPED:
        name = name_of(path)
        if any(fnmatch(name, pattern) for pattern in OTHER_MEANINGS):
            continue
        asked = [(line, word) for line, word in questions(tree(path)) if path not in owners.get(word, {path})]
        if path not in own_files and name not in REGISTRIES:
            asked += identities(tree(path))
        faults += [f"{name}:{line}: asks for {word}" for line, word in asked]
    assert not faults, "\n".join(faults)


def test_every_kind_of_plugin_is_known():
    """The search is worth nothing where it knows no names."""
    names = registered()
    for name in ("int4-g128", "nf4", "int8-token", "gptq", "compressed-tensors", "triton-int4"):
        assert name in names


@pytest.mark.parametrize(
    "question",
    [
        'scheme == "nf4"',
        'config["quant_method"] in ("gptq", "awq")',
        "isinstance(method, (GPTQ, Absmax))",
        "type(method) is GPTQ",
        'name.startswith("nf4")',
        '{"nf4": 4.5}[scheme.name]',
        'match name:\n    case "gptq":\n        pass',
        "match method:\n    case GPTQ():\n        pass",
    ],
)
def test_questions_are_seen(question: str):
    assert {"nf4", "gptq", "GPTQ"} & {name for _, name in questions(ast.parse(question))}


@pytest.mark.parametrize("question", ["layer.scheme.code != x", "fmt.quant_method == method", "kernel.name in names"])
def test_identities_are_seen(question: str):
    assert list(identities(ast.parse(question)))


# Words that the code had a private meaning for; the field's own words stand in their place. An ordinary English word
# is refused as a name alone, the others in docstrings too.
PRIVATE = {
    "press": "quantize", "walk": "block runner", "witness": "reference logits", "parcel": "bundle",
    "shipment": "upload", "quicken": "optimize", "foreign": "external", "sibling": "joined projections",
}  # fmt: skip
PRIVATE_NAMES = {"marks": "fingerprint", "ways": "usage snippets", **PRIVATE}
NOT_NOUNS = {"found", "given", "made", "told", "there"}  # as a whole name: it says nothing of what it holds
PRIVATE_PHRASES = ("made elsewhere", "is known by", "whomever")
FORMS = ("", "s", "es", "ed", "ing")


def bound_names(module: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every function, class, argument, variable and attribute that a file defines."""
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def docstrings(module: ast.AST) -> Iterator[tuple[str, str]]:
    """What has a docstring, and the docstring."""
    for node in ast.walk(module):
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", "the module"), text


def words(name: str) -> list[str]:
    """_WriteHTMLPages -> ["write", "html", "pages"]"""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


@each(SHIPPED)
def test_names_are_the_fields(path: Path):
    refused = {word + form: better for word, better in PRIVATE_NAMES.items() for form in FORMS}
    faults = []
    for line, name in bound_names(tree(path)):
        faults += [f"line {line}: {name}: say {refused[word]}" for word in words(name) if word in refused]
        if name in NOT_NOUNS:
            faults.append(f"line {line}: {name}: name what it holds")
    assert not faults, "\n".join(faults)


@each(SHIPPED)
def test_docstrings_are_plain_english(path: Path):
    refused = {word + form: better for word, better in PRIVATE.items() for form in FORMS}
    faults = []
    for owner, text in docstrings(tree(path)):
        prose = " ".join(text.split())
        faults += [f"{owner}: {word}: say {refused[word]}" for word in re.findall(r"\w+", prose) if word in refused]
        faults += [f"{owner}: {phrase!r}" for phrase in PRIVATE_PHRASES if phrase in prose]
        faults += [f"{owner}: a sentence begins with Of" for _ in re.findall(r"(?:^|[.:] )Of ", prose)]
    assert not faults, "\n".join(faults)


# CONTRIBUTING.md is read by newcomers: what it says about files is compared with them.
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MOST_FILES_OF_A_RUN = 25


def section(title: str) -> str:
    """The text under a heading of CONTRIBUTING.md, up to the next one of its level."""
    return re.split(r"^## ", CONTRIBUTING.partition(f"## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def test_the_map_has_every_file_once():
    """All but an __init__.py that holds a docstring alone. A plug-in may be in it, and need not: it is one file."""
    folder, files = "", []
    for line in re.findall(r"^    (\S+| {2}\S+) +\S", section("The map"), re.MULTILINE):
        if line.startswith(" "):
            files.append(folder + line.strip())
        else:
            folder = line
    sources = [path for path in SHIPPED if path.name != "__init__.py" or len(tree(path).body) > 1]
    sources += (ROOT / "kernels" / "cpu" / "csrc").iterdir()
    plugins = set().union(*registered().values())
    assert len(files) == len(set(files))
    assert {name_of(path) for path in sources if path not in plugins} <= set(files) <= set(map(name_of, sources))


def test_the_way_of_a_run_is_short():
    steps = re.findall(r"^\d+\. `([^`]+)`", section("The way of a run"), re.MULTILINE)
    assert 0 < len(steps) <= MOST_FILES_OF_A_RUN
    assert len(set(steps)) == len(steps)
    assert all((ROOT / step).is_file() for step in steps)


@pytest.mark.parametrize("top", FOLDERS)
def test_the_table_of_imports_is_the_one_that_holds(top: str):
    row = re.search(rf"^\| `{top}` \| (.+) \|$", section("Who may import whom"), re.MULTILINE)
    assert row is not None
    assert row[1].replace("→", "->") == ORDER[top].removeprefix("package -> pipeline -> ")


def excerpts() -> list[tuple[str, list[str]]]:
    """File and lines of each `From `file`:` in CONTRIBUTING.md."""
    found = re.findall(r"From\s`([^`]+)`[^\n]*:\n\n((?:(?: {4}.*)?\n)+)", CONTRIBUTING)
    return [(file, [line.strip() for line in block.splitlines() if line.strip()]) for file, block in found]


def test_every_kind_of_plugin_has_an_excerpt():
    assert len(excerpts()) == 10  # nine kinds, and a method's transform


@pytest.mark.parametrize(("file", "lines"), excerpts(), ids=[file for file, _ in excerpts()])
def test_excerpts_are_what_the_files_say(file: str, lines: list[str]):
    """Every line of an excerpt stands in its file, in this order; what is between them may be left out."""
    rest = iter([line.strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()])
    for line in lines:
        assert line in rest, f"{file} has no such line, or not here: {line}"
