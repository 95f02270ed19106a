"""Everything that is to be known of the kernels on a GPU: are they right, how fast are they, how fast is a model.

    python tests/benchmarks/gpu.py --output FOLDER              # all, each part in a process of its own
    python tests/benchmarks/gpu.py check --scheme int4-g128     # one part
    python tests/benchmarks/gpu.py kernels --scheme nf4 --rows 1,16,2048 --shape 8192x8192
    python tests/benchmarks/gpu_llama.py --scheme int4-g128     # the model alone

`check` multiplies by every kernel of the registry in every configuration that it would time, compares with float64,
looks for bits that change from run to run, and captures a CUDA graph. `kernels` is `bitpress bench kernels` where there
are torch and Triton alone. Its roofline is the longer of two times: for the bytes at the bandwidth of a copy, for
the products at the best rate of torch's bfloat16 product, both measured. A part that crashes or runs out of time is
reported, and the others go on.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import uninstalled  # noqa: F401
from torch import Tensor

from bitpress.kernels.base import Kernel
from bitpress.kernels.bench.entrants import DENSE, entrants
from bitpress.kernels.bench.measure import Cell, Job, Result, measure, random_weight
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.registry import registry
from bitpress.kernels.scheme import Scheme

SCHEMES = ("int4-g128", "int8-dynamic", "nf4", "fp8-dynamic", "fp8-block")
CHECKED = (
    "int4-g32", "int4-g64-asym", "int4-g96", "int4-g128", "int4-channel-asym", "int3-g128", "int8-dynamic",
    "int8-channel", "nf4", "nf4-dq", "fp8", "fp8-b128", "fp8-dynamic", "fp8-block", "fp8-static",
)  # fmt: skip
SHAPES = "4096x4096,6144x4096,14336x4096,28672x4096,4096x14336,8192x8192,28672x8192,8192x28672"
ROWS = "1,2,4,8,16,32,64,128,512,2048,4096"
CHECKED_SHAPES = ((13, 576), (129, 128), (1000, 4224), (4096, 4096))  # few: a divisor of 16 is another program
CHECKED_ROWS = (1, 9, 20, 33, 130, 1030)
TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # relative RMS: an output's rounding, some weights'


def check(options: argparse.Namespace) -> int:
    """How many products were wrong."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # so that empty memory is NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    wrong = 0
    for name in options.scheme or CHECKED:
        scheme = Scheme.parse(name)
        for shape in CHECKED_SHAPES if options.device == "cuda" else CHECKED_SHAPES[:2]:
            if scheme.problems(shape):
                continue
            q = random_weight(scheme, shape, torch.device(options.device))
            for kernel in registry():
                if kernel.name != "reference" and (scheme.activations or kernel.input_bits is None):
                    wrong += sum(check_kernel(kernel, q, dtype) for dtype in TOLERANCE)
    print(f"check: {wrong} products are wrong" if wrong else "check: all products are right", flush=True)
    return wrong


def check_kernel(kernel: Kernel, q: QTensor, dtype: torch.dtype) -> int:
    """How many of its products were wrong; the worst, and what happened, is printed."""
    where = f"{kernel.name}, {q.scheme.name}, {q.shape[0]}x{q.shape[1]}, {dtype}"
    if kernel.unsupported(q, dtype, q.codes.device):
        return 0
    worst, wrong = 0.0, 0
    try:
        packed = kernel.pack(q, dtype)
        for rows in CHECKED_ROWS:
            x = torch.randn(rows, q.shape[1], generator=torch.Generator().manual_seed(rows)).to(q.codes.device, dtype)
            bias = torch.randn(q.shape[0], generator=torch.Generator().manual_seed(0)).to(q.codes.device)
            for number in each_configuration(kernel):
                found = [kernel.linear(x, packed, bias) for _ in range(2)]
                error = relative(found[0], q, x, bias)
                worst = max(worst, error)
                if not error <= TOLERANCE[dtype]:
                    wrong += 1
                    print(f"WRONG: {where}, {rows} rows, configuration {number}: relative RMS {error:.2g}", flush=True)
                if not torch.equal(*found) and not kernel.name.startswith(("torch", "bnb")):
                    wrong += 1
                    print(f"CHANGES from run to run: {where}, {rows} rows, configuration {number}", flush=True)
        if x.is_cuda:
            wrong += check_graph(kernel, packed, x[:1], where)
    except Exception:
        print(f"FAILED: {where}\n{traceback.format_exc()}", flush=True)
        return wrong + 1
    print(f"{where}: at most {worst:.2g}", flush=True)
    return wrong


