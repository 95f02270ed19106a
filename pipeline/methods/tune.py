"""gptq's solution, learned further: a block's codes and scales by gradient, so that the block as a whole is off less.

AutoRound (arXiv 2309.05516) learns an offset in [-0.5, 0.5] for each weight before it is rounded, and a factor for each
range, by the sign of the gradient, with a rate that falls to 0. EfficientQAT's Block-AP (arXiv 2407.11062) learns
weights and scales by Adam. Both see a block's output, where gptq sees each layer's own. Here:
- The start is gptq's solution. A weight begins where it was, in units of its scale, but no further than gptq's code
  allows, so every code is gptq's before the first step. Those that lie near a boundary change first.
- Offsets and scales are learned by Adam. Descent by the gradient's sign at a rate of 1/steps was tried once, on one
  block for 100 steps, and ended worse than gptq. Rounding passes the gradient on as it is (straight-through).
- Some calibration windows are held out. What is kept is the state with the least error on them, gptq's included.
"""

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from .base import TrainableBlock, Tuned
from .gptq import GPTQ
from .learned import LearnedInteger

_BETAS = (0.9, 0.95)
_WARM_UP = 10  # steps until the full rate: Adam's first steps know no scale of the gradient
_CHECKS = 10  # times that the held-out error is taken


@dataclass(frozen=True, config=ConfigDict(strict=True))
class Tune(GPTQ):
    """The method and its options; those of gptq come first, for the solution that it begins with.

    steps: gradient steps for each block, each on one batch of calibration tokens.
    rate: of the weights, in steps of their codes, at the first step; it falls to 0 along a cosine.
    scale_rate: of the scales, as a fraction of each.
    """

    steps: Annotated[int, Field(ge=1, le=100_000)] = 200
    rate: Annotated[float, Field(gt=0, le=1)] = 0.0005
    scale_rate: Annotated[float, Field(ge=0, le=1)] = 0.004

    name: ClassVar[str] = "tune"
    rank: ClassVar[int] = 40
    version: ClassVar[int] = 1 + GPTQ.version  # it goes up with either

    def learning_passes(self, batches: int) -> float:
        """A step's forward and backward are three passes of one batch; a check reads the batches that are held out."""
        return 3 * self.steps / batches + _CHECKS * math.ceil(batches / 8) / batches

    def problems(self, scheme: Scheme) -> list[str]:
        learns = scheme.weight.description().type == "int"  # codes that lie a step of 1 apart
        return super().problems(scheme) if learns else [f"{self.name} learns integer weights, not {scheme.name}"]

    def learn(self, block: TrainableBlock, layers: Mapping[str, QTensor]) -> tuple[dict[str, QTensor], Tuned]:
        learned = {name: LearnedInteger(block.weight(name), qtensor) for name, qtensor in layers.items()}
        least = block.held_out_error(layers)
        best, curve = dict(layers), [(0, least)]
        offsets, factors = ([getattr(each, kind) for each in learned.values()] for kind in ("offsets", "factors"))
        optimizer = torch.optim.Adam(
            [{"params": offsets, "rate": self.rate}, {"params": factors, "rate": self.scale_rate}], betas=_BETAS
        )
        shuffle, order = torch.Generator().manual_seed(0), list[int]()
        for step in range(self.steps):
            order = order or torch.randperm(block.batches, generator=shuffle).tolist()
            with torch.enable_grad():
                loss = block.error(order.pop(), {name: each.weight() for name, each in learned.items()})
                optimizer.zero_grad()
                loss.backward()
            share = min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * share
            optimizer.step()
            block.on_step(step + 1, self.steps)
            if (step + 1) * _CHECKS // self.steps > step * _CHECKS // self.steps:
                state = {name: each.qtensor() for name, each in learned.items()}
                error = block.held_out_error(state)
                curve.append((step + 1, error))
                if error < least:
                    best, least = state, error
        return best, Tuned(tuple(layers), tuple(curve))


PLUGINS = (Tune(),)
