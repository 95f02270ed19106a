"""MXFP4 as gpt-oss is published: the experts of a block in one tensor of E2M1 codes and one of E8M0 scales.

Sources: gpt_oss/torch/weights.py of OpenAI; OCP Microscaling Formats v1.0, section 5.3.3.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..tensor_info import TensorInfo
from .base import CodedWeight, Coding, Source, set_aside

_CODES, _SCALES = "_blocks", "_scales"
_GROUP = 32  # codes in the 16 bytes of a block, and of one scale


class Mxfp4(Source):
    """`X_blocks` [experts, out, in / 32, 16] and `X_scales` [experts, out, in / 32] are X [experts, in, out]."""

    name = "mxfp4"
    rank = 40
    quant_methods = ("mxfp4",)

    def coding(self, section: Mapping[str, Any], stored: Mapping[str, TensorInfo]) -> Coding:
        coding = Coding()
        stems = {
            name.removesuffix(ending): None for name in stored for ending in (_CODES, _SCALES) if name.endswith(ending)
        }
        for stem in stems:
            codes, scales = stored.get(stem + _CODES), stored.get(stem + _SCALES)
            if codes is None or scales is None:
                absent = stem + (_SCALES if codes else _CODES)
                coding.problems.append(f"{absent} is missing, which belongs to {(codes or scales).name}")  # type: ignore[union-attr]
            elif {codes.dtype, scales.dtype} != {torch.uint8}:
                coding.problems.append(f"{codes.name} is {codes.dtype}, {scales.name} {scales.dtype}, expected uint8")
            elif len(codes.shape) != 4 or codes.shape[3] != _GROUP // 2 or 0 in codes.shape:
                coding.problems.append(
                    f"{codes.name} has shape {list(codes.shape)}, expected [experts, out, in / 32, 16]"
                )
            elif scales.shape != codes.shape[:3]:
                coding.problems.append(
                    f"{scales.name} has shape {list(scales.shape)}, expected {list(codes.shape[:3])} like {codes.name}"
                )
            else:
                experts, out, groups, _ = codes.shape
                shape = (experts, out, groups * _GROUP)
                coding.weights[stem] = CodedWeight(codes, shape, scales, (1, _GROUP), transposed=True)
        set_aside(coding, stored, ())
        return coding


PLUGINS = (Mxfp4(),)
