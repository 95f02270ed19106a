"""bitpress's checkpoints in other programs, and theirs in bitpress: `make interop`, which the suite leaves out.

Both sides load the same folder in processes of their own, in the same dtype, and must agree on the logits (cosine over
0.9999) and on every one of 32 greedy tokens. transformers computes in float32; GPTQModel's torch kernel knows the
16-bit types alone, of which float16 has the finer steps. bitpress uses its reference kernel, the definition of right.
One difference is known: of int8-dynamic, compressed-tensors quantizes activations by absmax / 127.5, and bitpress by
absmax / 127, as vLLM does.

llama.cpp reads other files. Every architecture of which bitpress writes these is tried in a tiny random model, to a
cosine of 0.9995, as llama.cpp rounds the inputs of its products to 8 bits. It is also given the demo's weights in
float16 and asked for the perplexity of its own protocol.
"""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import save_tiny, save_tokenizer_of_llamacpp
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import Qwen2Config

from bitpress.kernels.scheme import Scheme
from bitpress.pipeline import convert, evaluate, load, quantize
from bitpress.pipeline.bench.programs import Program, other_programs, request, run
from bitpress.pipeline.data.text import PYDOC_TOPICS, read_text
from bitpress.pipeline.data.tokens import encode
from bitpress.pipeline.hub.download import resolve
from bitpress.pipeline.methods.gptq import GPTQ
from bitpress.pipeline.models.pretrained import load_tokenizer
from bitpress.pipeline.storage.artifacts import DEMO

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TABLE = ROOT / "runs" / "interop.md"
PEER = HERE / "peer.py"
SCRIPTS = {
    "llama.cpp": HERE / "llamacpp.py",
    "mlx": HERE / "mlxlm.py",
    "genai": HERE / "genai.py",
}  # of the programs that peer.py does not load
answer: Callable[[Any, dict[str, Any]], dict[str, torch.Tensor]] = runpy.run_path(str(PEER))["answer"]

TOKENS, SIMILAR, ROUNDED = 32, 0.9999, 0.9995
CHUNKS, CHUNK = 40, 512  # of llama.cpp's perplexity
GPTQMODEL = ("gptqmodel", "gptqmodel", "float16")  # environment, what loads in it, dtype
GPTQ_TRANSFORMERS = ("gptqmodel", "transformers", "float32")
TRANSFORMERS = ("transformers", "transformers", "float32")
LLMCOMPRESSOR = ("llmcompressor", "transformers", "float32")
BFLOAT16 = ("transformers", "transformers", "bfloat16")
LLAMACPP = ("llamacpp", "llama.cpp", "float32")
MLX_LM = ("mlx", "mlx", "float32")
GENAI = ("", "genai", "float32")  # in the environment of bitpress itself, as `convert --to onnx` takes its builder

READERS = {"gptqmodel": "GPTQModel", "llama.cpp": "llama.cpp", "mlx": "mlx-lm", "genai": "onnxruntime-genai"}

