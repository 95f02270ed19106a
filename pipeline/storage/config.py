"""config.json and its like as data alone: without the keys that choose code, name a download or name another file."""

import math
from typing import Any

# What transformers, and timm under it, read from a model's config at any depth. None is a number of the model.
CODE_KEYS = frozenset(
    {
        # classes of the repository, or of another one ("org/name--module.Class")
        "auto_map", "_auto_class", "custom_pipelines", "custom_generate", "trust_remote_code", "code_revision",
        # kernels, which may be a Hub repository "org/name@revision:function"
        "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset",
        "experts_implementation", "_experts_implementation", "_experts_implementation_internal",
        "use_kernels", "kernel_config", "kernel_mapping", "fusion_config", "distributed_config",
        # other files in place of config.json or of the weights, and where to look for them
        "configuration_files", "transformers_weights", "extra_files", "extra_config_files", "gguf_file",
        "adapter_config", "base_model_name_or_path", "use_pretrained_backbone", "checkpoint_path", "pretrained_cfg",
        "pretrained_cfg_overlay", "cache_dir", "_commit_hash",
    }
)  # fmt: skip
# Keys that name a vision model of timm: a name with a source in front, such as "hf-hub:org/name", is a download.
_NAMES_OF_MODELS = ("architecture", "backbone")


def data_of(value: Any, left_out: list[str], problems: list[str], path: str = "") -> Any:
    """A JSON value without the keys in CODE_KEYS, its infinite floats written as transformers writes them.

    Args:
        left_out: is given the path of each key that was left out, such as "text_config.auto_map".
        problems: is given a sentence for each string that cannot be written again, or that names a download.
        path: of the value itself.
    """
    if isinstance(value, dict):
        result = {}
        for key, inner in value.items():
            place = f"{path}.{key}" if path else key
            if key in CODE_KEYS:
                left_out.append(place)
                continue
            if key in _NAMES_OF_MODELS and isinstance(inner, str) and (":" in inner or "/" in inner):
                problems.append(f"{place}: {inner!r} names a download, which bitpress never makes")
            _check_text(key, place, problems)
            result[key] = data_of(inner, left_out, problems, place)
        return result
    if isinstance(value, list):
        return [data_of(inner, left_out, problems, f"{path}[{number}]") for number, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return {"__float__": name}  # JSON has no such number
    if isinstance(value, str):
        _check_text(value, path, problems)
    return value


def _check_text(text: str, path: str, problems: list[str]) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        problems.append(f"{path!a}: {text[:40]!a} is half of a character, which no file can hold")
