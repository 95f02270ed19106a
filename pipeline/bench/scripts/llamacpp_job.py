"""llama.cpp's part in the kernel benchmark. The Python that has llama-cpp-python runs it; requests come line by line.

A process of its own, because its OpenMP threads and PyTorch's would wait for each other's cores in a busy loop. A
request is a line of JSON on standard input, its answer one on standard output; the end of the input ends the process.

    {"do": "load", "type": "q4_0", "out": 4096, "in": 4096, "copies": 16, "threads": 2, "skip": []}
        -> {"versions": {package: version}, "layout": the name of ggml's buffers for it, not one of "skip"; "nbytes"}
    {"do": "check", "rows": 8}                  -> {"error": relative RMS error of a product}
    {"do": "sample", "rows": 8, "calls": 20}    -> {"seconds": per product}
"""

import ctypes
import importlib.util
import itertools
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy

_TYPES = {"f32": 0, "q4_0": 2, "q8_0": 8, "iq4_nl": 20}  # ggml.h, enum ggml_type
_TILE = 64  # output features of random weights; they are repeated, for quantizing to iq4_nl takes long
_SLACK = 64  # tensors beyond the weights that a context has room for
_ALIGNMENT = 64  # bytes, ggml's buffers on CPUs


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_P, _I, _L, _S = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_BASE: dict[str, tuple[Any, list[Any]]] = {  # function -> result, arguments; from ggml.h and ggml-backend.h
    "ggml_init": (_P, [_InitParams]),
    "ggml_free": (None, [_P]),
    "ggml_version": (ctypes.c_char_p, []),
    "ggml_tensor_overhead": (_S, []),
    "ggml_graph_overhead_custom": (_S, [_S, ctypes.c_bool]),
    "ggml_row_size": (_S, [_I, _L]),
    "ggml_new_tensor_2d": (_P, [_P, _I, _L, _L]),
    "ggml_mul_mat": (_P, [_P, _P, _P]),
    "ggml_new_graph_custom": (_P, [_P, _S, ctypes.c_bool]),
    "ggml_build_forward_expand": (None, [_P, _P]),
    "ggml_quantize_chunk": (_S, [_I, _P, _P, _L, _L, _L, _P]),
    "ggml_backend_reg_dev_get": (_P, [_P, _S]),
    "ggml_backend_reg_get_proc_address": (_P, [_P, ctypes.c_char_p]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [_P, _P]),
    "ggml_backend_cpu_buffer_type": (_P, []),
    "ggml_backend_buft_name": (ctypes.c_char_p, [_P]),
    "ggml_backend_buft_alloc_buffer": (_P, [_P, _S]),
    "ggml_backend_buft_get_alloc_size": (_S, [_P, _P]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, [_P, _P]),
    "ggml_backend_buffer_get_base": (_P, [_P]),
    "ggml_backend_buffer_free": (None, [_P]),
    "ggml_backend_tensor_alloc": (_I, [_P, _P, _P]),
    "ggml_backend_tensor_set": (None, [_P, _P, _S, _S]),
    "ggml_backend_graph_compute": (_I, [_P, _P]),
}
_CPU: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_cpu_init": (_P, []),
    "ggml_backend_cpu_set_n_threads": (None, [_P, _I]),
    "ggml_backend_cpu_reg": (_P, []),
}


def libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """ggml's base and CPU libraries from the package, which itself stays unimported: it loads all of llama.cpp."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise RuntimeError("no package llama_cpp here")
    folder, ending = Path(spec.origin).parent / "lib", {"darwin": "dylib"}.get(sys.platform, "so")
    loaded = []
    for name, functions in (("ggml-base", _BASE), ("ggml-cpu", _CPU)):
        path = folder / f"lib{name}.{ending}"
        if not path.exists():
            raise RuntimeError(f"no {path.name} in {folder}")
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        for function, (result, arguments) in functions.items():
            getattr(library, function).restype = result
            getattr(library, function).argtypes = arguments
        loaded.append(library)
    return loaded[0], loaded[1]


class Weight:
    """One weight [out, in] in `copies`, in the layout that llama.cpp's loader would pick, and products with it."""

    def __init__(self, request: dict[str, Any]):
        self.base, self.cpu = libraries()
        self.type, self.name = _TYPES[request["type"]], request["type"]
        self.out_features, self.in_features, self.copies = request["out"], request["in"], request["copies"]
        self.backend = self.cpu.ggml_backend_cpu_init()
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, request["threads"])
        self.tile = self._tile()
        kinds = [kind for kind in self._buffer_types() if self._named(kind) not in request["skip"]]
        self.buffer_type = next(filter(self._place, kinds), 0)
        if not self.buffer_type:
            raise RuntimeError(f"no layout is left but {', '.join(request['skip'])}")
        for weight in self.weights:
            self.base.ggml_backend_tensor_set(weight, self.codes, 0, len(self.codes))
        self.turns = itertools.cycle(self.weights)
        self.held: dict[int, tuple[int, Any]] = {}

    def _tile(self) -> Any:
        """Sets self.codes, all of the weight's bytes; returns the tile's values after quantization, float32."""
        tile = numpy.random.default_rng(0).standard_normal((_TILE, self.in_features), dtype=numpy.float32)
        row = self.base.ggml_row_size(self.type, self.in_features)
        codes = ctypes.create_string_buffer(_TILE * row)
        self.base.ggml_quantize_chunk(self.type, tile.ctypes.data, codes, 0, _TILE, self.in_features, None)
        dequantize = getattr(self.base, f"dequantize_row_{self.name}")
        dequantize.restype, dequantize.argtypes = None, [_P, _P, _L]
        dequantize(codes, tile.ctypes.data, tile.size)
        self.codes = (codes.raw * -(-self.out_features // _TILE))[: self.out_features * row]
        return tile

    def _buffer_types(self) -> list[int]:
        """Layouts for CPUs (AMX's, repacked, as stored), in the order in which llama.cpp's loader tries them."""
        registry = self.cpu.ggml_backend_cpu_reg()
        self.device = self.base.ggml_backend_reg_dev_get(registry, 0)
        address = self.base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        kinds: list[int] = []
        if address:
            listed = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(address)(self.device)
            while listed and (kind := listed[len(kinds)]):
                kinds.append(kind)
        return [*kinds, self.base.ggml_backend_cpu_buffer_type()]

    def _place(self, kind: int) -> bool:
        """Whether ggml multiplies by weights in buffers of this kind; sets self.weights, allocated there."""
        context = self._context(self.copies + _SLACK)
        new = self.base.ggml_new_tensor_2d
        self.weights = [new(context, self.type, self.in_features, self.out_features) for _ in range(self.copies)]
        buffer = self.base.ggml_backend_alloc_ctx_tensors_from_buft(context, kind)
        if not buffer:
            raise RuntimeError(f"no memory for {self.copies} copies")
        x = new(context, _TYPES["f32"], self.in_features, 1)
        if self.base.ggml_backend_dev_supports_op(self.device, self.base.ggml_mul_mat(context, self.weights[0], x)):
            return True
        self.base.ggml_backend_buffer_free(buffer)
        self.base.ggml_free(context)
        return False

    def _named(self, kind: int) -> str:
        return self.base.ggml_backend_buft_name(kind).decode()

    def _context(self, tensors: int) -> int:
        size = tensors * self.base.ggml_tensor_overhead() + self.base.ggml_graph_overhead_custom(tensors, False)
        return self.base.ggml_init(_InitParams(size, None, True))

    def _activations(self, rows: int) -> tuple[int, Any]:
        """ggml's buffer that holds x, and y behind it; and x as NumPy has it, float32 [rows, in]."""
        if rows not in self.held:
            x = numpy.random.default_rng(1).standard_normal((rows, self.in_features), dtype=numpy.float32)
            size = self._y_at(rows) + rows * self.out_features * x.itemsize
            buffer = self.base.ggml_backend_buft_alloc_buffer(self.base.ggml_backend_cpu_buffer_type(), size)
            ctypes.memmove(self.base.ggml_backend_buffer_get_base(buffer), x.ctypes.data, x.nbytes)
            self.held[rows] = buffer, x
        return self.held[rows]

    def _y_at(self, rows: int) -> int:
        """Bytes from x's beginning to y's."""
        size = rows * self.in_features * ctypes.sizeof(ctypes.c_float)
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    def _compute(self, rows: int, calls: int) -> float:
        """Seconds of a graph of products, one after another as in a model, each with the next copy of the weight.

        They read the same x and write the same y: a model's layers, too, use their memory again.
        """
        buffer, _ = self._activations(rows)
        at = self.base.ggml_backend_buffer_get_base(buffer)
        context = self._context(2 * calls + _SLACK)
        x = self.base.ggml_new_tensor_2d(context, _TYPES["f32"], self.in_features, rows)
        self.base.ggml_backend_tensor_alloc(buffer, x, at)
        graph = self.base.ggml_new_graph_custom(context, 2 * calls + _SLACK, False)
        for weight in itertools.islice(self.turns, calls):
            y = self.base.ggml_mul_mat(context, weight, x)
            self.base.ggml_backend_tensor_alloc(buffer, y, at + self._y_at(rows))
            self.base.ggml_build_forward_expand(graph, y)
        start = time.perf_counter()
        status = self.base.ggml_backend_graph_compute(self.backend, graph)
        seconds = time.perf_counter() - start
        self.base.ggml_free(context)
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return seconds

    def about(self) -> dict[str, Any]:
        versions = {"llama-cpp-python": version("llama-cpp-python"), "ggml": self.base.ggml_version().decode()}
        return {
            "versions": versions,
            "layout": self._named(self.buffer_type),
            "nbytes": self.base.ggml_backend_buft_get_alloc_size(self.buffer_type, self.weights[0]),
        }

    def error(self, rows: int) -> float:
        """Relative RMS of a product's difference from that of the dequantized weight in float32."""
        self._compute(rows, 1)
        buffer, x = self._activations(rows)
        product = numpy.empty((rows, self.out_features), dtype=numpy.float32)
        ctypes.memmove(
            product.ctypes.data, self.base.ggml_backend_buffer_get_base(buffer) + self._y_at(rows), product.nbytes
        )
        tiles = -(-self.out_features // _TILE)
        expected = numpy.tile(x @ self.tile.T, tiles)[:, : self.out_features]
        return float(numpy.linalg.norm(product - expected) / numpy.linalg.norm(expected))

    def seconds(self, rows: int, calls: int) -> float:
        """Seconds of one product, from a graph of `calls`; a product before it wakes the threads."""
        self._compute(rows, 1)
        return self._compute(rows, calls) / calls


def settle() -> None:
    """Wait until OpenMP's threads, which go on in a busy loop for some milliseconds, sleep: others need the cores."""
    for _ in range(500):
        before = time.process_time()
        time.sleep(0.002)
        if time.process_time() - before < 0.0005:
            return


def main() -> None:
    weight: Weight | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                weight = Weight(request)
                answer = weight.about()
            elif weight is not None and request["do"] == "check":
                answer = {"error": weight.error(request["rows"])}
            elif weight is not None:
                answer = {"seconds": weight.seconds(request["rows"], request["calls"])}
        except RuntimeError as error:
            answer = {"failed": str(error)}
        settle()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
