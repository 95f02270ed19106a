"""How a published checkpoint is loaded, runtime by runtime, in code that runs as it stands."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..checkpoints.runtimes import serve_command
from ..system.packages import install_bitpress

_PROMPT = "Once upon a time"
_GENERATE = f"""\
inputs = tokenizer("{_PROMPT}", return_tensors="pt", return_token_type_ids=False).to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))"""
_TRANSFORMERS = """\
from transformers import {auto}, AutoTokenizer{imported}

model = {auto}.from_pretrained("{repo}"{more})
tokenizer = AutoTokenizer.from_pretrained("{repo}")
"""
_GPTQMODEL = f"""\
from gptqmodel import GPTQModel

model = GPTQModel.load("{{repo}}")
print(model.tokenizer.decode(model.generate("{_PROMPT}")[0]))"""
_PACKAGES = {
    "transformers": "transformers",
    "GPTQModel": "gptqmodel",
    "vLLM": "vllm",
    "SGLang": "sglang",
    "MLX": "mlx-lm",
    "ORT GenAI": "onnxruntime-genai torch onnx-ir",
}


@dataclass(frozen=True)
class UsageSnippet:
    """Code that loads a checkpoint in one runtime.

    name: the runtime's. needs: what to type to install it. notes: what to know about it.
    """

    name: str
    needs: str
    code: str
    language: str = "python"
    notes: list[str] = field(default_factory=list)


def usage_snippets(repo: str, runtimes: Mapping[str, Mapping[str, Any]], chat: bool) -> list[UsageSnippet]:
    """A snippet for every runtime that is known to load a checkpoint, ours first.

    Args:
        repo: owner/name, which the Hub takes.
        runtimes: see runtimes.verdicts.
        chat: whether its tokenizer has a chat template.
    """
    command = f'bitpress generate {repo} "{_PROMPT}"' + (f"\nbitpress chat {repo}" if chat else "")
    ours = f'from bitpress.pipeline import load\n\nmodel, tokenizer = load("{repo}")\n{_GENERATE}'
    auto = next((verdict["class"] for verdict in runtimes.values()), "AutoModelForCausalLM")
    loading = _TRANSFORMERS.format(auto=auto, repo=repo, imported="", more="")
    hooked = f"import bitpress.pipeline.hf\n{loading}{_GENERATE}"
    snippets = [
        UsageSnippet("bitpress", install_bitpress(), ours),
        UsageSnippet("bitpress, on the command line", install_bitpress(), command, "sh"),
        UsageSnippet("transformers, on bitpress's kernels", install_bitpress(), hooked),
    ]
    for name, verdict in runtimes.items():
        if verdict["loads"] not in ("yes", "limited"):
            continue
        code, language = serve_command(verdict, repo.rpartition("/")[2], repo), "sh"
        if name == "GPTQModel":
            code, language = _GPTQMODEL.format(repo=repo), "python"
        elif name == "transformers":
            language = "python"
            imported = f", {verdict['imports']}" if verdict["imports"] else ""
            more = f", {verdict['arguments']}" if verdict["arguments"] else ""
            code = _TRANSFORMERS.format(auto=auto, repo=repo, imported=imported, more=more) + _GENERATE
        packages = [*_PACKAGES.get(name, "").split(), *verdict["needs"].replace(",", " ").split()]
        needs = " ".join(["pip install", *packages]) if packages else ""
        if code:
            snippets.append(UsageSnippet(name, needs, code, language, list(verdict["why"])))
    return snippets


def unsupported_runtimes(runtimes: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Each runtime that does not load it, or is not known to, and why."""
    words = {"no": "does not load it", "unknown": "is not known to load it"}
    return [
        (name, f"{words[verdict['loads']]}{_as_of(verdict)}: {'; '.join(verdict['why'])}")
        for name, verdict in runtimes.items()
        if verdict["loads"] in words
    ]


def _as_of(verdict: Mapping[str, Any]) -> str:
    """The version that a verdict is true for, in brackets; "" where it is not known."""
    version = verdict.get("version")
    return f" ({version})" if version else ""
