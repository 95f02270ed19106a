"""Trains a quantized model's scales and norms end to end, so that it says what the unquantized model says.

This is quantization-aware training with distillation. The codes stay; the scales are trained, as in EfficientQAT's
second phase (E2E-QP, arXiv 2407.11062). The loss is the KL divergence from the unquantized model's next tokens (Hinton
et al., arXiv 1503.02531). What comes out is stored like any other quantized model. Here:
- The start is whatever the recipe makes without distillation: by any method, with a transform, within a budget.
- Scales and norms are learned as factors of what they were, by Adam.
- Some calibration windows are held out. What is kept is the state with the least divergence on them, as it would be
  stored, the start included.
- The whole model is in memory, once as it was and once as it is learned, in float32.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.kernels.activations.base import straight_through
from bitpress.kernels.qtensor import QTensor

from ..config.schema import Distill
from ..data.calibration import hold_out
from ..errors import ConfigError
from ..methods.learned import LearnedScales
from ..models.quantized import read_quantized
from ..models.stored_layer import read_layer
from ..models.structure import weight_kind
from ..storage import files, journal
from ..storage.checkpoint import Checkpoint
from ..system.progress import OnStep
from .block_runner import BlockRunner, Stored
from .plan import Plan, PlannedTensor
from .recipe import Recipe

_BETAS = (0.9, 0.95)
_WARM_UP = 10  # steps until the full rate: Adam's first steps know no scale of the gradient
CHECKS = 10  # times that the held-out divergence is taken, and the state saved
MOST_HELD_OUT = 8  # windows that judge what is learned from the others


@dataclass(frozen=True)
class Quantized:
    """A quantized model's tensors, of a plan: a layer's QTensor by the layer's name, all others by their own."""

    layers: Mapping[str, QTensor]
    others: Mapping[str, Tensor]

    @staticmethod
    def read(checkpoint: Checkpoint, plan: Plan) -> "Quantized":
        """What an artifact's files hold; every value is checked."""
        contents = read_quantized(checkpoint)
        layers = {
            planned.module: read_layer(checkpoint, contents.format, contents.schemes[planned.module], planned.module)
            for planned in plan.quantized
        }
        return Quantized(layers, {t.info.name: checkpoint.read(t.info.name) for t in plan.tensors if not t.spec})

    def stored(self, planned: PlannedTensor) -> Stored:
        """A tensor, or a quantized layer."""
        return self.layers[planned.module] if planned.spec else self.others[planned.info.name]


class _Norm:
    """A norm's weight as a function of what is learned: a factor for each value."""

    def __init__(self, start: Tensor, device: torch.device):
        self.start = start
        self.value = start.to(device, torch.float32)
        self.factors = torch.ones_like(self.value, requires_grad=True)

    def weight(self) -> Tensor:
        return self.value * self.factors

    @torch.no_grad()
    def stored(self) -> Tensor:
        """The weight in the dtype that it has in the files."""
        return self.weight().to("cpu", self.start.dtype)


