"""Run by Python with onnxruntime-genai, with nothing of bitpress: `python genai.py genai REQUEST.json`.

Loads an ONNX model, and writes logits and greedy tokens of the request's prompts.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from safetensors.numpy import load_file, save_file

Array = np.ndarray[Any, Any]


def generator_of(model: Any, rows: int, length: int) -> Any:
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(batch_size=rows, max_length=length, min_length=length)
    return genai.Generator(model, parameters)


def answer(model: Any, ids: Array, tokens: int) -> dict[str, Array]:
    """The logits of all prompts, and the tokens that follow the first one."""
    prompts = generator_of(model, len(ids), ids.shape[1] + 1)
    prompts.append_tokens(ids)
    logits = np.array(prompts.get_output("logits"), np.float32)
    one = generator_of(model, 1, ids.shape[1] + tokens)
    one.append_tokens(ids[:1])
    for _ in range(tokens):
        one.generate_next_token()
    return {"logits": logits, "greedy": np.array(one.get_sequence(0)[ids.shape[1] :], np.int64)}


def main() -> None:
    request = json.loads(Path(sys.argv[2]).read_text())
    ids = load_file(request["ids"])["ids"].astype(np.int32)
    save_file(answer(genai.Model(request["folder"]), ids, request["tokens"]), request["output"])
    versions = {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")}
    Path(request["answer"]).write_text(json.dumps({"versions": versions}))


if __name__ == "__main__":
    main()
