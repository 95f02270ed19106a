"""Tokens per second of a Llama of random weights on a GPU: prefill and decode, compiled, decoding as one CUDA graph.

    python tests/benchmarks/gpu_llama.py --scheme int4-g128 --batch 1 16
    python tests/benchmarks/gpu_llama.py --scheme bf16
    python tests/benchmarks/gpu_llama.py --device cpu --shape tiny    # the same steps, for a look at them

Needs torch and Triton alone: the model is written out below, so that its speed is that of its layers. Embeddings and
the last layer are bfloat16, as in a quantized checkpoint. The roofline is the time that reading every weight once would
take at the bandwidth of a copy, measured here too.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
import uninstalled  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F

from bitpress.kernels.bench.measure import random_weight
from bitpress.kernels.linear import QLinear, join_projections
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme


class Shape(NamedTuple):
    hidden: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int


SHAPES = {
    "8b": Shape(4096, 14336, 32, 32, 8, 128, 128256),
    "70b": Shape(8192, 28672, 80, 64, 8, 128, 128256),
    "tiny": Shape(128, 256, 2, 4, 2, 32, 512),
}
DTYPE = torch.bfloat16


class Layers:
    """Makes linear layers of random weights: quantized, or of bfloat16 where `scheme` is None."""

    def __init__(self, scheme: Scheme | None, kernel: str, device: torch.device):
        self.scheme, self.kernel, self.device = scheme, kernel, device
        self._weights: dict[tuple[int, int], QTensor] = {}  # one for each shape: a layer's own copy is what it repacks

    def make(self, outs: int, ins: int) -> nn.Module:
        if self.scheme is None:
            layer = nn.Linear(ins, outs, bias=False, device=self.device, dtype=DTYPE)
            nn.init.normal_(layer.weight, std=ins**-0.5)
            return layer
        if (outs, ins) not in self._weights:
            self._weights[outs, ins] = random_weight(self.scheme, (outs, ins), self.device)
        return QLinear(self._weights[outs, ins], None, DTYPE, self.kernel)


class Block(nn.Module):
    """A decoder block of Llama, with the keys and values of earlier tokens in memory of its own."""

    def __init__(self, shape: Shape, layers: Layers, batch: int, length: int):
        super().__init__()
        self.shape = shape
        queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
        self.q_proj = layers.make(queries, shape.hidden)
        self.k_proj, self.v_proj = (layers.make(keys, shape.hidden) for _ in range(2))
        self.o_proj = layers.make(shape.hidden, queries)
        self.gate_proj, self.up_proj = (layers.make(shape.inner, shape.hidden) for _ in range(2))
        self.down_proj = layers.make(shape.hidden, shape.inner)
        self.norms = nn.ParameterList(torch.ones(shape.hidden, dtype=DTYPE, device=layers.device) for _ in range(2))
        held = torch.zeros(2, batch, shape.kv_heads, length, shape.head, dtype=DTYPE, device=layers.device)
        self.register_buffer("held", held)

    def forward(self, x: Tensor, positions: Tensor, angles: Tensor, mask: Tensor) -> Tensor:
        """x [batch, tokens, hidden]; positions int64 [tokens]; angles [tokens, head / 2]; mask [tokens, length]."""
        inputs = F.rms_norm(x, x.shape[-1:], self.norms[0])
        parts = self.q_proj(inputs), self.k_proj(inputs), self.v_proj(inputs)
        q, k, v = (part.unflatten(-1, (-1, self.shape.head)).transpose(1, 2) for part in parts)
        self.held[0].index_copy_(2, positions, rotated(k, angles))
        self.held[1].index_copy_(2, positions, v)
        q = rotated(q, angles)
        if q.shape[2] == 1:  # the heads that share keys are as many queries of one
            grouped = q.reshape(len(x), self.shape.kv_heads, -1, self.shape.head)
            found = F.scaled_dot_product_attention(grouped, self.held[0], self.held[1], attn_mask=mask).reshape(q.shape)
        else:  # the prompt, which comes first
            found = F.scaled_dot_product_attention(q, rotated(k, angles), v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(found.transpose(1, 2).flatten(2))
        inputs = F.rms_norm(x, x.shape[-1:], self.norms[1])
        return x + self.down_proj(F.silu(self.gate_proj(inputs)) * self.up_proj(inputs))


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Llama(nn.Module):
    def __init__(self, shape: Shape, layers: Layers, batch: int, length: int):
        super().__init__()
        device = layers.device
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden, device=device, dtype=DTYPE)
        self.blocks = nn.ModuleList(Block(shape, layers, batch, length) for _ in range(shape.blocks))
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False, device=device, dtype=DTYPE)
        steps = torch.arange(0, shape.head, 2, device=device) / shape.head
        self.register_buffer("frequencies", 500000.0**-steps)
        self.register_buffer("places", torch.arange(length, device=device))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens int64 [batch, tokens] at these positions -> the next ones, [batch, 1]."""
        x = self.embedding(tokens)
        angles = positions[:, None] * self.frequencies
        mask = self.places <= positions[:, None]
        for block in self.blocks:
            x = block(x, positions, angles, mask)
        last = F.rms_norm(x[:, -1:], x.shape[-1:])
        return self.head(last).argmax(-1)

    def bytes_per_token(self) -> int:
        """Of the weights that one step reads: of the embedding, it is a row."""
        tensors = [*self.blocks.parameters(), *self.blocks.buffers(), *self.head.parameters()]
        held = sum(block.held.nbytes for block in self.blocks)
        return sum(tensor.nbytes for tensor in tensors) - held


