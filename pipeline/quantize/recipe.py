"""How to quantize, settled and checked before any weight is read; and what a finished artifact is known by."""

from dataclasses import dataclass, field
from typing import Any

import torch

from bitpress.kernels.scheme import Scheme

from ..data.calibration import Calibration
from ..errors import ConfigError, nearest
from ..formats import default_format
from ..formats import registry as formats
from ..formats.base import Format
from ..methods import default_method, options_of, with_options
from ..methods import registry as methods
from ..methods.base import Method
from ..storage.checkpoint import Checkpoint
from ..system.device import pick_device
from ..system.versions import releases

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """How to quantize: scheme, method, format, and the layers to keep; names resolved and found compatible.

    calibration: the tokens that the method learns from; None for a method that needs none.
    """

    scheme: Scheme
    method: Method
    format: Format
    skip: list[str] = field(default_factory=list)
    calibration: Calibration | None = None
    max_fallback_layers: int = 0  # where more layers than that fall back to absmax, the job fails
    device: str = "cpu"  # where a method that learns does its work

    @staticmethod
    def make(
        scheme: str,
        method: str = "auto",
        format: str = "auto",
        skip: list[str] | None = None,
        algorithm: dict[str, Any] | None = None,
        max_fallback_layers: int = 0,
        device: str = "auto",
    ) -> "Recipe":
        """From names; "auto" is the default method and the most portable format of the scheme.

        Args:
            algorithm: options of the method, such as {"damping": 1e-3} of gptq.
            device: "cpu", "cuda" or "auto", for methods that learn; the others work on the CPU.
        Raises:
            ConfigError: an unknown name, or things that do not go together.
        """
        try:
            parsed = Scheme.parse(scheme)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for kind, name, known in (("method", method, methods()), ("format", format, formats())):
            if name != "auto" and name not in known:
                hint = nearest(name, known) or f"; use auto or one of {', '.join(known)}"
                raise ConfigError(f"{kind} {name!r} is unknown{hint}")
        chosen = default_method(parsed) if method == "auto" else methods()[method]
        try:
            chosen = with_options(chosen, algorithm or {})
        except ValueError as error:
            raise ConfigError(f"algorithm: {error}") from error
        target = default_format(parsed) if format == "auto" else formats()[format]
        probe = (1024, 32 * (parsed.group_size or 32))
        if problems := [*chosen.problems(parsed), *target.problems(parsed, probe)]:
            raise ConfigError("; ".join(problems))
        where = str(pick_device(device))
        return Recipe(parsed, chosen, target, skip or [], max_fallback_layers=max_fallback_layers, device=where)

    def to_dict(self) -> dict[str, Any]:
        described = {
            "scheme": self.scheme.name,
            "method": self.method.name,
            "method_version": self.method.version,
            "format": self.format.name,
            "skip": list(self.skip),
        }
        described |= {f"algorithm.{name}": value for name, value in options_of(self.method).items()}
        if self.calibration:
            described |= {f"calibration.{name}": value for name, value in self.calibration.to_dict().items()}
        return described


def fingerprint(checkpoint: Checkpoint, source: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Everything that the artifact's bytes depend on, flat: compared field by field when a run is repeated.

    Of versions, the release counts (see releases). safetensors is not among them: bitpress writes its files itself.
    """
    fields: dict[str, Any] = {f"quantize.{key}": value for key, value in recipe.to_dict().items()}
    fields |= {f"source.{key}": value for key, value in source.items()}
    fields |= {f"files.{name}": value for name, value in checkpoint.identity().items()}
    used = ["bitpress", "torch", "transformers"]
    used += ["bitsandbytes"] if recipe.scheme.code == "nf4" else []
    fields |= {f"versions.{name}": value for name, value in releases().items() if name in used}
    return fields | {"format_version": FORMAT_VERSION}


def order_of_sums(recipe: Recipe) -> dict[str, Any]:
    """What the last bit of a float sum, and with it a code now and then, may depend on where a method is calibrated.

    A finished artifact is as good on another machine: it is recorded there and not compared. Unfinished work, whose
    blocks read what the quantized blocks before them put out, must end in the bytes of an unbroken run: it is compared.
    """
    return {"device": recipe.device, "threads": torch.get_num_threads()} if recipe.calibration else {}
