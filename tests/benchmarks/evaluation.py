"""What measuring costs: perplexity and divergence beside two bare forward passes of the baseline in transformers.

    python tests/benchmarks/evaluation.py BASELINE QUANTIZED --text FILE

Both are timed window by window in turn, in one process, so that whatever else the machine does falls on both alike;
the ratio of the medians is printed, with what is kept on the disk included.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bitpress.eval.measure import scores
from bitpress.kernels.linear import inputs_left_alone
from bitpress.kernels.products import Products
from bitpress.pipeline.config.schema import Eval
from bitpress.pipeline.data.text import read_text
from bitpress.pipeline.evaluate.resume import WindowStore
from bitpress.pipeline.evaluate.windows import windows
from bitpress.pipeline.models.loading import load


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("quantized", type=Path)
    parser.add_argument("--text", default="builtin:pydoc-topics")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    dense, tokenizer = load(arguments.baseline, device="cpu", dtype=arguments.dtype)
    model, _ = load(arguments.quantized, device="cpu", dtype=arguments.dtype)
    settings = Eval(text=arguments.text, context=arguments.context, windows=arguments.windows)
    text = windows(read_text(arguments.text), tokenizer, settings, model.config).windows
    bare, whole = [], []
    with tempfile.TemporaryDirectory() as folder, WindowStore(Path(folder), {}) as kept:
        for number, window in enumerate(text):
            ids = window.ids.unsqueeze(0)
            one = 2 * seconds(lambda ids=ids: dense(input_ids=ids, use_cache=False))
            with Products(), inputs_left_alone(model):
                both = seconds(lambda n=number, w=window: kept.keep(n, scores.compare(dense, model, [w])[0]))
            if number:  # the first warms up
                bare.append(one)
                whole.append(both)
        last = seconds(kept.flush)
    ratio = median(whole) / median(bare)
    print(f"{torch.get_num_threads()} threads, {len(bare)} windows of {arguments.context} tokens in {arguments.dtype}")
    print(f"two bare forward passes: {1000 * median(bare):.1f} ms; perplexity and KL: {1000 * median(whole):.1f} ms")
    print(f"ratio {ratio:.3f}; all windows together {(sum(whole) + last) / sum(bare):.3f}")


if __name__ == "__main__":
    main()