class Student:
    """A model that is both: unquantized as it stands, and quantized as long as `weights` lasts."""

    def __init__(self, runner: BlockRunner, plan: Plan, start: Quantized, scales: Mapping[str, LearnedScales]):
        """Show a whole model; `runner` has all its weights, unquantized, in memory.

        Args:
            start: the quantized model. scales: by layer, what is learned; other layers stay as they are.
        """
        self._runner = runner
        self._plan = {planned.module if planned.spec else planned.info.name: planned for planned in plan.tensors}
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in runner.model.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    places.setdefault(id(parameter), []).append((module, leaf))
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        self._fixed: dict[str, Tensor] = {}
        self.norms: dict[str, _Norm] = {}
        for name, planned in self._plan.items():
            if planned.spec:
                parameter = runner.layer(planned)._parameters["weight"]
            elif planned.target.expert or planned.target.converter or not runner.names.known(planned.target.parameter):
                continue  # no transform changes these, so they are what they are in the unquantized model
            else:
                path, _, leaf = planned.target.parameter.rpartition(".")
                parameter = runner.model.get_submodule(path)._parameters.get(leaf)  # None for a buffer
            if parameter is None or parameter.is_meta:
                continue
            self._places[name] = places[id(parameter)]  # a head that is tied to an embedding is in two places
            if planned.spec is None:
                own = start.others[name]
                if own.dim() == 1 and name.endswith(".weight") and weight_kind(runner.model, planned.target) is None:
                    self.norms[name] = _Norm(own, runner.device)
                elif not torch.equal(own.to(parameter), parameter):
                    self._fixed[name] = own.to(parameter)
            elif name not in scales:
                self._fixed[name] = start.layers[name].dequantize().to(runner.device)
        self._inputs = {
            name: (activations, {key: tensor.to(runner.device) for key, tensor in start.layers[name].extra.items()})
            for name, planned in self._plan.items()
            if name in self._places and planned.spec and (activations := planned.spec.scheme.activations)
        }

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [context, vocabulary] for token ids [context], float32."""
        return self._runner.whole_logits(ids.unsqueeze(0))[0].float()

    @contextmanager
    def weights(self, learned: Mapping[str, Tensor]) -> Iterator[None]:
        """Meanwhile the model has these weights, layers' [out, in], and else what the start has; it rounds inputs, too.

        Rounded inputs pass the gradient on as if they were not rounded.
        """
        before = []
        with ExitStack() as stack:
            for name, (activations, tensors) in self._inputs.items():

                def rounded(module: nn.Module, arguments: Any, own: Any = activations, stored: Any = tensors) -> Any:
                    return (straight_through(own, arguments[0], stored), *arguments[1:])

                for module, _ in self._places[name]:
                    stack.callback(module.register_forward_pre_hook(rounded).remove)
            try:
                for name, weight in {**self._fixed, **learned}.items():
                    own = weight.t() if self._plan[name].kind == "conv1d" else weight
                    for module, leaf in self._places[name]:
                        before.append((module, leaf, module._parameters[leaf]))
                        module._parameters[leaf] = own  # type: ignore[assignment]
                yield
            finally:
                for module, leaf, parameter in reversed(before):
                    module._parameters[leaf] = parameter


@dataclass(frozen=True)
class Distilled:
    """What distillation made of a model, and how it went.

    learned: layers and norms that were learned, as they are stored; those of the start where nothing was better.
    curve: (steps done, mean KL divergence over the held-out tokens in nats), from before the first step on.
    losses: (steps done, mean KL divergence over the tokens of the steps since the last one).
    """

    learned: Quantized
    curve: list[tuple[int, float]]
    losses: list[tuple[int, float]]

    def to_dict(self) -> dict[str, Any]:
        best, least = min(self.curve, key=lambda point: point[1])
        figures = {"steps": self.curve[-1][0], "kept_at": best, "kl_before": self.curve[0][1], "kl_after": least}
        return {**figures, "curve": self.curve, "losses": self.losses, "layers": len(self.learned.layers)}


def _divergence(expected: Tensor, logits: Tensor) -> Tensor:
    """The sum over tokens of the KL divergence of logits [tokens, vocabulary] from the expected ones, in nats."""
    p, q = expected.log_softmax(-1), logits.log_softmax(-1)
    return nn.functional.kl_div(q, p, reduction="sum", log_target=True)


class _Training:
    """The steps, each of which depends on nothing but the state before it and its number."""

    def __init__(self, student: Student, scales: Mapping[str, LearnedScales], ids: Tensor, options: Distill):
        self.windows, self.held_out = hold_out(ids, MOST_HELD_OUT)
        self.student, self.scales, self.options = student, scales, options
        self.learned: dict[str, LearnedScales | _Norm] = {**scales, **student.norms}
        self.parameters = [each.factors for each in self.learned.values()]
        groups = ((scales, options.rate), (student.norms, options.norm_rate))
        self.optimizer = torch.optim.Adam(
            [{"params": [each.factors for each in own.values()], "rate": rate} for own, rate in groups if own],
            betas=_BETAS,
        )
        self.best = [each.detach().clone() for each in self.parameters]

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, by name."""
        tensors: dict[str, Tensor] = {}
        for number, (parameter, best) in enumerate(zip(self.parameters, self.best, strict=True)):
            own = self.optimizer.state[parameter]
            moments = {"value": parameter.detach(), "best": best, "mean": own["exp_avg"], "square": own["exp_avg_sq"]}
            tensors |= {f"{number}/{name}": tensor.cpu() for name, tensor in moments.items()}
        return tensors

    def resume(self, stored: Checkpoint, done: int) -> None:
        for number, parameter in enumerate(self.parameters):
            read = {
                name: stored.read(f"{number}/{name}").to(parameter.device)
                for name in ("value", "best", "mean", "square")
            }
            parameter.data.copy_(read["value"])
            self.best[number] = read["best"]
            moments = {"exp_avg": read["mean"], "exp_avg_sq": read["square"]}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(done)), **moments}

    @torch.no_grad()
    def stored_weights(self) -> dict[str, Tensor]:
        """The learned weights as the files would give them back."""
        weights = {name: each.qtensor().dequantize() for name, each in self.scales.items()}
        return weights | {name: each.stored().to(each.value) for name, each in self.student.norms.items()}

    @torch.no_grad()
    def held_out_error(self) -> float:
        """The mean divergence over the held-out tokens, of what is stored, in nats."""
        weights, total = self.stored_weights(), 0.0
        for ids in self.held_out:
            expected = self.student(ids)
            with self.student.weights(weights):
                total += _divergence(expected, self.student(ids)).item()
        return total / self.held_out.numel()

    def windows_of(self, step: int) -> Tensor:
        """The windows that a step learns from, [windows, context]: each is read once before any is read again."""
        size, total = min(self.options.windows, len(self.windows)), len(self.windows)
        epoch, place = divmod(step, total // size)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(epoch))
        return self.windows[order[place * size : (place + 1) * size]]

    def step(self, number: int) -> float:
        """Take a step; returns the mean divergence over its tokens.

        One window is in memory at a time, with what its gradient needs. Gradients of weights are summed over the
        windows, and become gradients of scales once.
        """
        total, ids = 0.0, self.windows_of(number)
        with torch.enable_grad():
            weights = {name: each.weight() for name, each in self.learned.items()}
            leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
            for window in ids:
                with torch.no_grad():
                    expected = self.student(window)
                with self.student.weights(leaves):
                    loss = _divergence(expected, self.student(window)) / ids.numel()
                    loss.backward()
                total += loss.item()
            self.optimizer.zero_grad()
            used = [name for name, leaf in leaves.items() if leaf.grad is not None]  # not experts without a token
            torch.autograd.backward([weights[name] for name in used], [leaves[name].grad for name in used])
        steps = self.options.steps
        share = min(1.0, (number + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * number / steps))
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * share
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        return total


def distill(plan: Plan, recipe: Recipe, start: Quantized, folder: Path, on_step: OnStep) -> Distilled:
    """The quantized model `start`, its scales and norms trained; `folder` keeps the state, to go on after a crash.

    Args:
        on_step: called with (steps done, steps in all).
    Raises:
        ConfigError: fewer than two windows of calibration text.
    """
    assert recipe.calibration
    assert recipe.distill
    options, ids = recipe.distill, recipe.calibration.ids
    if len(ids) < 2:
        raise ConfigError(
            "distill was given 1 window of calibration text, and holds some out to judge what it learns from the "
            "others; give at least 2 (calibration: {windows: 128})"
        )
    outside = [replace(planned, spec=None) for planned in plan.tensors if planned.block is None]
    runner = BlockRunner(plan.checkpoint, outside, ids[:1], torch.float32, recipe.device)
    with runner.whole_model(plan.units):
        scales = {
            planned.module: LearnedScales(start.layers[planned.module].to(runner.device))
            for planned in plan.quantized
            if planned.block is not None and planned.spec
            if planned.spec.scheme.weight.description().type == "int"
        }
        student = Student(runner, plan, start, scales)
        scales = {name: each for name, each in scales.items() if name in student._places}
        training = _Training(student, scales, ids, options)
        files.make_folder(folder)
        log = journal.Journal(folder / journal.NAME)
        curve, losses, done = _resumed(training, log, folder)
        if not curve:
            curve = [(0, training.held_out_error())]
        since: list[float] = []
        for number in range(done, options.steps):
            on_step(number, options.steps)
            since.append(training.step(number))
            if (number + 1) * CHECKS // options.steps == number * CHECKS // options.steps:
                continue
            error = training.held_out_error()
            if error < min(least for _, least in curve):
                training.best = [each.detach().clone() for each in training.parameters]
            curve.append((number + 1, error))
            losses.append((number + 1, math.fsum(since) / len(since)))
            since = []
            _save(training, log, folder, {"step": number + 1, "curve": curve, "losses": losses})
        on_step(options.steps, options.steps)
        for parameter, best in zip(training.parameters, training.best, strict=True):
            parameter.data.copy_(best)
        layers = {name: each.qtensor().to("cpu") for name, each in scales.items()}
        return Distilled(
            Quantized(layers, {name: norm.stored() for name, norm in student.norms.items()}), curve, losses
        )


def _file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.safetensors"


def _resumed(
    training: _Training, log: journal.Journal, folder: Path
) -> tuple[list[tuple[int, float]], list[tuple[int, float]], int]:
    """The curve, the losses and the steps of the last state that is there as it was written; nothing at all else."""
    for line in reversed(log.entries):
        path = _file(folder, line["step"])
        if path.exists() and files.sha256_file(path) == line["sha256"]:
            training.resume(Checkpoint.single(path), line["step"])
            curve, losses = ([(int(step), float(value)) for step, value in line[key]] for key in ("curve", "losses"))
            return curve, losses, line["step"]
    return [], [], 0


def _save(training: _Training, log: journal.Journal, folder: Path, line: dict[str, Any]) -> None:
    """Save the state, and then delete the one before it."""
    path = _file(folder, line["step"])
    log.append({**line, **files.write_safetensors(path, training.state())})
    for other in folder.glob("step-*.safetensors"):
        if other != path:
            other.unlink()
