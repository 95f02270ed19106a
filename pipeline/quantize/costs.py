"""What quantizing a layer costs in KL divergence, estimated from the gradient of the model's logits.

To the second order, a token's KL divergence is half of d^T F d: d is the error of its logits, and F = diag(p) - p p^T
the Fisher information of its probabilities p. For a random vector v whose mean of v v^T is F, that is half of the mean
of (v . d)^2. To the first order, v . d summed over the tokens of a window is a sum of g * e over tokens, layers and
their outputs: e is the error of an output, and g the gradient of v . logits by it. What is added over a layer's outputs
are squares of sums over tokens: the tokens' errors come of the same weights, and in values attention adds them up;
different outputs' have no sign in common. (BRECQ, arXiv 2102.05426, section 3.3, adds the squares of tokens, too: the
diagonal Fisher information. On a Llama with random weights that is a quarter of what v_proj costs.)

One pass forward and one back through the blocks give the costs of all layers by all choices. One block is in memory at
a time; what each block reads lies on the disk.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor

from ..errors import NumericsError
from ..storage import files
from ..storage.checkpoint import Checkpoint
from ..system.progress import OnStep
from .block_runner import BlockRunner
from .plan import Plan, PlannedTensor
from .spec import LayerSpec

_HIDDEN = "hidden"


def costs_by_gradient(
    plan: Plan,
    choices: Mapping[str, Sequence[LayerSpec]],
    ids: Tensor,
    device: str,
    read: Callable[[PlannedTensor], Tensor],
    solution: Callable[[PlannedTensor], QTensor],
    folder: Path,
    on_step: OnStep,
) -> Iterator[tuple[PlannedTensor, float]]:
    """Each layer by each of its choices, with the mean KL divergence over tokens that it costs, in nats.

    Blocks come last to first. A layer that text alone does not go through costs nothing.

    Args:
        choices: layer -> specs. ids: int64 [windows, context], the text.
        read: gives a tensor of the plan before it is quantized.
        solution: gives a layer as it was quantized by the spec that it has.
        folder: for what blocks read; it is there for as long as this lasts.
        on_step: called with (blocks done, twice as many blocks).
    Raises:
        NumericsError: a cost is NaN or infinite.
    """
    blocks = [(unit.block, unit.tensors) for unit in plan.units if unit.block is not None]
    outside = [planned for planned in plan.tensors if planned.block is None]

    def start() -> BlockRunner:  # a batch for each window: squares are those of a window's sums, and logits are large
        return BlockRunner(plan.checkpoint, outside, ids, plan.activation_dtype, device, read, len(ids))

    def path(number: int) -> Path:
        return folder / f"{number:05d}.safetensors"

    def keep(number: int, inputs: list[Tensor]) -> None:
        on_step(number, 2 * len(blocks))
        if number == 0:
            files.preflight(folder, len(blocks) * sum(each.nbytes for each in inputs))
        files.write_rows(path(number), _HIDDEN, inputs[0].dtype, (*ids.shape, inputs[0].shape[-1]), inputs)

    runner = start()
    files.make_folder(folder)
    gradients = _gradients_of_logits(runner, runner.last_outputs(plan.units, keep))
    runner = start()  # each block is loaded once more
    for _ in runner.embed():  # only what blocks are called with is wanted
        pass
    for number, (block, tensors) in reversed(list(enumerate(blocks))):
        on_step(2 * len(blocks) - 1 - number, 2 * len(blocks))
        weights = {planned.info.name: read(planned) for planned in tensors}
        runner.load_block(block, ((planned, weights[planned.info.name]) for planned in tensors))
        layers = [planned for planned in tensors if planned.module in choices]
        inputs = Checkpoint.single(path(number)).read_rows(_HIDDEN, [1] * len(ids))
        gradients, seen = runner.gradients(layers, inputs, gradients)
        for planned in layers:
            weight = planned.turned(weights[planned.info.name]).to(runner.device, torch.float32)
            for spec in choices[planned.module]:
                quantized = replace(planned, spec=spec)
                qtensor = solution(quantized).to(runner.device)
                own, squares = qtensor.dequantize(torch.float32), 0.0
                for x, gradient in seen[planned.module]:
                    x = x.to(torch.float32)
                    error = x @ (own - weight).t()
                    if (activations := spec.scheme.activations) is not None:
                        error += (activations.apply(x, qtensor.extra) - x) @ own.t()
                    squares += (error * gradient).sum(0).square().sum().item()
                if not math.isfinite(squares):
                    raise NumericsError(
                        f"{planned.module}: what {spec.name} costs is NaN or infinite on the calibration text; its "
                        "inputs overflow, or the model's logits do; use a float32 or bfloat16 checkpoint, or other text"
                    )
                yield quantized, squares / (2 * ids.numel())
        runner.unload_block()
    files.remove_folder(folder)


def _gradients_of_logits(runner: BlockRunner, outputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of v . logits, summed over a window's tokens, by the last block's outputs, for each window.

    v = s - p (1 . s) with s = sqrt(p) * random signs: then the mean of v v^T is diag(p) - p p^T.
    """
    gradients: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    with runner.outside_in_memory():
        for hidden, ids in zip(outputs, runner.batches, strict=True):
            hidden = hidden.to(runner.device).detach().requires_grad_()
            with torch.enable_grad():
                logits = runner.head(hidden, ids)
            p = logits.detach().to(torch.float32).softmax(-1)
            signs = torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8).to(p)
            s = p.sqrt() * (2 * signs - 1)
            v = s - p * s.sum(-1, keepdim=True)
            gradients += torch.autograd.grad(logits, hidden, v.to(logits.dtype))
    return gradients
