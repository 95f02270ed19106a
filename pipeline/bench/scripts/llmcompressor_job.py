"""llm-compressor's part in a comparison, run by the Python that has it: bench/programs.py has the request's keys.

Options: "algorithm" ("gptq" or "rtn"), "int8_activations" (W8A8, per token).
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def weights_of(request: dict[str, Any]) -> dict[str, Any]:
    grouped = {"strategy": "group", "group_size": request["group_size"]} if request["group_size"] else {}
    return {
        "num_bits": request["bits"],
        "type": "int",
        "symmetric": request["symmetric"],
        "strategy": "channel",
        **grouped,
    }


def main() -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    request = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(request["seed"])
    options = {"algorithm": "gptq", "int8_activations": False, **request["options"]}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights_of(request)}
    if options["int8_activations"]:
        group["input_activations"] = {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    modifier = GPTQModifier if options["algorithm"] == "gptq" else QuantizationModifier
    recipe = modifier(config_groups={"group_0": group}, ignore=["lm_head"])
    windows = load_file(request["tokens"])["ids"]
    rows = Dataset.from_list([{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows])
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype="auto")
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=rows,
        recipe=recipe,
        max_seq_length=windows.shape[1],
        num_calibration_samples=windows.shape[0],
        output_dir=request["output"],
    )
    seconds = time.perf_counter() - start
    names = ("llmcompressor", "compressed-tensors", "torch", "transformers")
    versions = {name: version(name) for name in names}
    Path(request["answer"]).write_text(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main()
