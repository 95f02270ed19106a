"""Why a quantized model may be slower than its baseline: which kernels ran, and the work that they have to do."""

from collections.abc import Mapping
from typing import Any

_REFERENCE = "reference"  # in metrics.json, the kernel that runs what no other kernel can
_CACHED = 1.0  # with a larger share of the memory's bandwidth, a cache must hold the weights
_IDLE = 0.3  # with a smaller share, something other than memory limits decode


def why_slower(run: Mapping[str, Any], speed: Mapping[str, Any], phase: str) -> str | None:
    """The reasons in a few words; None where none is known.

    Args:
        run: a metrics.json. Its "kernels" have "selected", the number of layers by kernel; "quantized_inputs", the
            number of layers whose scheme quantizes the inputs; and "rounded_inputs", whose "layers" are those whose
            inputs the kernel rounds although their scheme does not ask for it.
        speed: one of its measured speeds, slower than the baseline's.
        phase: "prefill" or "decode".
    """
    kernels = run.get("kernels") or {}
    selected = kernels.get("selected") or {}
    layers, slow = sum(selected.values()), selected.get(_REFERENCE, 0)
    quantized = (kernels.get("quantized_inputs") or 0) + ((kernels.get("rounded_inputs") or {}).get("layers") or 0)
    reasons = []
    if slow:
        reasons.append(
            f"{slow} of {layers} layers run on the reference kernel, which decodes the whole weight at every call"
        )
    if quantized:
        reasons.append("activations are quantized before each product, which small layers do not outweigh")
    if phase == "prefill" and layers > slow + quantized:
        reasons.append(
            "a prompt is limited by arithmetic: the weights are unpacked to 16 or 32 bits before each product, and "
            "reading fewer bytes saves nothing here"
        )
    share = speed.get("bandwidth_share")
    if phase == "decode" and share is not None:
        if share > _CACHED:
            reasons.append("the weights lie in the processor's cache, so that fewer bytes save nothing")
        elif share < _IDLE:
            reasons.append(
                f"it uses {100 * share:.0f}% of the memory's bandwidth: calls and arithmetic take the time, not bytes"
            )
    return ", and ".join(reasons) or None
