"""Run by the Python of mlx-lm, with nothing of bitpress: `python mlxlm.py mlx REQUEST.json`.

Loads a checkpoint as a Mac does, and writes logits and greedy tokens of the request's prompts.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import load


def answer(model: Any, request: dict[str, Any]) -> dict[str, mx.array]:
    ids = mx.load(request["ids"], format="safetensors")["ids"].astype(mx.int32)
    logits = model(ids)
    tokens = ids[:1]
    for _ in range(request["tokens"]):
        tokens = mx.concatenate([tokens, model(tokens)[:, -1].argmax(-1)[None].astype(mx.int32)], axis=1)
    return {"logits": logits.astype(mx.float32), "greedy": tokens[0, ids.shape[1] :].astype(mx.int64)}


def main() -> None:
    request = json.loads(Path(sys.argv[2]).read_text())
    model, _ = load(request["folder"])
    model.set_dtype(getattr(mx, request["dtype"]))
    mx.save_safetensors(request["output"], answer(model, request))
    versions = {name: version(name) for name in ("mlx", "mlx-cpu", "mlx-lm")}
    Path(request["answer"]).write_text(json.dumps({"versions": versions}))


if __name__ == "__main__":
    main()
