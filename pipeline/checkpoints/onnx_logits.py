"""Logits of an ONNX model, by onnxruntime-genai alone: `python -m bitpress.pipeline.checkpoints.onnx_logits`.

Arguments: the model's folder, a safetensors file with "ids" int64 [tokens], the file to write, with "shipped" and
"exact" float32 [1, tokens, vocabulary], and for how many tokens the cache has room.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

_MODEL = "model.onnx"
_FLOAT32 = 1  # MatMulNBits' accuracy_level: inputs stay float32; 4 rounds them to 8 bits


def logits(folder: Path, ids: Any, room: int) -> Any:
    """What the model computes for all tokens at once, on the CPU."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=room)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    return generator.get_output("logits")


def with_float_inputs(folder: Path, copy: Path) -> None:
    """Make `copy`, the same model with layers that do not round their inputs. Weights are linked, not copied."""
    import onnx

    model = onnx.load(folder / _MODEL, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = _FLOAT32
    onnx.save(model, copy / _MODEL)
    for path in folder.iterdir():
        if path.name != _MODEL:
            os.link(path, copy / path.name)


def main() -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    folder, request, answer = map(Path, sys.argv[1:4])
    room = int(sys.argv[4])
    ids = load_file(request)["ids"].astype(np.int32)
    with tempfile.TemporaryDirectory(dir=folder.parent) as copy:  # on the same disk: it has links
        with_float_inputs(folder, Path(copy))
        results = {"shipped": logits(folder, ids, room), "exact": logits(Path(copy), ids, room)}
    save_file({name: np.ascontiguousarray(value, np.float32) for name, value in results.items()}, answer)


if __name__ == "__main__":
    main()
