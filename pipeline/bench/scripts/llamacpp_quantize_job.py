"""llama.cpp's part in `bitpress bench quality`. The Python that has llama-cpp-python runs it.

A request is a line of JSON on standard input, its answer one on standard output; the end of the input ends the process.

    {"do": "quantize", "source": "model.gguf", "output": "small.gguf", "type": "Q4_K_M", "threads": 2,
     "importance": .npz file: a tensor's name -> float32 [in], how much each of its inputs matters; or null}
        -> {"seconds": of quantizing, "versions": {package: version}}
    {"do": "load", "path": "small.gguf", "threads": 2, "context": 512} -> {}
    {"do": "logits", "ids": [token, …], "output": .npy file to write: float32 [tokens, vocabulary]} -> {}
"""

import ctypes
import json
import sys
import time
from importlib.metadata import version
from typing import Any

import numpy

_NUMBER_OF_TYPE = "LLAMA_FTYPE_MOSTLY_"


def api() -> Any:
    """llama.cpp's functions, its lines of news left out."""
    import llama_cpp

    if not hasattr(llama_cpp, "silent"):
        llama_cpp.silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: C calls it
        llama_cpp.llama_log_set(llama_cpp.silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
    return llama_cpp


def quantize(request: dict[str, Any]) -> dict[str, Any]:
    llama = api()
    options = llama.llama_model_quantize_default_params()
    options.ftype = getattr(llama, f"{_NUMBER_OF_TYPE}{request['type']}")
    options.nthread = request["threads"]
    if request["importance"]:
        loaded = numpy.load(request["importance"])
        arrays = {name: numpy.ascontiguousarray(loaded[name], numpy.float32) for name in loaded.files}
        kind = llama.llama_model_imatrix_data
        data = (kind * (len(arrays) + 1))()  # a name of nothing ends it
        for place, (name, values) in zip(data, arrays.items()):
            place.name, place.size = name.encode(), values.size
            place.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        options.imatrix = ctypes.cast(data, ctypes.POINTER(kind))
    start = time.perf_counter()
    status = llama.llama_model_quantize(request["source"].encode(), request["output"].encode(), ctypes.byref(options))
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status} for {request['type']}")
    return {"seconds": time.perf_counter() - start, "versions": {"llama-cpp-python": version("llama-cpp-python")}}


class Model:
    """A model in llama.cpp that gives the logits of every token of a window."""

    def __init__(self, request: dict[str, Any]):
        self.llama = llama = api()
        self.model = llama.llama_model_load_from_file(request["path"].encode(), llama.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"it cannot load {request['path']}")
        options = llama.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = request["context"]
        options.n_threads = options.n_threads_batch = request["threads"]
        self.context = llama.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"no memory for {request['context']} tokens")
        self.words = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.room = llama.llama_batch_init(request["context"], 0, 1)

    def close(self) -> None:
        self.llama.llama_batch_free(self.room)
        self.llama.llama_free(self.context)
        self.llama.llama_model_free(self.model)

    def logits(self, request: dict[str, Any]) -> dict[str, Any]:
        ids, room = request["ids"], self.room
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        room.n_tokens = len(ids)
        for place, token in enumerate(ids):
            room.token[place], room.pos[place] = token, place
            room.n_seq_id[place], room.seq_id[place][0] = 1, 0
            room.logits[place] = True
        if status := self.llama.llama_decode(self.context, room):
            raise RuntimeError(f"llama_decode returned {status}")
        values = numpy.ctypeslib.as_array(self.llama.llama_get_logits(self.context), (len(ids), self.words))
        numpy.save(request["output"], values)
        return {}


def main() -> None:
    model: Model | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {"failed": f"no such request: {request['do']}"}
        try:
            if request["do"] == "quantize":
                answer = quantize(request)
            elif request["do"] == "load":
                if model is not None:
                    model.close()
                model, answer = Model(request), {}
            elif request["do"] == "logits" and model is not None:
                answer = model.logits(request)
        except (RuntimeError, AttributeError, OSError) as error:
            answer = {"failed": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
