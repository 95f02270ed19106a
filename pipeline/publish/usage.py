"""How a published checkpoint is loaded, runtime by runtime, in code that runs as it stands."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_PROMPT = "Once upon a time"
_GENERATE = f"""\
inputs = tokenizer("{_PROMPT}", return_tensors="pt", return_token_type_ids=False).to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))"""
_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer{imported}

model = AutoModelForCausalLM.from_pretrained("{repo}"{more})
tokenizer = AutoTokenizer.from_pretrained("{repo}")
"""
_CODE = {
    "GPTQModel": f"""\
from gptqmodel import GPTQModel

model = GPTQModel.load("{{repo}}")
print(model.tokenizer.decode(model.generate("{_PROMPT}")[0]))""",
    "vLLM": "vllm serve {repo}",
    "SGLang": "python -m sglang.launch_server --model-path {repo}",
}
_PACKAGES = {"transformers": "transformers", "GPTQModel": "gptqmodel", "vLLM": "vllm", "SGLang": "sglang"}


@dataclass(frozen=True)
class Way:
    """name: of the runtime. needs: what to install, as pip is told it. notes: what to know of it."""

    name: str
    needs: str
    code: str
    language: str = "python"
    notes: list[str] = field(default_factory=list)


def ways(repo: str, runtimes: Mapping[str, Mapping[str, Any]], asymmetric: bool, chat: bool) -> list[Way]:
    """Every runtime that is known to load a checkpoint, ours first.

    Args:
        repo: owner/name, which the Hub takes.
        runtimes: see runtimes.verdicts.
        asymmetric: whether it is compressed-tensors with zero points, which transformers must unpack itself.
        chat: whether its tokenizer has a chat template.
    """
    command = f'bitpress generate {repo} "{_PROMPT}"' + (f"\nbitpress chat {repo}" if chat else "")
    ours = f'from bitpress.pipeline import load\n\nmodel, tokenizer = load("{repo}")\n{_GENERATE}'
    hooked = f"import bitpress.pipeline.hf\n{_transformers(repo)}"
    return [
        Way("bitpress", "bitpress", ours),
        Way("bitpress, on the command line", "bitpress", command, "sh"),
        Way("transformers, on bitpress's kernels", "bitpress", hooked),
        *_others(repo, runtimes, asymmetric),
    ]


def closed(runtimes: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Each runtime that does not load it, or is not known to, and why."""
    words = {"no": "does not load it", "unknown": "is not known to load it"}
    shut = {name: verdict for name, verdict in runtimes.items() if verdict["loads"] in words}
    return [(name, ": ".join([words[found["loads"]], "; ".join(found["why"])])) for name, found in shut.items()]


def _others(repo: str, runtimes: Mapping[str, Mapping[str, Any]], asymmetric: bool) -> Iterator[Way]:
    for name, verdict in runtimes.items():
        if verdict["loads"] not in ("yes", "limited"):
            continue
        code = _transformers(repo, asymmetric) if name == "transformers" else _CODE[name].format(repo=repo)
        needs = " ".join([_PACKAGES[name], *verdict["needs"].replace(",", " ").split()])
        yield Way(name, needs, code, "python" if "import" in code else "sh", list(verdict["why"]))


def _transformers(repo: str, asymmetric: bool = False) -> str:
    imported = ", CompressedTensorsConfig" if asymmetric else ""
    more = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if asymmetric else ""
    return _TRANSFORMERS.format(repo=repo, imported=imported, more=more) + _GENERATE
