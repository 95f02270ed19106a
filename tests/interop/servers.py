"""bitpress's checkpoints in vLLM, and in the servers that its doctor names: part of `make interop`.

vLLM runs on a CPU here, in bfloat16. What that dtype costs bitpress measures on itself: the KL divergence of its logits
in bfloat16 from its logits in float32, both by the reference kernel, the definition of right. vLLM's KL from the same
float32 logits, over the 63 positions of a prompt, may be twice that. All of 32 greedy tokens are the same, or all
before one that is a tie: bitpress puts vLLM's token no further below its own than bfloat16 moves log-probabilities.

What vLLM refuses, the doctor must have said: that it does not, or on GPUs and not on CPUs, or by a plug-in.

vLLM's attention for CPUs reads every key and value from its cache, a prompt's too, as bitpress does. But what it puts
there in FP8 it cuts off: csrc/cpu/cpu_attn_fp8.hpp shifts the bits of a float32 to the right, where bitpress and GPUs
round to nearest. Such a cache is compared with one that cuts bits off too, and has one scale for all heads.
"""

import json
import re
import runpy
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, Qwen2Config

from bitpress.kernels.caches.static import Float8Cache
from bitpress.kernels.scheme import Scheme
from bitpress.pipeline import load, quantize
from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.data.text import PYDOC_TOPICS, read_text
from bitpress.pipeline.data.tokens import encode
from bitpress.pipeline.formats import registry
from bitpress.pipeline.hub.download import resolve
from bitpress.pipeline.methods.absmax import Absmax
from bitpress.pipeline.models.pretrained import load_tokenizer
from bitpress.pipeline.storage.artifacts import DEMO
from bitpress.pipeline.storage.checkpoint import Checkpoint

HERE = Path(__file__).resolve().parent
TABLE = HERE.parent.parent / "runs" / "interop-servers.md"
interop = runpy.run_path(str(HERE / "interop.py"))
python_of: Callable[[str], str] = interop["python_of"]
MIXED: dict[str, dict[str, Any]] = interop["MIXED"]