def each_configuration(kernel: Kernel) -> Iterator[int]:
    """Meanwhile, the kernel takes its first configuration, its second … instead of the fastest."""
    module = importlib.import_module(type(kernel).__module__)
    if not hasattr(module, "choose"):
        yield 0
        return
    choose, most, number = module.choose, 1, 0

    def nth(name: str, bucket: str, configs: Any, run: Any, device: torch.device) -> Any:
        nonlocal most
        most = max(most, len(configs))
        return configs[min(number, len(configs) - 1)]

    module.choose = nth
    try:
        while number < most:
            yield number
            number += 1
    finally:
        module.choose = choose


def check_graph(kernel: Kernel, packed: torch.nn.Module, x: Tensor, where: str) -> int:
    """The same product from a CUDA graph whose input changed after it was captured."""
    kernel.linear(x, packed, None)
    held = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.linear(held, packed, None)
    held.copy_(2 * x)
    graph.replay()
    if torch.equal(y, kernel.linear(2 * x, packed, None)):
        return 0
    print(f"WRONG in a CUDA graph: {where}", flush=True)
    return 1


def relative(found: Tensor, q: QTensor, x: Tensor, bias: Tensor | None) -> float:
    """RMS error, relative to the larger of the product and of what independent terms would add up to."""
    inputs = x.double()
    if q.scheme.activations:
        inputs = q.scheme.activations.apply(x, dict(q.tensors())).double()
    weight = q.dequantize().double().t()
    expected = inputs @ weight if bias is None else inputs @ weight + bias.double()
    terms = (inputs.square() @ weight.square()).sqrt()
    return float((found.double() - expected).norm() / torch.maximum(expected.norm(), terms.norm()))


def kernels(options: argparse.Namespace) -> int:
    """Tables, and every sample as JSON; stops in time, with what there is."""
    until = time.monotonic() + options.seconds
    shapes = tuple((int(a), int(b)) for a, b in (text.split("x") for text in options.shape.split(",")))
    rows = tuple(int(count) for count in options.rows.split(","))
    cells: list[Cell] = []
    for name in options.scheme or SCHEMES:
        for shape in shapes:
            job = Job(torch.device(options.device), (Scheme.parse(name),), (shape,), rows, options.repeats)
            group = []
            for cell in measure(entrants(), job, lambda news: None):
                group.append(cell)
                if time.monotonic() > until:
                    break
            print("\n".join(table(group)), flush=True)
            cells += group
            if options.json:
                options.json.write_text(json.dumps([each.to_dict() for each in cells]))
            if time.monotonic() > until:
                print("out of time: what is missing was not measured", flush=True)
                return 1
    return 0


