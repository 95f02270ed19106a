"""What transformers' model of a checkpoint says of the tensors in its files, in plain values."""

import re
from collections.abc import Mapping
from typing import Any, TypedDict

from transformers import PreTrainedModel

from ..errors import CheckpointError, listing
from ..models.kv_cache import key_value_heads
from ..models.quantized import read_quantized
from ..models.structure import (
    ParameterPath,
    TensorNames,
    auto_class,
    decoder,
    kept_names,
    skeleton,
    tied,
    tied_copies,
    weight_kind,
)
from ..storage.checkpoint import Checkpoint


class Headers(TypedDict):
    """What the headers of a checkpoint say, by the model of its config.json.

    faults: sentences on weights that are missing, or that contradict each other.
    shapes: quantized layer -> [out, in] by config.json. plain: the other tensors. kept: layers that are not quantized,
    and could be. unknown: tensors that the model does not have. mismatches: tensor -> why it does not fit its place.
    cache: of each attention whose cache has stored scales, the names of these, and how many heads there are or None.
    repeated: whether a tensor repeats one that it is tied to, so that their values count, too. model: see model_facts;
    empty where nothing is quantized.
    """

    faults: list[str]
    shapes: dict[str, list[int] | None]
    plain: list[str]
    kept: list[str]
    unknown: list[str]
    mismatches: dict[str, str]
    cache: list[tuple[list[str], int | None]]
    repeated: bool
    model: dict[str, Any]


def quantized_headers(checkpoint: Checkpoint) -> Headers:
    """The headers of a quantized checkpoint.

    Raises:
        CheckpointError: see read_quantized.
    """
    contents = read_quantized(checkpoint)
    names, plain = contents.names, contents.plain
    tensors = {name: checkpoint.tensors[name] for name in plain}
    return {
        "faults": [],
        "shapes": {layer: list(shape) if shape else None for layer, shape in contents.shapes.items()},
        "plain": list(plain),
        "kept": kept_names(tensors, contents.quantized, contents.model, names),
        "unknown": [name for name, target in plain.items() if not names.known(target.parameter)],
        "mismatches": names.mismatches(checkpoint.tensors, plain),
        "cache": [
            (list(scales), key_value_heads(contents.model, path))
            for path, scales in (contents.cache.scales.items() if contents.cache else ())
            if scales
        ],
        "repeated": _repeats(contents.model, plain),
        "model": model_facts(contents.model, names, contents.quantized),
    }


def dense_headers(checkpoint: Checkpoint) -> Headers:
    """The headers of an unquantized checkpoint.

    Raises:
        CheckpointError: transformers builds no model of its config.json, or knows no place for a tensor.
    """
    model = skeleton(checkpoint)
    names = TensorNames(model)
    targets = {name: names.target(name) for name in checkpoint.tensors}
    missing = names.missing(targets.values())
    faults = [f"weights of the model are missing:\n{listing(missing)}"] if missing else []
    try:
        tied_copies(checkpoint, targets, model)
    except CheckpointError as error:
        faults.append(str(error))
    return {
        "faults": faults,
        "shapes": {},
        "plain": list(targets),
        "kept": [],
        "unknown": [name for name, target in targets.items() if not names.known(target.parameter)],
        "mismatches": names.mismatches(checkpoint.tensors, targets),
        "cache": [],
        "repeated": _repeats(model, targets),
        "model": {},
    }


def _repeats(model: PreTrainedModel, targets: Mapping[str, ParameterPath]) -> bool:
    filled = {target.parameter for target in targets.values()}
    return any({parameter, origin} <= filled for parameter, origin in tied(model).items())


def model_facts(model: PreTrainedModel, names: TensorNames, targets: Mapping[str, ParameterPath]) -> dict[str, Any]:
    """The fields of formats.base.Facts that a model decides.

    Args:
        model: of config.json, on the device meta. names: of its tensors.
        targets: quantized layer -> where its weight goes.
    """
    config = model.config.get_text_config(decoder=True)
    counts = [getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads")]
    heads = counts[0] if isinstance(counts[0], int) else 1
    return {
        "split": _split(model, targets),
        "experts": [layer for layer, target in targets.items() if target.expert],
        "embeddings": [layer for layer, target in targets.items() if weight_kind(model, target) == "embedding"],
        "joined_experts": any(t.expert and t.parameter not in names.merged for t in targets.values()),
        "model_type": str(config.model_type),
        "heads": [heads, counts[1] if isinstance(counts[1], int) and counts[1] > 0 else heads],
        "auto_class": auto_class(model.config).__name__,
        "blocks": decoder(model),
    }


def _split(model: PreTrainedModel, targets: Mapping[str, ParameterPath]) -> dict[str, str | None] | None:
    """How tensor parallelism cuts each layer, by the plan that transformers has for the architecture."""
    plan = getattr(type(model.config.get_text_config(decoder=True)), "base_model_tp_plan", None)  # not the checkpoint's
    if not plan:
        return None
    kinds = {re.compile(re.escape(key).replace(r"\*", r"\d+")): str(kind) for key, kind in plan.items()}
    blocks = decoder(model)  # the plan names parts of the decoder: layers.*.mlp.up_proj
    prefix = f"{blocks.rpartition('.')[0]}."
    split: dict[str, str | None] = {}
    for layer, target in targets.items():
        path = target.parameter.removesuffix(".weight").removeprefix(prefix)
        kind = next((kind for pattern, kind in kinds.items() if pattern.fullmatch(path)), "")
        split[layer] = "column" if "colwise" in kind else "row" if "rowwise" in kind else None
    return split