def seconds(work: Callable[[], Any], repeats: int, device: torch.device) -> list[float]:
    found = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy, read and written."""
    source = torch.ones((1 << 30) if device.type == "cuda" else (1 << 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / median(seconds(lambda: target.copy_(source), 20, device))


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`step` as a CUDA graph; on a CPU as it is."""
    for _ in range(3):  # compiles, and times configurations, which no graph can hold
        step()
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.inference_mode()
def measure(options: argparse.Namespace, batch: int) -> dict[str, Any]:
    device, shape = torch.device(options.device), SHAPES[options.shape]
    scheme = None if options.scheme == "bf16" else Scheme.parse(options.scheme)
    length = options.prompt + options.generate + 8
    model = Llama(shape, Layers(scheme, options.kernel, device), batch, length)
    joined = bool(options.joined and join_projections(model))
    used = {layer.selection.kernel.name for layer in model.modules() if isinstance(layer, QLinear)} or {"bf16"}
    if options.compile:
        for block in model.blocks:  # one compilation serves all of them
            block.compile(fullgraph=True, dynamic=False)
    tokens = torch.zeros(batch, options.prompt, dtype=torch.int64, device=device)
    positions = torch.arange(options.prompt, device=device)
    model(tokens, positions)
    prefill = seconds(lambda: model(tokens, positions), options.repeats, device)
    token, place = tokens[:, :1].clone(), torch.zeros(1, dtype=torch.int64, device=device)

    def step() -> None:
        token.copy_(model(token, place))
        place.add_(1)

    replay = captured(step, device)

    def generate() -> None:
        place.fill_(options.prompt)
        for _ in range(options.generate):
            replay()

    generate()
    decode = [taken / options.generate for taken in seconds(generate, options.repeats, device)]
    least = model.bytes_per_token() / bandwidth(device)
    return {
        "shape": options.shape, "scheme": options.scheme, "kernels": sorted(used), "joined": joined,
        "compiled": options.compile, "batch": batch, "gigabytes": model.bytes_per_token() / 1e9,
        "prefill": [batch * options.prompt / taken for taken in prefill], "decode": [batch / taken for taken in decode],
        "roofline": batch / least, "share": least / median(decode),
    }  # fmt: skip


def line(found: dict[str, Any]) -> str:
    prefill, decode = (f"{median(found[key]):.1f} ({min(found[key]):.1f} to {max(found[key]):.1f})" for key in (
        "prefill", "decode"))  # fmt: skip
    how = f"{found['scheme']} by {', '.join(found['kernels'])}{', joined' if found['joined'] else ''}"
    share = f"{found['share']:.0%} of the roofline, {found['roofline']:.0f}"
    return f"{how}, batch {found['batch']}: prefill {prefill}, decode {decode} tokens/s, {share}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="int4-g128", help="a scheme, or bf16")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--joined", action="store_true", help="q, k, v and gate, up as one product each")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for batch in options.batch:
        found = measure(options, batch)
        print(json.dumps(found) if options.json else line(found), flush=True)


if __name__ == "__main__":
    main()