BLOCK_KEPT = {"*.down_proj": "int8-g128", "model.layers.0.*": "none"}
# what the table calls it -> the recipe of a model whose layers differ
MIXED: dict[str, dict[str, Any]] = {
    "mixed": {"scheme": "int4-g128", "layers": BLOCK_KEPT},
    "mixed, all quantized": {"scheme": "int4-g128", "layers": {"*.down_proj": "int8-g128", "*.0.*": "int3-g64"}},
    "mixed, 8-bit head": {"scheme": "int4-g128", "layers": {**BLOCK_KEPT, "lm_head": "int8-channel"}},
    "mixed, 8-bit embeddings": {"scheme": "int4-g64", "layers": {**BLOCK_KEPT, "*embed_tokens": "int8-g64"}},
    "int4-g32, embeddings F16": {"scheme": "int4-g32", "dtype": "float16"},
    "mixed, 8-bit inputs": {"scheme": "int4-g128", "layers": {"*.o_proj": "int8-dynamic", **BLOCK_KEPT}},
}
# model, scheme or name of a mixed recipe, format, who loads it
OURS = [
    ("demo", "int4-g128", "gptq", GPTQMODEL),
    ("demo", "int4-g128", "gptq", GPTQ_TRANSFORMERS),
    ("demo", "int3-g128", "gptq", GPTQMODEL),
    ("demo", "int8-channel", "gptq", GPTQMODEL),
    ("qwen2", "int4-g128", "gptq", GPTQMODEL),
    ("demo", "mixed", "gptq", GPTQMODEL),
    ("demo", "mixed", "gptq", GPTQ_TRANSFORMERS),
    ("qwen2", "mixed, 8-bit head", "gptq", GPTQMODEL),
    ("demo", "int4-g128", "gptq-v2", GPTQMODEL),
    ("demo", "int4-g128-asym", "gptq-v2", GPTQMODEL),
    ("demo", "int4-g128-asym", "gptq-v2", GPTQ_TRANSFORMERS),
    ("demo", "int4-g128", "awq", GPTQMODEL),
    ("demo", "int4-g128-asym", "awq", GPTQ_TRANSFORMERS),
    ("demo", "int4-g128", "compressed-tensors", TRANSFORMERS),
    ("demo", "int3-g128", "compressed-tensors", TRANSFORMERS),
    ("demo", "int8-channel", "compressed-tensors", TRANSFORMERS),
    ("qwen2", "int4-g128", "compressed-tensors", TRANSFORMERS),
    ("demo", "int4-g128-asym", "compressed-tensors", LLMCOMPRESSOR),
    ("demo", "int4-g128-asym", "compressed-tensors", TRANSFORMERS),
    ("demo", "int8-dynamic", "compressed-tensors", TRANSFORMERS),
    ("demo", "int8-dynamic-asym", "compressed-tensors", TRANSFORMERS),
    ("demo", "int4-g128-int8-dynamic", "compressed-tensors", TRANSFORMERS),
    ("demo", "fp8-static", "compressed-tensors", TRANSFORMERS),
    ("demo", "mixed", "compressed-tensors", TRANSFORMERS),
    ("demo", "mixed, 8-bit inputs", "compressed-tensors", TRANSFORMERS),
    ("qwen2", "mixed, 8-bit head", "compressed-tensors", TRANSFORMERS),
    ("demo", "int8-static", "compressed-tensors", TRANSFORMERS),
    ("demo", "fp8-dynamic", "compressed-tensors", TRANSFORMERS),
    ("demo", "fp8-block", "compressed-tensors", TRANSFORMERS),
    ("demo", "mxfp4", "compressed-tensors", BFLOAT16),
    ("demo", "nvfp4", "compressed-tensors", BFLOAT16),
    ("demo", "fp8-tensor", "compressed-tensors", TRANSFORMERS),
    ("demo", "int4-g32", "gguf", LLAMACPP),
    ("demo", "int4-g32, embeddings F16", "gguf", LLAMACPP),
    ("demo", "int4-g32-asym", "gguf", LLAMACPP),
    ("demo", "int3-g64", "gguf", LLAMACPP),
    ("demo", "int8-g32", "gguf", LLAMACPP),
    ("demo", "mxfp4", "gguf", LLAMACPP),
    ("demo", "nvfp4", "gguf", LLAMACPP),
    ("demo", "int4-g32-asym", "gguf-q4_1", LLAMACPP),
    ("demo", "int4-g64", "mlx", MLX_LM),
    ("demo", "int3-g64-asym", "mlx", MLX_LM),
    ("demo", "mixed, 8-bit embeddings", "mlx", MLX_LM),
    ("demo", "int4-g64-asym", "awq", MLX_LM),
    ("demo", "nf4", "bitsandbytes", TRANSFORMERS),
    ("demo", "nf4-dq", "bitsandbytes", TRANSFORMERS),
    ("qwen2", "nf4", "bitsandbytes", TRANSFORMERS),
]
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 500.0}  # fmt: skip
GEMMA = {"query_pre_attn_scalar": 16}  # llama.cpp takes the size of a head
# architecture, its config's keys, scheme
IN_GGUF: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_parameters": SCALED, "head_dim": 32}, "int4-g32"),
    ("mistral", {}, "int4-g32"),
    ("mixtral", {}, "int4-g32"),
    ("mixtral", {}, "nvfp4"),
    ("qwen2", {}, "int8-g32"),
    ("qwen3", {}, "mxfp4"),
    ("qwen2_moe", {}, "int4-g32-asym"),
    ("qwen3_moe", {"norm_topk_prob": True}, "int4-g32"),
    ("gemma2", GEMMA, "int4-g32"),
    ("gemma3_text", GEMMA, "int4-g32"),
    ("phi3", {}, "int4-g32"),
]
# what fails -> what its error says, and why; once it passes, it goes out of here
REFUSED = {
    ("int4-g128-asym", "compressed-tensors", TRANSFORMERS): (
        r"weight_zero_point\s*\| MISMATCH",
        "it expects weight_zero_point unpacked, and so refuses llm-compressor's own files too",
    ),
    ("mixed", "gptq", GPTQ_TRANSFORMERS): (
        r"down_proj\.qweight\s*\| MISMATCH",
        "optimum does not read `dynamic`, and takes every layer of the blocks to have one scheme",
    ),
}

