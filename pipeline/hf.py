"""After `import bitpress.pipeline.hf`, transformers' from_pretrained runs quantized checkpoints on bitpress's kernels:
every one whose format bitpress reads. Others go where they would without it, and so does quantizing in from_pretrained.
"""

from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from .formats import readable
from .models.transformers import METHOD, BitpressConfig, BitpressQuantizer

# What a config.json's quant_method is called in transformers' registry.
_METHODS = ("gptq", "compressed-tensors", "bitsandbytes_4bit")


class _Choice:
    """Stands in the registry for the config of one method, and makes bitpress's own where bitpress reads the format."""

    def __init__(self, original: Any):
        self.original = original

    def from_dict(self, stored: dict[str, Any], **given: Any) -> Any:
        return BitpressConfig(stored) if readable(stored) else self.original.from_dict(stored, **given)


register_quantization_config(METHOD)(BitpressConfig)
register_quantizer(METHOD)(BitpressQuantizer)
for _method in _METHODS:
    AUTO_QUANTIZATION_CONFIG_MAPPING[_method] = _Choice(  # type: ignore[assignment]
        AUTO_QUANTIZATION_CONFIG_MAPPING[_method]
    )