TOKENS = 32
ROUNDING = 2.0  # times bitpress's own KL in bfloat16: the two programs round in different places
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it takes whole cores for itself
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that the process that loads the model is the one that sees its error
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
TEXT = {"text": PYDOC_TOPICS, "windows": 8, "context": 128}
# what the table calls it -> the recipe
FOURS = {"*.down_proj": "int4-g32", "model.layers.0.*": "none"}
INPUTS = {"*.o_proj": "int8-dynamic", "*.down_proj": "fp8-dynamic", "model.layers.0.*": "none"}
RECIPES: dict[str, dict[str, Any]] = {
    **MIXED,
    "4 bits in groups of 128 and 32": {"scheme": "int4-g128", "layers": FOURS},
    "4 bits, head too": {"scheme": "int4-g128", "layers": {**FOURS, "lm_head": "int4-g32"}},
    "4 bits, embeddings too": {"scheme": "int4-g128", "layers": {**FOURS, "*embed_tokens": "int4-g64"}},
    "4 bits, inputs in int8 and fp8": {"scheme": "int4-g128", "layers": INPUTS},
    "gptq/int4-g128": {"method": "gptq", "scheme": "int4-g128", "calibration": TEXT},
    "int8-static": {"scheme": "int8-static", "calibration": TEXT},
    "fp8-tensor-static": {"scheme": "fp8-tensor-static", "calibration": TEXT},
    "int8-static-asym": {"scheme": "int8-static-asym", "calibration": TEXT},
    "weights alone, cache in fp8": {"scheme": "none", "kv_cache": "fp8", "calibration": TEXT},
    "int4-g32, cache in fp8": {"scheme": "int4-g32", "kv_cache": "fp8", "calibration": TEXT},
    "int8-dynamic, cache in fp8 by head": {"scheme": "int8-dynamic", "kv_cache": "fp8-head", "calibration": TEXT},
    "int4-g32, cache in int8": {"scheme": "int4-g32", "kv_cache": "int8", "calibration": TEXT},
    "int4-g128, q in 8 bits": {
        "scheme": "int4-g128", "layers": {"*.q_proj": "int8-g128"}, "allow_split_fused": True
    },
}  # fmt: skip
NO_EXPERTS = "No (WNA16|Int8) MoE backend supports"
NO_KERNEL = "Failed to find a kernel"
BITS = "Unsupported quantization config"  # of GPTQ
# model, scheme or recipe, format, and what the error says where vLLM refuses it
CT = "compressed-tensors"
VLLM: list[tuple[str, str, str, str | None]] = [
    ("demo", "int4-g32", "gptq", None),
    ("demo", "gptq/int4-g128", "gptq", None),
    ("demo", "int8-g128", "gptq", r"Marlin does not support weight_bits = uint8b128"),
    ("demo", "int3-g128", "gptq", BITS),
    ("demo", "int2-g64", "gptq", BITS),
    ("demo", "act-order int4-g128", "gptq", r"desc_act=True\) is no longer supported"),
    ("demo", "4 bits in groups of 128 and 32", "gptq", None),
    ("qwen2", "4 bits, head too", "gptq", None),
    ("demo", "int4-g128, q in 8 bits", "gptq", "AssertionError"),
    ("experts", "int4-g128", "gptq", NO_EXPERTS),
    ("demo", "int4-g128", "gptq-v2", None),
    ("demo", "int4-g128-asym", "gptq-v2", BITS),
    ("demo", "int4-channel", "awq", None),
    ("demo", "int4-g128", "awq", None),
    ("demo", "int4-g64-asym", "awq", None),
    ("experts", "int4-g128", "awq", NO_EXPERTS),
    ("demo", "int4-g32", CT, None),
    ("demo", "gptq/int4-g128", CT, None),
    ("demo", "int4-channel", CT, None),
    ("demo", "int4-g32-asym", CT, None),
    ("demo", "int4-g128-asym", CT, None),
    ("qwen2", "int4-g128", CT, None),
    ("demo", "int2-g64", CT, NO_KERNEL),
    ("demo", "int3-g128-asym", CT, NO_KERNEL),
    ("demo", "int8-channel", CT, NO_KERNEL),
    ("demo", "int8-g128-asym", CT, NO_KERNEL),
    ("demo", "int8-dynamic", CT, None),
    ("demo", "int8-dynamic-asym", CT, None),
    ("demo", "int8-static", CT, None),
    ("demo", "int8-static-asym", CT, None),
    ("demo", "fp8-dynamic", CT, None),
    ("demo", "fp8-block", CT, NO_KERNEL),
    ("demo", "fp8", CT, NO_KERNEL),
    ("demo", "mxfp4", CT, NO_KERNEL),
    ("demo", "nvfp4", CT, "Marlin FP4 not available"),
    ("demo", "4 bits in groups of 128 and 32", CT, None),
    ("demo", "4 bits, inputs in int8 and fp8", CT, None),
    ("demo", "mixed", CT, NO_KERNEL),
    ("qwen2", "4 bits, head too", CT, None),
    ("demo", "4 bits, embeddings too", CT, r"no module or parameter named 'embed_tokens\.weight_packed'"),
    ("qwen2", "4 bits, embeddings too", CT, "'triton' has no attribute"),
    ("demo", "int4-g128, q in 8 bits", CT, "."),
    ("demo", "weights alone, cache in fp8", CT, None),
    ("demo", "int4-g32, cache in fp8", CT, None),
    ("demo", "int8-dynamic, cache in fp8 by head", CT, None),
    ("demo", "int4-g32, cache in int8", CT, "supported kv cache quantization is num_bits=8, type=float"),
    ("experts", "int4-g128", CT, NO_EXPERTS),
    ("experts", "int8-dynamic", CT, NO_EXPERTS),
    ("experts", "int8-static", CT, "Unsupported FusedMoe scheme"),
    ("experts", "fp8-dynamic", CT, "Unsupported FP8 MoE backend"),
    ("demo", "fp8-block", "fp8", NO_KERNEL),
    ("demo", "fp8-tensor-dynamic", "fp8", "static_scaled_fp8_quant"),
    ("demo", "fp8-tensor-static", "fp8", "static_scaled_fp8_quant"),
    ("demo", "fp8-dynamic", "modelopt", None),
    ("demo", "fp8-tensor-static", "modelopt", "has no attribute 'silu_and_mul_quant'"),
    ("demo", "nvfp4", "modelopt", "Marlin FP4 not available"),
    ("demo", "nf4", "bitsandbytes", "Unknown quantization method"),
    ("demo", "int4-g64", "mlx", "Unknown quantization method"),
]


