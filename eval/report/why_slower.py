"""Why a quantized model may be slower than its baseline: from which kernels ran, and what they have to do."""

from collections.abc import Mapping
from typing import Any

_UNPACKS = "the weights are unpacked to 16 or 32 bits before each product, and reading fewer bytes saves nothing here"
_QUANTIZES_INPUTS = {"torch-int8", "triton-int8", "native-int8"}
_CACHED = 1.0  # a share of the memory's bandwidth above which a cache must hold the weights
_IDLE = 0.3  # a share below which something else than memory is what limits decode


def because(run: Mapping[str, Any], speed: Mapping[str, Any], phase: str) -> str | None:
    """A reason, in a few words; None where nothing is known.

    Args:
        run: a metrics.json. speed: one of its measured speeds, slower than the baseline's. phase: prefill or decode.
    """
    kernels = (run.get("kernels") or {}).get("selected") or {}
    reasons = []
    if slow := kernels.get("reference"):
        layers = sum(kernels.values())
        reasons.append(
            f"{slow} of {layers} layers run on the reference kernel, which decodes the whole weight at every call"
        )
    if kernels.keys() & _QUANTIZES_INPUTS:
        reasons.append("activations are quantized before each product, which small layers do not outweigh")
    if phase == "prefill" and set(kernels) - {"reference"} - _QUANTIZES_INPUTS:
        reasons.append(f"a prompt is limited by arithmetic: {_UNPACKS}")
    share = speed.get("bandwidth_share")
    if phase == "decode" and share is not None:
        if share > _CACHED:
            reasons.append("the weights lie in the processor's cache, so that fewer bytes save nothing")
        elif share < _IDLE:
            reasons.append(
                f"it uses {100 * share:.0f}% of the memory's bandwidth: calls and arithmetic take the time, not bytes"
            )
    return ", and ".join(reasons) or None
