"""Experts of an unquantized model one by one, as a quantized one has them: each layer then has its twin."""

from torch import Tensor
from transformers import PreTrainedModel

from bitpress.kernels.qlinear import QExperts

from .layers import dense_layer, place_experts
from .layout import Layout


def part_experts(dense: PreTrainedModel, quantized: PreTrainedModel) -> None:
    """Where `quantized` has experts of layers, give `dense` such, too; their weights are views of what it has."""
    for path, module in list(quantized.named_modules()):
        if not isinstance(module, QExperts):
            continue
        owner, _, leaf = path.rpartition(".")
        parameter = getattr(dense.get_submodule(owner), leaf)
        assert isinstance(parameter, Tensor)
        pieces = [len(list(expert.children())) for expert in module.experts]
        rows = [[dense_layer(part)(None) for part in each.chunk(n)] for each, n in zip(parameter.detach(), pieces)]
        place_experts(dense, path, rows)


def names_of_experts(layout: Layout) -> dict[str, str]:
    """Module -> layer, as the checkpoint names it: ….experts.gate_up_proj.experts.3.0 -> ….experts.3.gate_proj."""
    experts = [(target.parameter, target.expert, layer) for layer, target in layout.quantized.items()]
    return {f"{parameter}.experts.{e[0]}.{e[1]}": layer for parameter, e, layer in experts if e}