def with_experts(demo: Path, folder: Path) -> Path:
    """The demo as a Mixtral: four experts a block, each the demo's MLP with a tenth of noise on its weights."""
    source, noise = AutoModelForCausalLM.from_pretrained(demo), torch.Generator().manual_seed(0)
    own = source.config.to_dict()
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size"
    )
    keys = f"{names} rms_norm_eps max_position_embeddings tie_word_embeddings rope_parameters".split()
    config = MixtralConfig(
        **{key: own[key] for key in keys}, num_local_experts=4, num_experts_per_tok=2, dtype="bfloat16"
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    weights = {name: value for name, value in source.state_dict().items() if ".mlp." not in name}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    for block, dense in zip(model.model.layers, source.model.layers):
        experts, mlp = block.mlp.experts, dense.mlp
        for number in range(4):
            parts = {
                "gate_up_proj": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                "down_proj": mlp.down_proj.weight,
            }
            for name, weight in parts.items():
                moved = weight * (1 + 0.1 * torch.randn(weight.shape, generator=noise))
                getattr(experts, name).data[number] = moved
    model.to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(demo).save_pretrained(folder)
    return folder


def in_another_order(model: Path, folder: Path, scheme: Scheme, format: str) -> None:
    """A checkpoint of GPTQ's format with act-order: inputs in a random order, which is one for q, k and v."""
    kind, checkpoint = registry()[format], Checkpoint(model)
    folder.mkdir()
    writer, schemes = kind.writer(folder, torch.bfloat16, 1), dict[str, Scheme]()
    for name in checkpoint.tensors:
        value = checkpoint.read(name)
        if not name.endswith("_proj.weight"):
            writer.add(name, value)
            continue
        order = torch.randperm(value.shape[1], generator=torch.Generator().manual_seed(0)).to(torch.int32)
        dtype = kind.scale_dtype(scheme, torch.bfloat16)
        qtensor, _ = Absmax().quantize(value[:, order].float(), scheme, dtype)
        layer = name.removesuffix(".weight")
        schemes[layer] = scheme
        writer.add(layer, replace(qtensor, order=order))
    writer.adopt(writer.cut(0).write())
    section = kind.quantization_config(schemes, [], torch.bfloat16, ordered=True)
    writer.close(checkpoint.config, section, checkpoint.other_files())


@pytest.fixture(scope="module", autouse=True)
def vllm_environment() -> Iterator[None]:
    """What vLLM takes from the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, save_model: Callable[..., Path]) -> SimpleNamespace:
    """The demo, the demo as a Mixtral, and a random Qwen2 for its biases and its untied head; and a prompt."""
    folder = tmp_path_factory.mktemp("servers")
    config = Qwen2Config(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, vocab_size=256, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=255, pad_token_id=255,
        initializer_range=0.1,
    )  # fmt: skip
    demo = resolve(DEMO).folder
    models = {
        "demo": demo,
        "experts": with_experts(demo, folder / "experts"),
        "qwen2": save_model(config, folder / "qwen2"),
    }
    ids = encode(load_tokenizer(demo), read_text(PYDOC_TOPICS))[:64]
    prompts = {name: ids % 255 if name == "qwen2" else ids for name in models}
    for name, prompt in prompts.items():
        save_file({"ids": prompt.view(1, 64).contiguous()}, folder / f"{name}.prompt")
    return SimpleNamespace(folder=folder, models=models, prompts=prompts, rows=[], notes=[], versions={})


@pytest.fixture(scope="module", autouse=True)
def table(shared: SimpleNamespace) -> Iterator[None]:
    """The results as docs/interop.md has them."""
    yield
    header = ["model", "format", "scheme", "doctor", "vLLM", "KL of vLLM", "KL of bitpress in bfloat16", "same tokens"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *shared.rows)]
    lines += [
        "",
        *(f"- {note}" for note in shared.notes),
        "",
        ", ".join(f"{name} {version}" for name, version in shared.versions.items()),
    ]
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def vllm(shared: SimpleNamespace) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """Asks the process that runs vllmcpu.py, which imports vLLM once."""
    command = [python_of("vllm"), str(HERE / "vllmcpu.py")]
    with (shared.folder / "vllm.log").open("w") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=shared.folder
        )
        send, receive = process.stdin, process.stdout
        assert send
        assert receive

        def ask(request: dict[str, Any]) -> dict[str, Any]:
            path, answer = shared.folder / "request.json", shared.folder / "answer.json"
            path.write_text(json.dumps({**request, "answer": str(answer)}))
            send.write(f"{path}\n")
            send.flush()
            status = receive.readline().strip()
            assert status == "0", f"vLLM ended with {status!r}:\n{Path(log.name).read_text()[-4000:]}"
            answered: dict[str, Any] = json.loads(answer.read_text())
            return answered

        yield ask
        send.close()
        process.wait()


def kl(reference: Tensor, other: Tensor) -> float:
    """Mean KL divergence in nats, of log-probabilities [positions, vocabulary]."""
    return (reference.exp() * (reference - other)).sum(-1).mean().item()


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """float64 [positions, vocabulary] after each of the ids."""
    return model(input_ids=ids.view(1, -1), use_cache=False).logits[0].double().log_softmax(-1)


def first_difference(model: PreTrainedModel, prompt: Tensor, tokens: Tensor) -> tuple[int, float]:
    """How many of a continuation's tokens are the model's greedy ones, and how far, in nats, the next is below its."""
    following = log_probabilities(model, torch.cat([prompt, tokens]))[len(prompt) - 1 : -1]
    for place, token in enumerate(tokens.tolist()):
        if token != (best := int(following[place].argmax())):
            return place, (following[place, best] - following[place, token]).item()
    return len(tokens), 0.0


def written(shared: SimpleNamespace, model: str, name: str, format: str, folder: Path) -> None:
    """A checkpoint of a row."""
    if name.startswith("act-order "):
        in_another_order(shared.models[model], folder, Scheme.parse(name.removeprefix("act-order ")), format)
    else:
        quantize(shared.models[model], {**RECIPES.get(name, {"scheme": name}), "format": format}, folder)


def cut_off(cache: Float8Cache, states: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """E4M3 codes as vLLM makes them on a CPU: three bits of mantissa, and below 2^-6 multiples of 2^-9, toward zero."""
    x = (states.to(torch.float32) / scale.amax()).clamp(-448, 448)
    normal = (x.view(torch.int32) & ~((1 << 20) - 1)).view(torch.float32)
    return {"codes": torch.where(x.abs() < 2**-6, (x * 512).trunc() / 512, normal).to(torch.float8_e4m3fn)}


@pytest.mark.parametrize(("model", "name", "format", "error"), VLLM)
def test_vllm(
    shared: SimpleNamespace,
    vllm: Any,
    tmp_path: Path,
    model: str,
    name: str,
    format: str,
    error: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, output = tmp_path / "quantized", tmp_path / "logprobs.safetensors"
    written(shared, model, name, format, folder)
    verdict = diagnose(folder).runtimes["vLLM"]
    request = {"folder": str(folder), "dtype": "bfloat16", "ids": str(shared.folder / f"{model}.prompt")}
    answered = vllm({**request, "tokens": TOKENS, "output": str(output)})
    shared.versions = answered["versions"]
    row = [model, format, name, verdict["loads"]]
    if error:
        assert re.search(error, answered.get("error", "it loads"))
        never = verdict["loads"] == "no"
        assert never or re.search("on a CPU|plug-in", " ".join(verdict["why"])), verdict
        shared.rows.append([*row, "refused" if never else "stops here", "–", "–", "–"])
        return
    assert "error" not in answered, answered["error"]
    assert verdict["loads"] in ("yes", "limited"), verdict
    theirs, prompt = load_file(output), shared.prompts[model]
    monkeypatch.setattr(Float8Cache, "encode", cut_off)
    monkeypatch.setattr(Float8Cache, "decode", lambda _, codes, scale: codes["codes"].float() * scale.float().amax())
    exact, _ = load(folder, device="cpu", dtype="float32", kernel="reference")
    rounded, _ = load(folder, device="cpu", dtype="bfloat16", kernel="reference")
    reference, own = (log_probabilities(each, prompt)[:-1] for each in (exact, rounded))
    moved, expected = kl(reference, theirs["logprobs"].double()), kl(reference, own)
    same, gap = first_difference(exact, prompt, theirs["greedy"])
    tie = (reference - own).gather(-1, reference.argmax(-1, keepdim=True)).abs().max().item()
    tokens = f"{same}" if same == TOKENS else f"{same}, then a tie ({gap:.3f} nats)"
    shared.rows.append([*row, "loads", f"{moved:.1e}", f"{expected:.1e}", tokens])
    assert moved < ROUNDING * expected
    assert gap <= tie


VLLM_CLI = """\
import importlib.metadata, sys
version = importlib.metadata.version
importlib.metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
sys.exit(main())"""  # `vllm`, which stops where the package is vllm-cpu, as it looks for its own version
# the doctor's name, environment, scheme, format, and what a small test adds to the command
SERVED = [
    ("vLLM", "vllm", "int4-g128", "gptq", ["--enforce-eager", "--max-model-len", "256"]),
    ("MLX", "mlx", "int4-g64", "mlx", []),
]


@pytest.mark.parametrize(("program", "environment", "scheme", "format", "options"), SERVED)
def test_the_doctor_s_command_serves(
    shared: SimpleNamespace,
    tmp_path: Path,
    program: str,
    environment: str,
    scheme: str,
    format: str,
    options: list[str],
) -> None:
    """One request for a greedy completion, whose text is bitpress's."""
    folder = tmp_path / "quantized"
    quantize(shared.models["demo"], {"scheme": scheme, "format": format}, folder)
    command = diagnose(folder).commands[program]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    name, *arguments = shlex.split(command)
    python = Path(python_of(environment))
    start = [str(python), "-c", VLLM_CLI] if name == "vllm" else [str(python.with_name(name))]
    full = [*start, *arguments, "--port", port, *options]
    prompt = load_tokenizer(folder).decode(shared.prompts["demo"])
    body = {"model": str(folder), "prompt": prompt, "max_tokens": 16, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(full, stdout=log, stderr=log, cwd=tmp_path)
        try:
            text = json.loads(answered(request, server, tmp_path / "log"))["choices"][0]["text"]
        finally:
            server.terminate()
            server.wait()
    model: Any
    model, tokenizer = load(folder, device="cpu", kernel="reference")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    generated = model.generate(input_ids=ids, do_sample=False, max_new_tokens=16)[0, ids.shape[1] :]
    own = str(tokenizer.decode(generated, skip_special_tokens=True))
    assert text.strip() == own.strip()  # mlx-lm drops a first space
    shared.notes.append(f"`{command.replace(str(folder), 'DIR')}` answered as bitpress does, {format} {scheme}.")


def answered(
    request: urllib.request.Request, server: "subprocess.Popen[bytes]", log: Path, seconds: float = 300
) -> str:
    """The answer of a server that is still starting."""
    last = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < last:
        try:
            with urllib.request.urlopen(request, timeout=seconds) as response:
                return str(response.read().decode())
        except urllib.error.URLError as error:
            if isinstance(error, urllib.error.HTTPError):
                raise RuntimeError(f"{error.read().decode()}\n{log.read_text()[-4000:]}") from error
            time.sleep(0.5)
    raise RuntimeError(f"no answer:\n{log.read_text()[-4000:]}")
