"""What transformers calls a quantizer: it loads quantized layers in from_pretrained, and saves them in save_pretrained.

hf.py registers it; models that bitpress itself loads have one too, so that they can be saved.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config.load import load_recipe
from ..config.schema import RecipeSettings
from ..errors import CheckpointError, ConfigError
from ..formats import open_quantized, quantization_section
from ..storage.checkpoint import Checkpoint
from .fusing import Trials
from .kv_cache import round_cache
from .modules import experts_of, joined_experts, quantized_layers, replace_layers, set_tensor
from .optimize import optimize_for_decoding
from .packed import Coming, open_packed
from .quantized import QuantizedCheckpoint, read_quantized
from .structure import ParameterPath, replace_module

METHOD = "bitpress"


class BitpressConfig(QuantizationConfigMixin):
    """How from_pretrained is to quantize a checkpoint; then, what its config.json says of that, and is saved again.

    Args:
        recipe: as of `bitpress.quantize`; None for a checkpoint that is quantized already.
        folder: for the artifact, which stays; None for a temporary one, which is kept as long as the model.
        device: "cpu", "cuda" or "auto", for calibrated methods.
        stored: the quantization_config of a quantized checkpoint's config.json.
    """

    quant_method = METHOD  # type: ignore[assignment]

    def __init__(
        self,
        recipe: str | Mapping[str, Any] | RecipeSettings | None = None,
        folder: str | Path | None = None,
        device: str = "auto",
        *,
        stored: dict[str, Any] | None = None,
        **others: Any,
    ):
        if recipe is not None:
            load_recipe(recipe)  # says what is wrong with it before anything is downloaded
        self.recipe, self.folder, self.device, self.stored = recipe, folder, device, stored

    def to_dict(self) -> dict[str, Any]:
        if self.stored is None:
            return {"quant_method": METHOD, "recipe": str(self.recipe)}
        return deepcopy(self.stored)


class _Waiting(nn.Module):
    """Stands where a quantized layer or a table of experts will be: as many bytes, for device maps; its bias."""

    room: Tensor

    def __init__(self, nbytes: int, bias: nn.Parameter | None):
        super().__init__()
        self.bias = bias
        self.weight = torch.empty(0)  # some models initialize it, whatever it is
        self.register_buffer("room", torch.empty(nbytes, dtype=torch.uint8), persistent=False)


class BitpressQuantizer(HfQuantizer):
    """Quantized layers on bitpress's kernels.

    On models over several devices each layer runs where it lies, those on the CPU on the CPU's kernels. A model that is
    on the CPU as a whole maps the packed weights that lie beside its files; what is not quantized comes from the files.

    Raises, in from_pretrained and save_pretrained:
        BitpressError: as `load` does; layers on the disk, or files that changed since they were read.
    """

    requires_calibration = True  # the weights must be quantized already
    checkpoint: Checkpoint
    contents: QuantizedCheckpoint

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, device_map: Any = None, **others: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigError(
                "the device_map leaves part of the model on the disk, and quantized layers stay in memory; "
                "allow more of it, or use a model of fewer bits"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        with torch.device("cpu"):  # instead of the meta device
            self.checkpoint = open_quantized(Path(options["checkpoint_files"][0]).parent)
            self.checkpoint.fetch()
            self.contents = read_quantized(self.checkpoint, model=model)
        sizes: dict[str, int] = {}
        for name, target in self._ours():
            path = _path(target)
            sizes[path] = sizes.get(path, 0) + self.checkpoint.tensors[name].nbytes
        tied = [_path(target) for targets in self.contents.shared.values() for target in targets]
        for path, nbytes in (sizes | dict.fromkeys(tied, 0)).items():
            bias = None if _is_parameter(model, path) else getattr(model.get_submodule(path), "bias", None)
            replace_module(model, path, _Waiting(nbytes, bias))
        model._keys_to_ignore_on_load_unexpected = {".*"}  # read_quantized says what does not belong

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **others: Any) -> PreTrainedModel:
        places = getattr(model, "hf_device_map", None) or {}
        split = len(set(places.values())) > 1
        if split:
            remove_hook_from_submodules(model)
        devices = {path: module.room.device for path, module in model.named_modules() if isinstance(module, _Waiting)}
        on_cpu = not split and {device.type for device in devices.values()} == {"cpu"}
        coming = Coming(self.checkpoint.folder) if on_cpu else None
        packed = open_packed(coming, self.checkpoint, self.contents, "auto") if coming else None
        layers = quantized_layers(
            self.checkpoint,
            self.contents,
            lambda target: devices[_path(target)],
            restored=packed.layers if packed else None,
        )
        replace_layers(model, self.contents.names, layers)
        for target, tensor in joined_experts(self.contents.names, self._unmerged(), self.checkpoint.read):
            set_tensor(model, target, tensor, model.get_parameter(target.parameter).device)
        if self.contents.cache:
            round_cache(model, self.checkpoint, self.contents.cache)
        optimize_for_decoding(model, Trials(packed.trials) if packed else None)
        if coming:
            coming.wait()
        if split:
            dispatch_model(model, places, main_device="cpu" if "cpu" in places.values() else None)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The model's parameters, and what was quantized from its files again, to the bit.

        Raises:
            CheckpointError: the files are not there any more, or not what they were.
        """
        try:
            self.checkpoint.check_unchanged()
            ours = [*dict(self._ours()), *self._unmerged()]
            ours += self.contents.cache.tensors if self.contents.cache else []
            quantized = {name: self.checkpoint.read(name) for name in ours}
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{error.filename} is no longer there; quantized weights are saved from the files that they came from"
            ) from error
        tables = tuple(f"{parameter}." for parameter in experts_of(self.contents))
        joined = {target.parameter for target in self._unmerged().values()}
        plain = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not name.startswith(tables) and name not in joined
        }
        return plain | quantized, {}

    def _ours(self) -> Iterator[tuple[str, ParameterPath]]:
        """The tensors that transformers is not to load, and where they go."""
        for layer, target in self.contents.quantized.items():
            yield from ((name, target) for name in self.contents.tensors_of(self.checkpoint, layer))
        experts = experts_of(self.contents)
        yield from ((name, target) for name, target in self.contents.plain.items() if target.parameter in experts)

    def _unmerged(self) -> dict[str, ParameterPath]:
        """Unquantized tensors of single experts, such as biases, that transformers does not know by these names."""
        ours, known = dict(self._ours()), self.contents.names.merged
        return {
            name: target
            for name, target in self.contents.plain.items()
            if target.expert and target.parameter not in known and name not in ours
        }


def _path(target: ParameterPath) -> str:
    """What stands in the place of the weight: a layer, or a table of experts."""
    return target.parameter if target.expert else target.parameter.removesuffix(".weight")


def _is_parameter(model: nn.Module, path: str) -> bool:
    parent, _, leaf = path.rpartition(".")
    return leaf in model.get_submodule(parent)._parameters


def attach(model: PreTrainedModel, checkpoint: Checkpoint, contents: QuantizedCheckpoint) -> None:
    """Let a model that bitpress loaded be saved by save_pretrained."""
    quantizer = BitpressQuantizer(BitpressConfig(stored=quantization_section(checkpoint)), pre_quantized=True)
    quantizer.checkpoint, quantizer.contents = checkpoint, contents
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.config.quantization_config = quantizer.quantization_config