def table(cells: list[Cell]) -> list[str]:
    """Of one scheme and shape, in Markdown: microseconds, and what they are in comparison."""
    names = list(dict.fromkeys(result.name for cell in cells for result in cell.results))
    others = [name for name in names if name in (DENSE, "torch-int4", "torch-int8", "bnb-nf4")]
    best = max((cell.gops(r) for cell in cells for r in cell.results if r.name == DENSE and r.samples), default=0.0)
    header = ["rows", "kernel", "µs", "p10–p90", "GB/s", "of memory", "TFLOPS", "of roofline", "error"]
    header += [f"x {name}" for name in others]
    lines = [f"\n{cells[0].scheme}, {cells[0].shape[0]} x {cells[0].shape[1]}", " | ".join(header)]
    for cell in cells:
        for result in cell.results:
            if not result.samples:
                lines.append(f"{cell.rows} | {result.name} | {result.problem}")
                continue
            low, middle, high = (result.seconds(q) * 1e6 for q in (0.1, 0.5, 0.9))
            figures = [
                str(cell.rows), result.name, f"{middle:.2f}", f"{low:.2f}–{high:.2f}",
                f"{result.bytes_per_second / 1e9:.0f}", f"{cell.share(result):.0%}", f"{cell.gops(result) / 1e3:.1f}",
                f"{roofline(cell, result, best):.0%}", f"{result.error:.2%}",
            ]  # fmt: skip
            ratios = [cell.ratio(result, name) for name in others]
            lines.append(" | ".join([*figures, *(f"{ratio:.2f}" if ratio else "–" for ratio in ratios)]))
    absent = {name: why for cell in cells for name, why in cell.absent.items()}
    return [*lines, *(f"{name}: {why}" for name, why in absent.items() if not name.startswith("native"))]


def roofline(cell: Cell, result: Result, best: float) -> float:
    """best: 10^9 operations per second."""
    by_memory = result.moved / cell.memory.bytes_per_second
    by_products = 2 * cell.rows * cell.shape[0] * cell.shape[1] / (best * 1e9) if best else 0.0
    return max(by_memory, by_products) / result.seconds()


def everything(options: argparse.Namespace) -> int:
    """How many parts failed."""
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    here, small = Path(__file__), ["--device", options.device]
    parts = {f"check-{name}": [here, "check", "--scheme", name, *small] for name in CHECKED}
    for name in SCHEMES:
        rest = ["--scheme", name, "--seconds", str(options.seconds), "--json", folder / f"{name}.json", *small]
        parts[f"kernels-{name}"] = [here, "kernels", "--shape", options.shape, "--rows", options.rows, *rest]
    for name in ("bf16", *SCHEMES):
        for extra in ([],) if name == "bf16" else ([], ["--joined"]):
            command = [here.with_name("gpu_llama.py"), "--scheme", name, "--shape", options.model, *extra, *small]
            parts[f"llama-{name}{''.join(extra)}"] = [*command, "--batch", "1", "16"]
    failed = 0
    for name, command in parts.items():
        print(f"\n=== {name}", flush=True)
        with (folder / f"{name}.txt").open("w") as log:
            outcome = run([sys.executable, "-u", *map(str, command)], log, options.seconds + 120)
        print((folder / f"{name}.txt").read_text().strip()[-6000:], flush=True)
        if outcome:
            failed += 1
            print(f"=== {name}: {outcome}", flush=True)
    print(f"\n{failed} of {len(parts)} parts failed" if failed else f"\nall {len(parts)} parts ran", flush=True)
    return failed


def run(command: list[str], log: Any, limit: float) -> str | None:
    """What went wrong, if anything did."""
    try:
        outcome = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} seconds"
    return f"exit code {outcome.returncode}" if outcome.returncode else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["check", "kernels"])
    parser.add_argument("--scheme", action="append")
    parser.add_argument("--shape", default=SHAPES)
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--model", default="8b", help="of gpu_llama.py")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=240, help="for one part")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=Path("runs", "gpu"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        triton = importlib.import_module("triton").__version__
        print(f"{properties.name}, {properties.multi_processor_count} multiprocessors, torch {torch.__version__}, "
              f"CUDA {torch.version.cuda}, Triton {triton}", flush=True)  # fmt: skip
    parts = {"check": check, "kernels": kernels, None: everything}
    sys.exit(1 if parts[options.part](options) else 0)


if __name__ == "__main__":
    main()
