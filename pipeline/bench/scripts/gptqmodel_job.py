"""GPTQModel's part in a comparison, run by the Python that has it: bench/programs.py has the request's keys.

Options: "desc_act" (activation order), "format" ("gptq" or "gptq_v2").
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    # Its default is half the cores, and with a single worker it refuses to start: on two cores or fewer.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, ((os.cpu_count() or 1) + 1) // 2)))
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    request = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(request["seed"])
    options = {"desc_act": False, "format": "gptq", **request["options"]}
    config = QuantizeConfig(
        bits=request["bits"],
        group_size=request["group_size"] or -1,
        sym=request["symmetric"],
        desc_act=options["desc_act"],
        format=options["format"],
    )
    windows = load_file(request["tokens"])["ids"]
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    start = time.perf_counter()
    model = GPTQModel.load(request["model"], config)
    model.quantize(rows, batch_size=request["batch"])
    model.save(request["output"])
    seconds = time.perf_counter() - start
    AutoTokenizer.from_pretrained(request["model"]).save_pretrained(request["output"])
    versions = {name: version(name) for name in ("gptqmodel", "torch", "transformers")}
    Path(request["answer"]).write_text(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main()
