"""After `import bitpress.pipeline.hf`, or the use of `bitpress.BitpressConfig`, transformers' from_pretrained runs
quantized checkpoints on bitpress's kernels: every one whose format bitpress reads. Others go where they would anyway.

A checkpoint that is not quantized is, on the way, where a recipe is given:

    AutoModelForCausalLM.from_pretrained("org/model", quantization_config=BitpressConfig("gptq/int4-g128"))
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from .api import quantize
from .errors import ConfigError
from .formats import readable, registry
from .models.transformers import METHOD, BitpressConfig, BitpressQuantizer

__all__ = ["BitpressConfig"]


class _Choice:
    """Stands in transformers' registry for the config of one method; makes bitpress's own where bitpress reads it.

    original: transformers' config of the method; None for a method that is bitpress's alone.
    """

    def __init__(self, original: Any):
        self.original = original

    def from_dict(self, stored: dict[str, Any], **options: Any) -> Any:
        ours = self.original is None or readable(stored)
        return BitpressConfig(stored=stored) if ours else self.original.from_dict(stored, **options)


class OnTheFlyQuantizer(BitpressQuantizer):
    """Quantizes a checkpoint by its config's recipe, into a folder, and loads what it made."""

    requires_calibration = False  # by transformers: the recipe says how, and calibration is a part of it
    folder: tempfile.TemporaryDirectory[str]
    quantization_config: BitpressConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        if not self.pre_quantized:
            self._quantize(model, options["checkpoint_files"])
        super()._process_model_before_weight_loading(model, **options)

    def _quantize(self, model: PreTrainedModel, checkpoint_files: list[str]) -> None:
        """Make the artifact of a model, and let `checkpoint_files`, transformers' own list, name its files."""
        config, name = self.quantization_config, str(model.config.name_or_path)
        if config.recipe is None:
            raise ConfigError(f"{name} is not quantized; give a recipe, as in BitpressConfig('gptq/int4-g128')")
        if config.folder is None:  # kept as long as the model, which is saved from its files
            self.folder = tempfile.TemporaryDirectory(prefix="bitpress-")
        folder = Path(config.folder or f"{self.folder.name}/artifact")
        revision = None if os.path.isdir(name) else getattr(model.config, "_commit_hash", None)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)  # transformers builds the model on no device and in its dtype
        try:
            with torch.device("cpu"):
                artifact = quantize(name, config.recipe, folder, revision, config.device)
        finally:
            torch.set_default_dtype(default)
        if not (written := sorted(map(str, artifact.folder.glob("*.safetensors")))):
            raise ConfigError(
                f"{artifact.recipe} stored without safetensors, which transformers reads; leave format out"
            )
        config.stored = artifact.section()
        model.config.quantization_config = config  # transformers has copied it
        checkpoint_files[:] = written


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = BitpressConfig
AUTO_QUANTIZER_MAPPING[METHOD] = OnTheFlyQuantizer
for _method in dict.fromkeys(method for format in registry().values() for method in format.hf_methods):
    AUTO_QUANTIZATION_CONFIG_MAPPING[_method] = _Choice(  # type: ignore[assignment]
        AUTO_QUANTIZATION_CONFIG_MAPPING.get(_method)
    )
