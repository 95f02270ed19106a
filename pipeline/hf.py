"""After `import bitpress.pipeline.hf`, transformers' from_pretrained runs quantized checkpoints on bitpress's kernels:
every one whose format bitpress reads. Others go where they would without it, and so does quantizing in from_pretrained.
"""

from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from .formats import readable, registry
from .models.transformers import METHOD, BitpressConfig, BitpressQuantizer


class _Choice:
    """Stands in transformers' registry for the config of one method; makes bitpress's own where bitpress reads it.

    original: transformers' config of the method; None for a method that is bitpress's alone.
    """

    def __init__(self, original: Any):
        self.original = original

    def from_dict(self, stored: dict[str, Any], **options: Any) -> Any:
        ours = self.original is None or readable(stored)
        return BitpressConfig(stored) if ours else self.original.from_dict(stored, **options)


register_quantization_config(METHOD)(BitpressConfig)
register_quantizer(METHOD)(BitpressQuantizer)
for _method in dict.fromkeys(method for format in registry().values() for method in format.hf_methods):
    AUTO_QUANTIZATION_CONFIG_MAPPING[_method] = _Choice(  # type: ignore[assignment]
        AUTO_QUANTIZATION_CONFIG_MAPPING.get(_method)
    )
