"""llama.cpp's part in `bitpress bench decode`. The Python that has llama-cpp-python runs it.

A request is a line of JSON on standard input, its answer one on standard output; the end of the input ends the process.

    {"do": "load", "path": "model.gguf", "threads": 2, "batch": 8, "prompt": 512, "generate": 64}
        -> {"versions": {package: version}}
    {"do": "run", "batch": 8, "prompt": 512, "generate": 64}
        -> {"prefill": seconds, "decode": seconds}, as llama.cpp's own benchmarks measure them: llama_decode of random
           tokens, first all prompts, then one token of each sequence at a time; nothing is sampled
"""

import ctypes
import json
import random
import sys
import time
from importlib.metadata import version
from typing import Any

_PIECE = 512  # tokens that one graph computes, llama.cpp's default


class Model:
    """A model in llama.cpp, with room for a batch of sequences."""

    def __init__(self, request: dict[str, Any]):
        import llama_cpp

        self.api = api = llama_cpp
        self.silent = api.llama_log_callback(lambda level, text, data: None)  # kept: C calls it
        api.llama_log_set(self.silent, ctypes.c_void_p(0))
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(request["path"].encode(), api.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"it cannot load {request['path']}")
        batch, length = request["batch"], request["prompt"] + request["generate"]
        options = api.llama_context_default_params()
        options.n_ctx, options.n_seq_max = batch * (length + 16), batch
        options.n_batch, options.n_ubatch = batch * request["prompt"], _PIECE
        options.n_threads = options.n_threads_batch = request["threads"]
        self.context = api.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"no memory for {batch} sequences of {length} tokens")
        self.words = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.room = api.llama_batch_init(options.n_batch, 0, 1)

    def decode(self, batch: int, start: int, count: int) -> None:
        """`count` random tokens of each sequence, from place `start` on; logits of the last of each."""
        room = self.room
        room.n_tokens = batch * count
        for at in range(batch * count):
            sequence, place = divmod(at, count)
            room.token[at], room.pos[at] = random.randrange(self.words), start + place
            room.n_seq_id[at], room.seq_id[at][0] = 1, sequence
            room.logits[at] = place == count - 1
        if status := self.api.llama_decode(self.context, room):
            raise RuntimeError(f"llama_decode returned {status}")
        self.api.llama_synchronize(self.context)

    def run(self, batch: int, prompt: int, generate: int) -> dict[str, float]:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        start = time.perf_counter()
        self.decode(batch, 0, prompt)
        middle = time.perf_counter()
        for step in range(generate):
            self.decode(batch, prompt + step, 1)
        return {"prefill": middle - start, "decode": time.perf_counter() - middle}


def main() -> None:
    model: Model | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {"failed": f"no such request: {request['do']}"}
        try:
            if request["do"] == "load":
                model = Model(request)
                answer = {"versions": {"llama-cpp-python": version("llama-cpp-python")}}
            elif model is not None and request["do"] == "run":
                answer = model.run(request["batch"], request["prompt"], request["generate"])
        except RuntimeError as error:
            answer = {"failed": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
