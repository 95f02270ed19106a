"""Where quantization hurts: how far the outputs of layers and blocks are from those of the model they were made from.

An output's relative error is ||y' - y|| / ||y||, norms over all tokens and channels; y is the unquantized model's.

- output_error: of y' that the quantized layer or block puts out for the unquantized model's own inputs: what it does
  wrong by itself.
- cumulative_error: of what the quantized model's block puts out, which reads what the blocks before it got wrong.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .protocols import Window

OnStep = Callable[[int, int], None]
See = Callable[[int, tuple, dict, Tensor], None]  # a module's number, arguments, options and output
TOKENS = 512  # of each window: errors hardly depend on the position, and all blocks' outputs are held
WORST = 3  # channels told of each layer


class _Error:
    """Sums of squares over tokens, for each channel."""

    def __init__(self) -> None:
        self.wrong: Tensor | float = 0.0
        self.right: Tensor | float = 0.0

    def add(self, found: Tensor, expected: Tensor) -> None:
        channels = expected.shape[-1]
        expected = expected.reshape(-1, channels).float()
        self.wrong = self.wrong + (found.reshape(-1, channels).float() - expected).square().sum(0)
        self.right = self.right + expected.square().sum(0)

    def relative(self) -> float | None:
        """None where there was nothing to be wrong about."""
        right, wrong = (sums.double().sum().item() for sums in self._sums())
        return (wrong / right) ** 0.5 if right else None

    def _sums(self) -> tuple[Tensor, Tensor]:
        return torch.as_tensor(self.right), torch.as_tensor(self.wrong)

    def worst(self) -> list[dict[str, Any]]:
        """The channels with the largest part in the error: {"channel", "share" of the squared error, "error"}."""
        right, wrong = (sums.double() for sums in self._sums())
        total = wrong.sum().item()
        if not total:
            return []
        found = wrong.topk(min(WORST, wrong.numel())).indices.tolist()
        return [
            {
                "channel": channel,
                "share": wrong[channel].item() / total,
                "error": (wrong[channel] / right[channel]).sqrt().item() if right[channel] else None,
            }
            for channel in found
        ]


def pairs(baseline: nn.Module, model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(name, unquantized, quantized) of each layer that is of another kind in the quantized model."""
    there = dict(model.named_modules())
    for name, layer in baseline.named_modules():
        changed = name in there and type(there[name]) is not type(layer)
        if changed and not any(layer.children()) and getattr(layer, "weight", None) is not None:
            yield name, layer, there[name]


def _output(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple | list) else found


@contextmanager
def _watched(modules: Iterable[nn.Module], see: See) -> Iterator[None]:
    """see(number, arguments, options, output) after each call of the number-th module."""
    handles = []
    for number, module in enumerate(modules):

        def hook(_: Any, arguments: tuple, options: dict, found: Any, number: int = number) -> None:
            see(number, arguments, options, _output(found))

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Twins:
    """Modules that stand in each other's place, and the error of the quantized ones."""

    old: list[nn.Module]
    new: list[nn.Module]
    errors: list[_Error]

    @staticmethod
    def of(old: Iterable[nn.Module], new: Iterable[nn.Module]) -> "_Twins":
        twins = list(zip(old, new))
        return _Twins([one for one, _ in twins], [other for _, other in twins], [_Error() for _ in twins])

    def watched(self) -> AbstractContextManager[None]:
        """Each call of an unquantized module is repeated by its twin, on the same inputs."""

        def see(number: int, arguments: tuple, options: dict, expected: Tensor) -> None:
            self.errors[number].add(_output(self.new[number](*arguments, **options)), expected)

        return _watched(self.old, see)


class _Outputs(list[Tensor]):
    """Of each block of the unquantized model, for one window."""

    def add(self, number: int, arguments: tuple, options: dict, found: Tensor) -> None:
        self.append(found)

    def compared(self, errors: list[_Error]) -> See:
        """Adds up how far those of the quantized model's blocks are from them."""

        def see(number: int, arguments: tuple, options: dict, found: Tensor) -> None:
            errors[number].add(found, self[number])

        return see


@torch.inference_mode()
def output_errors(
    baseline: nn.Module,
    model: nn.Module,
    windows: Sequence[Window],
    blocks: str,
    on_step: OnStep = lambda done, total: None,
) -> dict[str, Any]:
    """Errors of layers and blocks, over the first TOKENS tokens of each window; costs about four forwards of each.

    Args:
        blocks: the name of the list of decoder blocks in both models, such as "model.layers".
    Returns:
        {"tokens", "layers": [{"name", "block", "output_error", "worst_channels"}], "blocks": [{"block",
        "output_error", "cumulative_error"}]}; errors are None where the output is zero, or where
        nothing reached a layer, as may happen to experts.
    """
    changed = list(pairs(baseline, model))
    layers = _Twins.of((layer for _, layer, _ in changed), (twin for _, _, twin in changed))
    whole = _Twins.of(_children(baseline, blocks), _children(model, blocks))
    cumulative = [_Error() for _ in whole.old]
    for number, window in enumerate(windows):
        on_step(number, len(windows))
        ids = window.ids[:TOKENS].unsqueeze(0)
        outputs = _Outputs()
        with layers.watched(), whole.watched(), _watched(whole.old, outputs.add):
            baseline(input_ids=ids, use_cache=False)
        with _watched(whole.new, outputs.compared(cumulative)):
            model(input_ids=ids, use_cache=False)
    on_step(len(windows), len(windows))
    return {
        "tokens": sum(min(TOKENS, window.ids.numel()) for window in windows),
        "layers": [
            {"name": name, "block": _block(name, blocks), "output_error": e.relative(), "worst_channels": e.worst()}
            for (name, _, _), e in zip(changed, layers.errors)
        ],
        "blocks": [
            {"block": number, "output_error": own.relative(), "cumulative_error": both.relative()}
            for number, (own, both) in enumerate(zip(whole.errors, cumulative))
        ],
    }


def _children(model: nn.Module, blocks: str) -> list[nn.Module]:
    return list(model.get_submodule(blocks).children())


def _block(name: str, blocks: str) -> int | None:
    rest = name.removeprefix(f"{blocks}.")
    return int(rest.partition(".")[0]) if rest != name else None
