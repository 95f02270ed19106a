"""AutoRound's part in a comparison, run by the Python that has it: bench/programs.py has the request's keys.

Options: "iters" (steps of each block; 200 is its default), "format" ("auto_gptq" or another of its own).
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    import torch
    from auto_round import AutoRound
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    request = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(request["seed"])
    options = {"iters": 200, "format": "auto_gptq", **request["options"]}
    windows = load_file(request["tokens"])["ids"]
    rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows]
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.perf_counter()
    rounding = AutoRound(
        model=AutoModelForCausalLM.from_pretrained(request["model"], dtype="auto"),
        tokenizer=tokenizer,
        bits=request["bits"],
        group_size=request["group_size"] or -1,
        sym=request["symmetric"],
        iters=options["iters"],
        seqlen=windows.shape[1],
        nsamples=len(windows),
        batch_size=request["batch"],
        dataset=torch.utils.data.DataLoader(rows, batch_size=request["batch"]),
        device_map=device,
        seed=request["seed"],
    )
    _, folders = rounding.quantize_and_save(request["output"], format=options["format"])
    seconds = time.perf_counter() - start
    written = Path(folders[0] if isinstance(folders, list) else folders)
    output = Path(request["output"])
    if written != output:  # AutoRound may add a folder of its own below the one that it is given
        for path in list(written.iterdir()):
            path.rename(output / path.name)
        written.rmdir()
    tokenizer.save_pretrained(output)
    versions = {name: version(name) for name in ("auto-round", "torch", "transformers")}
    Path(request["answer"]).write_text(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main()
