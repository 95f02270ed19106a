"""What it depends on whether a runtime loads a checkpoint: of one that lies on the disk, or of one that is planned."""

import re
from collections.abc import Iterable, Mapping

from transformers import PreTrainedModel

from bitpress.kernels.scheme import Scheme

from ..formats.base import Facts, Format
from ..models.structure import ParameterPath, TensorNames, auto_class, decoder


def facts_of(
    format: Format,
    model: PreTrainedModel,
    names: TensorNames,
    targets: Mapping[str, ParameterPath],
    layers: Mapping[str, tuple[Scheme, tuple[int, int]]],
    kept: Iterable[str],
    ordered: bool = False,
    embeddings: Iterable[str] = (),
) -> Facts:
    """The facts of a quantized checkpoint.

    Args:
        model: of config.json, on the device meta. names: of its tensors.
        targets: quantized layer -> where its weight goes. layers: quantized layer -> its scheme, and [out, in].
        kept: linear layers that are not quantized. ordered: whether some layer has act-order.
        embeddings: quantized layers that are embeddings.
    """
    config = model.config.get_text_config(decoder=True)
    counts = [getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads")]
    heads = counts[0] if isinstance(counts[0], int) else 1
    return Facts(
        format=format,
        schemes={name: scheme for name, (scheme, _) in layers.items()},
        ordered=ordered,
        shapes={name: shape for name, (_, shape) in layers.items()},
        split=_split(model, targets),
        experts=frozenset(layer for layer, target in targets.items() if target.expert),
        joined_experts=any(target.expert and target.parameter not in names.merged for target in targets.values()),
        model_type=str(config.model_type),
        heads=(heads, counts[1] if isinstance(counts[1], int) and counts[1] > 0 else heads),
        kept=frozenset(kept),
        auto_class=auto_class(model.config).__name__,
        blocks=decoder(model),
        embeddings=frozenset(embeddings),
    )


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
