"""Where quantization hurts: how far the outputs of layers and blocks are from those of the unquantized model.

The relative error of an output is ||y' - y|| / ||y||, with norms over all tokens and channels. y is the output of the
unquantized model, and y' that of the quantized one.

- output_error: the quantized layer or block reads the unquantized model's own inputs. This is its own error.
- cumulative_error: the quantized model's block reads what the blocks before it put out, so their errors come along.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .protocols import Window

OnStep = Callable[[int, int], None]
See = Callable[[int, tuple, dict, Tensor], None]  # a module's number, arguments, options and output
TOKENS = 512  # tokens of each window: errors hardly depend on the position, and the outputs of all blocks are in memory
WORST = 3  # the number of channels that are reported of each layer


class _Error:
    """Sums of squares over tokens, for each channel, of outputs and of their errors."""

    def __init__(self) -> None:
        self.squared_error: Tensor | float = 0.0
        self.squared_output: Tensor | float = 0.0

    def add(self, output: Tensor, expected: Tensor) -> None:
        channels = expected.shape[-1]
        expected = expected.reshape(-1, channels).float()
        self.squared_error = self.squared_error + (output.reshape(-1, channels).float() - expected).square().sum(0)
        self.squared_output = self.squared_output + expected.square().sum(0)

    def relative(self) -> float | None:
        """The relative error over all channels; None where the expected output is zero."""
        output = torch.as_tensor(self.squared_output).double().sum().item()
        return (torch.as_tensor(self.squared_error).double().sum().item() / output) ** 0.5 if output else None

    def worst(self) -> list[dict[str, Any]]:
        """The WORST channels with the largest part of the error: {"channel", "share" of the squared error, "error"}."""
        outputs, errors = torch.as_tensor(self.squared_output).double(), torch.as_tensor(self.squared_error).double()
        total = errors.sum().item()
        if not total:
            return []
        return [
            {
                "channel": channel,
                "share": errors[channel].item() / total,
                "error": (errors[channel] / outputs[channel]).sqrt().item() if outputs[channel] else None,
            }
            for channel in errors.topk(min(WORST, errors.numel())).indices.tolist()
        ]


def pairs(baseline: nn.Module, model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yields (name, unquantized, quantized) for each layer whose class differs in the quantized model."""
    quantized = dict(model.named_modules())
    for name, layer in baseline.named_modules():
        changed = name in quantized and type(quantized[name]) is not type(layer)
        if changed and not any(layer.children()) and getattr(layer, "weight", None) is not None:
            yield name, layer, quantized[name]


def _first(output: Any) -> Tensor:
    """A module's output, or the first part of it: blocks of some models return a tuple."""
    return output[0] if isinstance(output, tuple | list) else output


@contextmanager
def _watched(modules: Iterable[nn.Module], see: See) -> Iterator[None]:
    """Calls see(number, arguments, options, output) after each call of the number-th module, within the block."""
    handles = []
    for number, module in enumerate(modules):

        def hook(_: Any, arguments: tuple, options: dict, output: Any, number: int = number) -> None:
            see(number, arguments, options, _first(output))

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def output_errors(
    baseline: nn.Module,
    model: nn.Module,
    windows: Sequence[Window],
    blocks: str,
    on_step: OnStep = lambda done, total: None,
) -> dict[str, Any]:
    """Errors of layers and blocks over the first TOKENS tokens of each window; costs about four forwards of each model.

    Args:
        blocks: the name of the list of decoder blocks in both models, such as "model.layers".
    Returns:
        {"tokens", "layers": [{"name", "block", "output_error", "worst_channels"}], "blocks": [{"block",
        "output_error", "cumulative_error"}]}. An error is None where the output is zero, or where no token reached a
        layer, which happens to experts and to cross-attention, which reads images.
    """
    layers = list(pairs(baseline, model))
    old_blocks, new_blocks = (list(m.get_submodule(blocks).children()) for m in (baseline, model))
    # Layers come first, then blocks. Each quantized one repeats the calls of the unquantized one, on the same inputs.
    old = [*(layer for _, layer, _ in layers), *old_blocks]
    new = [*(layer for _, _, layer in layers), *new_blocks]
    errors, cumulative = [_Error() for _ in old], [_Error() for _ in old_blocks]
    outputs: dict[int, Tensor] = {}  # the unquantized blocks' outputs for one window

    def repeat(number: int, arguments: tuple, options: dict, expected: Tensor) -> None:
        errors[number].add(_first(new[number](*arguments, **options)), expected)
        if number >= len(layers):
            outputs[number - len(layers)] = expected

    def accumulate(number: int, arguments: tuple, options: dict, output: Tensor) -> None:
        cumulative[number].add(output, outputs[number])

    for number, window in enumerate(windows):
        on_step(number, len(windows))
        ids = window.ids[:TOKENS].unsqueeze(0)
        outputs.clear()
        with _watched(old, repeat):
            baseline(input_ids=ids, use_cache=False)
        with _watched(new_blocks, accumulate):
            model(input_ids=ids, use_cache=False)
    on_step(len(windows), len(windows))

    def block_of(name: str) -> int | None:
        rest = name.removeprefix(f"{blocks}.")
        return int(rest.partition(".")[0]) if rest != name else None

    return {
        "tokens": sum(min(TOKENS, window.ids.numel()) for window in windows),
        "layers": [
            {"name": name, "block": block_of(name), "output_error": e.relative(), "worst_channels": e.worst()}
            for (name, _, _), e in zip(layers, errors)
        ],
        "blocks": [
            {"block": number, "output_error": own.relative(), "cumulative_error": both.relative()}
            for number, (own, both) in enumerate(zip(errors[len(layers) :], cumulative))
        ],
    }
