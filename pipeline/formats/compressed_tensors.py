"""compressed-tensors: pack-quantized (weight-only integers) and int-quantized (INT8 weights and activations).

Written from the format's description; vLLM, SGLang and transformers (with the compressed-tensors package) load it.
"""

from typing import Any

import torch
from torch import Tensor

from bitpress.kernels.packing import pack, unpack, words
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from .act_order import gather_codes, read_order
from .base import integer_scheme, require

ORDER_SUFFIX = "weight_g_idx"
_VERSION = "0.15.0"  # of the layout: the oldest release whose readers take what is written here


def _config(format_name: str, weights: Scheme, activations: dict[str, Any] | None, kept: list[str]) -> dict[str, Any]:
    weight_args = {
        "num_bits": weights.bits,
        "type": "int",
        "symmetric": weights.symmetric,
        "strategy": "group" if weights.group_size else "channel",
        "group_size": weights.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {
        "targets": ["Linear"],
        "weights": weight_args,
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": format_name,
        "quantization_status": "compressed",
        "version": _VERSION,
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": kept,
        "config_groups": {"group_0": group},
    }


def _only_group(config: dict[str, Any]) -> dict[str, Any]:
    groups = config.get("config_groups") or {}
    require(
        isinstance(groups, dict) and len(groups) == 1, "config_groups must hold exactly one group (others: not yet)"
    )
    (group,) = groups.values()
    require(isinstance(group, dict) and isinstance(group.get("weights"), dict), "the config group has no weights")
    require(
        group["weights"].get("type") == "int", f"weights of type {group['weights'].get('type')!r} are not supported"
    )
    require(not config.get("transform_config"), "transform_config is not supported")
    actorder = group["weights"].get("actorder")
    require(actorder in (None, "static", "weight", "group"), f"actorder {actorder!r} is not supported")
    return group


def scattered(config: dict[str, Any]) -> bool:
    """Whether the members of a group lie scattered, so that every layer must have its ORDER_SUFFIX."""
    return bool(config.get("config_groups")) and _only_group(config)["weights"].get("actorder") == "group"


class PackQuantized:
    """weight_packed int32 [out, ceil(in * bits / 32)], weight_scale [out, groups], weight_shape int64 [2];
    weight_zero_point int32 [ceil(out * bits / 32), groups] where asymmetric.

    weight_g_idx int32 [in], where actorder was "group", is read and never written: newer readers know it no more."""

    name = "compressed-tensors"
    quant_method = "compressed-tensors"
    tags = ("pack-quantized",)
    marker = "weight_packed"
    suffixes = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", ORDER_SUFFIX)
    holds_order = False

    def problems(self, scheme: Scheme, shape: tuple[int, ...]) -> list[str]:
        if scheme.code != "int" or scheme.activations:
            return [f"{self.name} pack-quantized holds weight-only integers, not {scheme.name}"]
        return []

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def write(self, qtensor: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        assert qtensor.order is None, "holds_order says that this format has no place for it"
        tensors = {
            "weight_packed": qtensor.codes.contiguous(),
            "weight_scale": qtensor.scales,
            "weight_shape": torch.tensor(qtensor.shape, dtype=torch.int64),
        }
        if qtensor.zeros is not None:
            tensors["weight_zero_point"] = pack(qtensor.zeros.t(), qtensor.scheme.bits).t().contiguous()
        return tensors

    def read(self, scheme: Scheme, tensors: dict[str, Tensor]) -> QTensor:
        stored = tensors["weight_shape"]
        require(
            stored.dtype in (torch.int64, torch.int32) and stored.shape == (2,) and bool((stored > 0).all()),
            f"weight_shape is {stored}, expected two positive whole numbers",
        )
        shape = stored.tolist()
        zeros = None
        if (packed := tensors.get("weight_zero_point")) is not None:
            require(not scheme.symmetric, "weight_zero_point does not belong to a symmetric scheme")
            size = (words(shape[0], scheme.bits), scheme.groups(shape[1]))
            require(packed.dtype == torch.int32, f"weight_zero_point has dtype {packed.dtype}, expected torch.int32")
            require(packed.shape == size, f"weight_zero_point has shape {list(packed.shape)}, expected {list(size)}")
            zeros = unpack(packed.t(), scheme.bits, shape[0]).t().contiguous()
        codes, order = tensors["weight_packed"], None
        if (g_idx := tensors.get(ORDER_SUFFIX)) is not None:
            found = list(g_idx.shape)
            require(found == shape[1:], f"{ORDER_SUFFIX} has shape {found}, expected {shape[1:]}")
            order = read_order(ORDER_SUFFIX, g_idx, scheme)
            codes = gather_codes(codes, order, scheme.bits)
        return QTensor(scheme, (shape[0], shape[1]), codes, tensors["weight_scale"], zeros, order=order)

    def quantization_config(self, scheme: Scheme, kept: list[str], dtype: torch.dtype) -> dict[str, Any]:
        return _config("pack-quantized", scheme, None, kept)

    def scheme(self, config: dict[str, Any]) -> Scheme:
        group = _only_group(config)
        weights = group["weights"]
        require(group.get("input_activations") is None, "quantized activations with packed weights are not supported")
        strategy = weights.get("strategy")
        require(strategy in ("group", "channel"), f"strategy {strategy!r} is not supported, only group and channel")
        size = weights["group_size"] if strategy == "group" else None
        return integer_scheme(weights["num_bits"], size, weights["symmetric"])


class IntQuantized:
    """weight int8 [out, in] and weight_scale [out, 1]; activations are quantized per token as they come."""

    name = "int-quantized"
    quant_method = "compressed-tensors"
    tags = ("int-quantized",)
    holds_order = False
    marker = "weight_scale"
    suffixes = ("weight", "weight_scale")

    def problems(self, scheme: Scheme, shape: tuple[int, ...]) -> list[str]:
        return [] if scheme.activations else [f"{self.name} holds int8-dynamic, not {scheme.name}"]

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def write(self, qtensor: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        codes = unpack(qtensor.codes, 8, qtensor.shape[1])
        return {"weight": (codes ^ 128).view(torch.int8), "weight_scale": qtensor.scales}

    def read(self, scheme: Scheme, tensors: dict[str, Tensor]) -> QTensor:
        weight = tensors["weight"]
        require(weight.dtype == torch.int8, f"weight has dtype {weight.dtype}, expected int8")
        require(weight.dim() == 2, f"weight has shape {list(weight.shape)}")
        codes = pack(weight.view(torch.uint8) ^ 128, 8)
        return QTensor(scheme, (weight.shape[0], weight.shape[1]), codes, tensors["weight_scale"])

    def quantization_config(self, scheme: Scheme, kept: list[str], dtype: torch.dtype) -> dict[str, Any]:
        activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        return _config("int-quantized", scheme, activations, kept)

    def scheme(self, config: dict[str, Any]) -> Scheme:
        group = _only_group(config)
        weights, inputs = group["weights"], group.get("input_activations")
        fits = (
            (weights.get("num_bits"), weights.get("strategy"), weights.get("symmetric")) == (8, "channel", True)
            and isinstance(inputs, dict)
            and (inputs.get("num_bits"), inputs.get("strategy"), inputs.get("dynamic")) == (8, "token", True)
        )
        require(fits, "int-quantized is read for 8-bit channel weights with dynamic per-token activations only")
        return Scheme.parse("int8-dynamic")
