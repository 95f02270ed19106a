"""torch.compile goes through a Llama of quantized layers in one piece: no kernel breaks its graph."""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bitpress.kernels.linear import QLinear, join_projections
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.registry import registry

Make = Callable[..., QTensor]

LAYERS = 2
TRITON = [kernel.name for kernel in registry() if kernel.name.startswith("triton")]
SCHEMES = ("int4-g32-asym", "int4-g128", "int8-dynamic", "int8-static", "int8-g32", "nf4", "nf4-dq", "fp8")


def llama(make_qtensor: Make, scheme: str, kernel: str, dtype: torch.dtype) -> nn.Module:
    """Two decoder blocks of 7 quantized layers each, all by this kernel."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().to(dtype)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    q = make_qtensor(scheme, layer.out_features, layer.in_features)
                    setattr(parent, name, QLinear(q, None, dtype, kernel))
    return model


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [("int4-g32", "native-int8"), ("int8-dynamic", "native-int8"), ("nf4", "native-bf16"), ("int4-g32", "torch-int4")],
)
def test_on_the_cpu(make_qtensor: Make, scheme: str, kernel: str) -> None:
    dtype = torch.bfloat16
    named = next(each for each in registry() if each.name == kernel)
    if reason := named.unsupported(make_qtensor(scheme, 128, 128), dtype, torch.device("cpu")):
        pytest.skip(reason)
    model = llama(make_qtensor, scheme, kernel, dtype)
    tokens = torch.arange(7)[None]
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch._dynamo.reset()
        assert torch.equal(compiled(tokens, use_cache=False).logits, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kernel", TRITON)
def test_triton_without_a_gpu(make_qtensor: Make, monkeypatch: pytest.MonkeyPatch, kernel: str, scheme: str) -> None:
    """Traced with shapes alone, as the compiler does before it runs anything."""
    named = next(each for each in registry() if each.name == kernel)
    monkeypatch.setattr(importlib.import_module(type(named).__module__), "unsupported_device", lambda _: None)
    if reason := named.unsupported(make_qtensor(scheme, 128, 128), torch.bfloat16, torch.device("cpu")):
        pytest.skip(reason)
    model = llama(make_qtensor, scheme, kernel, torch.bfloat16)
    tokens = torch.arange(14).view(2, 7)
    fewer = join_projections(model)
    with torch.no_grad():
        traced = torch.export.export(model, (tokens,), {"use_cache": False}, strict=True)
    called = [str(node.target) for node in traced.graph.nodes if str(node.target).startswith("bitpress.")]
    assert len(called) == 7 * LAYERS - fewer
    assert fewer == 3 * LAYERS
    logits = traced.graph.output_node().args[0][0]
    assert logits.meta["val"].shape == (2, 7, 96)