W8A8 = {"algorithm": "rtn", "int8_activations": True}
# who writes, what the table calls it, scheme, the writer's options, who reloads it
THEIRS = [
    ("gptqmodel", "gptq", "int4-g128", {}, GPTQMODEL),
    ("gptqmodel", "gptq, act-order", "int4-g128", {"desc_act": True}, GPTQMODEL),
    ("gptqmodel", "gptq", "int4-g128-asym", {}, GPTQMODEL),
    ("gptqmodel", "gptq_v2", "int4-g128", {"format": "gptq_v2"}, GPTQMODEL),
    ("gptqmodel", "gptq_v2, act-order", "int4-g128-asym", {"format": "gptq_v2", "desc_act": True}, GPTQMODEL),
    ("gptqmodel", "gptq", "int3-g128", {}, GPTQMODEL),
    ("llm-compressor", "GPTQ, pack-quantized", "int4-g128", {}, LLMCOMPRESSOR),
    ("llm-compressor", "RTN, pack-quantized", "int4-g128", {"algorithm": "rtn"}, LLMCOMPRESSOR),
    ("llm-compressor", "GPTQ, pack-quantized", "int4-g128-asym", {}, LLMCOMPRESSOR),
    ("llm-compressor", "RTN, pack-quantized", "int4-g128-asym", {"algorithm": "rtn"}, LLMCOMPRESSOR),
    ("llm-compressor", "RTN, int-quantized", "int8-dynamic", W8A8, LLMCOMPRESSOR),
    ("bitsandbytes", "bitsandbytes", "nf4", {}, TRANSFORMERS),
    ("bitsandbytes", "bitsandbytes", "nf4-dq", {}, TRANSFORMERS),
]


def python_of(environment: str) -> str:
    if not environment:
        return sys.executable
    path = ROOT / f".venv-{environment}" / "bin" / "python"
    assert path.exists(), f"{path} is missing; `make interop` makes it"
    return str(path)


