"""Run by another program's Python, with nothing of bitpress: `python peer.py PROGRAM REQUEST.json`.

gptqmodel and transformers load a checkpoint and answer with its logits and greedy continuation; bitsandbytes quantizes
one to NF4 and has transformers save it. The answers are safetensors and JSON files named in the request.
"""

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Request = dict[str, Any]
PACKAGES = ("gptqmodel", "optimum", "llmcompressor", "compressed-tensors", "bitsandbytes", "transformers", "torch")


def load_gptqmodel(request: Request) -> Any:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with a single one it refuses to start
    from gptqmodel import BACKEND, GPTQModel

    section = json.loads((Path(request["folder"]) / "config.json").read_text())["quantization_config"]
    backend = getattr(BACKEND, f"{section['quant_method'].upper()}_TORCH")
    return GPTQModel.load(request["folder"], device="cpu", backend=backend, dtype=request["dtype"]).model


def load_transformers(request: Request) -> Any:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=request["dtype"], device_map="cpu")
    compute_in(model, request["dtype"])
    return model


def compute_in(model: Any, dtype: torch.dtype) -> None:
    """Whatever is asked for, bitsandbytes' layers compute in the dtypes that the files name, their fused CPU kernel in
    bfloat16, to which it rounds the scales too; and beside them transformers leaves everything in the files' dtype.

    Nothing becomes narrower: nvfp4's global scales are float32, and its weights are made of them at the first forward.
    """
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = module.weight.quant_state.dtype = dtype
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.element_size() <= dtype.itemsize:
            parameter.data = parameter.data.to(dtype)


def write_bitsandbytes(request: Request) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=request["double"],
        bnb_4bit_compute_dtype=request["dtype"],
    )
    model = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype="auto", quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(request["output"])
    AutoTokenizer.from_pretrained(request["model"]).save_pretrained(request["output"])


@torch.inference_mode()
def answer(model: Any, request: Request) -> dict[str, torch.Tensor]:
    ids = load_file(request["ids"])["ids"]
    model.eval()
    logits = model(input_ids=ids, use_cache=False).logits
    # never stops early, so that all 32 tokens are compared
    greedy = model.generate(
        input_ids=ids[:1], do_sample=False, max_new_tokens=request["tokens"], min_new_tokens=request["tokens"]
    )
    return {"logits": logits.float().contiguous(), "greedy": greedy[0, ids.shape[1] :].contiguous()}


def installed() -> dict[str, str]:
    """Package -> version, of those that are installed here."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def main() -> None:
    program, request = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    request["dtype"] = getattr(torch, request["dtype"])
    if program == "bitsandbytes":
        write_bitsandbytes(request)
    else:
        model = load_gptqmodel(request) if program == "gptqmodel" else load_transformers(request)
        save_file(answer(model, request), request["output"])
    Path(request["answer"]).write_text(json.dumps({"versions": installed()}))


if __name__ == "__main__":
    main()