def call(environment: str, program: str, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The answer of a program's script, run by the environment's Python."""
    path, answer_file = folder / "request.json", folder / "answer.json"
    path.write_text(json.dumps({**request, "answer": str(answer_file)}))
    command = [python_of(environment), str(SCRIPTS.get(program, PEER)), program, str(path)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if outcome.returncode:
        raise RuntimeError(f"{program} in {environment} failed:\n{(outcome.stdout + outcome.stderr)[-4000:]}")
    return json.loads(answer_file.read_text())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, save_model: Callable[..., Path]) -> SimpleNamespace:
    """Two models, the demo and a random Qwen2 for its biases; their prompts, and text to calibrate on."""
    folder = tmp_path_factory.mktemp("interop")
    config = Qwen2Config(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, vocab_size=256, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=255, pad_token_id=255,
    )  # fmt: skip
    demo = resolve(DEMO).folder
    models = {"demo": demo, "qwen2": save_model(config, folder / "qwen2")}
    ids = encode(load_tokenizer(demo), read_text(PYDOC_TOPICS))
    random = torch.randint(255, (4, 64), generator=torch.Generator().manual_seed(0))
    prompts = {"demo": ids[: 4 * 64].view(4, 64), "qwen2": random}
    for name, prompt in prompts.items():
        save_file({"ids": prompt.contiguous()}, folder / f"{name}.prompts")
    save_file({"ids": ids[-16 * 128 :].view(16, 128).contiguous()}, folder / "calibration")
    settings = {"context": 256, "windows": 16, "speed": None, "dtype": "float32"}
    baseline = evaluate(demo, device="cpu", settings=settings)["quality"]["perplexity"]
    return SimpleNamespace(
        folder=folder, models=models, settings=settings, baseline=baseline, rows=[], notes=[], versions={}
    )


@pytest.fixture(scope="module", autouse=True)
def table(shared: SimpleNamespace) -> Iterator[None]:
    """The results as docs/interop.md has them."""
    yield
    header = ["written by", "format", "scheme", "model", "read by", "dtype", "cosine", "same 32 tokens", "perplexity"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *shared.rows)]
    notes = [f"Perplexity is bitpress's, unquantized {shared.baseline:.2f}.", *shared.notes]
    lines += ["", *(f"- {note}" for note in notes), "", "Versions:", ""]
    for environment, versions in sorted(shared.versions.items()):
        lines.append(
            f"- .venv{'-' if environment else ''}{environment}: "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
        )
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n")


def compare(
    shared: SimpleNamespace, folder: Path, model: str, reader: tuple[str, str, str], theirs_in: Path | None = None
) -> tuple[float, bool]:
    """The reader's logits and greedy tokens against bitpress's: cosine, and whether all tokens are the same.

    theirs_in: what the reader loads, where that is not `folder`.
    """
    environment, program, dtype = reader
    prompts, output = shared.folder / f"{model}.prompts", folder.parent / "logits.safetensors"
    task = {"folder": str(folder), "dtype": dtype, "ids": str(prompts), "tokens": TOKENS, "output": str(output)}
    asked = {**task, "folder": str(theirs_in or folder)}
    shared.versions[environment] = call(environment, program, asked, folder.parent)["versions"]
    loaded, _ = load(folder, device="cpu", dtype=dtype, kernel="reference")
    ours, theirs = answer(loaded, task), load_file(output)
    cosine = F.cosine_similarity(ours["logits"].flatten().double(), theirs["logits"].flatten().double(), dim=0).item()
    return cosine, ours["greedy"].tolist() == theirs["greedy"].tolist()


def described(reader: tuple[str, str, str]) -> list[str]:
    """Reader and dtype, as the table has them."""
    environment, program, dtype = reader
    within = {"gptqmodel": " with optimum, GPTQModel", "llmcompressor": " of llm-compressor", "transformers": ""}
    return [READERS.get(program) or f"transformers{within[environment]}", dtype]


@pytest.mark.parametrize(("model", "scheme", "format", "reader"), OURS)
def test_they_read_ours(
    shared: SimpleNamespace, tmp_path: Path, model: str, scheme: str, format: str, reader: tuple[str, str, str]
):
    folder = tmp_path / "quantized"
    recipe = {**MIXED.get(scheme, {"scheme": scheme}), "format": format}
    if model == "demo" and not GPTQ().problems(Scheme.parse(recipe["scheme"])):
        recipe |= {"method": "gptq", "calibration": {"text": PYDOC_TOPICS, "windows": 8, "context": 128}}
    quantize(shared.models[model], recipe, folder)
    row = ["bitpress", format, scheme, model, *described(reader)]
    if refused := REFUSED.get((scheme, format, reader)):
        error, reason = refused
        with pytest.raises(RuntimeError, match=error):
            compare(shared, folder, model, reader)
        shared.rows.append([*row, "refused", "–", ""])
        shared.notes.append(f"{row[4]} refuses {scheme} in {format}: {reason}.")
        return
    cosine, same = compare(shared, folder, model, reader)
    shared.rows.append([*row, f"{cosine:.7f}", "yes" if same else "NO", ""])
    assert cosine > SIMILAR
    assert same or reader == BFLOAT16  # its weights are rounded to bfloat16, bitpress's stay as they are


@pytest.mark.parametrize(("architecture", "changes", "scheme"), IN_GGUF)
def test_llama_cpp_reads_architectures(
    shared: SimpleNamespace, tmp_path: Path, architecture: str, changes: dict[str, Any], scheme: str
):
    source = save_tiny(architecture, tmp_path / architecture, vocab_size=300, max_position_embeddings=128, **changes)
    save_tokenizer_of_llamacpp(source)
    quantize(source, {"scheme": scheme, "format": "gguf"}, tmp_path / "quantized")
    cosine, same = compare(shared, tmp_path / "quantized", "qwen2", LLAMACPP)
    row = ["bitpress", "gguf", scheme, architecture, *described(LLAMACPP)]
    shared.rows.append([*row, f"{cosine:.7f}", "yes" if same else "no", ""])
    assert cosine > ROUNDED


@pytest.mark.parametrize("scheme", ["int4-g128", "int4-g64-asym", "mixed, all quantized"])
def test_onnx_runtime_computes_the_same(shared: SimpleNamespace, tmp_path: Path, scheme: str):
    """By a model that is shipped: its layers round their inputs to 8 bits."""
    quantize(shared.models["demo"], MIXED.get(scheme, {"scheme": scheme}), tmp_path / "quantized")
    convert(tmp_path / "quantized", "onnx", tmp_path / "onnx")
    cosine, same = compare(shared, tmp_path / "quantized", "demo", GENAI, tmp_path / "onnx")
    row = ["bitpress", "onnx", scheme, "demo", *described(GENAI)]
    shared.rows.append([*row, f"{cosine:.7f}", "yes" if same else "NO", ""])
    assert cosine > SIMILAR
    assert same


@pytest.mark.parametrize(("writer", "format", "scheme", "options", "reader"), THEIRS)
def test_we_read_theirs(
    shared: SimpleNamespace, tmp_path: Path, writer: str, format: str, scheme: str, options: dict[str, Any],
    reader: tuple[str, str, str],
):  # fmt: skip
    folder = tmp_path / "quantized"
    if writer == "bitsandbytes":
        task = {"model": str(shared.models["demo"]), "output": str(folder), "dtype": "bfloat16"}
        call("transformers", "bitsandbytes", {**task, "double": scheme == "nf4-dq"}, tmp_path)
    else:
        module, script = other_programs()[writer]
        program = Program(writer, module, script, python_of(reader[0]), options)
        run(program, request(shared.models["demo"], shared.folder / "calibration", folder, Scheme.parse(scheme)))
    row = [writer, format, scheme, "demo", "bitpress, " + described(reader)[0], reader[2]]
    cosine, same = compare(shared, folder, "demo", reader)
    perplexity = evaluate(folder, device="cpu", settings=shared.settings)["quality"]["perplexity"]
    shared.rows.append([*row, f"{cosine:.7f}", "yes" if same else "NO", f"{perplexity:.2f}"])
    assert cosine > SIMILAR
    assert same
    assert abs(perplexity / shared.baseline - 1) < 0.15  # 3 bits cost about 5%; what is read wrongly, far more


@pytest.mark.parametrize("begins", [False, True])
def test_perplexity_as_llama_cpp_has_it(shared: SimpleNamespace, tmp_path: Path, begins: bool):
    """The same float16 weights and the same tokens; llama.cpp rounds the inputs of its products to float16, too."""
    folder, text = tmp_path / "half", tmp_path / "text.txt"
    model, tokenizer = load(shared.models["demo"], device="cpu", dtype="float16")
    begin = (tokenizer.bos_token, tokenizer.bos_token_id)
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{begin[0]} $A", special_tokens=[begin])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text.write_text(read_text(PYDOC_TOPICS).content)
    ids = encode(load_tokenizer(folder), read_text(str(text)))[: CHUNKS * CHUNK + CHUNK // 2]  # a tail to be dropped
    assert (ids[0] == begin[1]) == begins
    save_file({"ids": ids.contiguous()}, tmp_path / "ids")
    task = {"folder": str(folder), "ids": str(tmp_path / "ids"), "output": str(tmp_path / "half.gguf")}
    task |= {"context": CHUNK, "begin": begin[1] if begins else None}
    answered = call("llamacpp", "llama.cpp", task, tmp_path)
    settings = {**shared.settings, "text": str(text), "protocol": "llama.cpp", "context": CHUNK, "windows": CHUNKS}
    ours, theirs = evaluate(folder, device="cpu", settings=settings)["quality"]["perplexity"], answered["perplexity"]
    shared.versions["llamacpp"] = answered["versions"]
    shared.notes.append(
        f"Perplexity by the protocol llama.cpp-{CHUNK}, {'with' if begins else 'without'} a token that begins each "
        f"chunk: llama.cpp {theirs:.5f}, bitpress {ours:.5f}, apart by {abs(theirs / ours - 1):.1e}."
    )
    assert abs(theirs / ours - 1) < 0.0005  # float16 has steps of that size
