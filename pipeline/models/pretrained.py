"""What transformers itself opens of a checkpoint, its config and its tokenizer, from checked copies in another folder.

transformers follows links, reads keys that name code or other files, and looks at what else lies beside a file. So it
is never shown the checkpoint's folder.
"""

import contextlib
import dataclasses
import inspect
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from ..errors import CheckpointError, listing
from ..storage.artifacts import require_tokenizer
from ..storage.checkpoint import Checkpoint, read_json, regular_file
from ..storage.config import data_of
from ..system.library import library_errors, silenced
from ..system.limits import Budget, OverBudget, within

_TOKENIZER_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab", ".bpe", ".codes", ".spm")
_TEMPLATES = "additional_chat_templates"
_LARGEST = 256 << 20  # bytes of a file of a tokenizer; the largest in use has 35 MB
_JSON_LIMIT = 16 << 20  # bytes of tokenizer_config.json; the largest in use has 2 MB
_SAMPLING: dict[str, tuple[tuple[type, ...], float, float]] = {  # types, lowest and highest value
    "do_sample": ((bool,), 0, 1),
    "temperature": ((int, float), 1e-6, 100.0),
    "top_k": ((int,), 0, 1 << 31),
    "top_p": ((int, float), 1e-6, 1.0),
    "min_p": ((int, float), 0.0, 1.0),
    "repetition_penalty": ((int, float), 1e-2, 100.0),
}
_STRUCTURE_SECONDS = 60  # the largest models in use take 2
_STRUCTURE_BYTES = 1 << 30  # the buffers of models in use have some MB
_TOKENIZER_SECONDS = 60  # the largest in use take 2
_TOKENIZER_BYTES = 1 << 30
# keys that make a model return something else than its logits by name, or more than these
_OTHER_OUTPUTS = ("return_dict", "use_return_dict", "torchscript", "output_attentions", "output_hidden_states")
_FIELDS = {field.name for field in dataclasses.fields(PreTrainedConfig)}
_GET_AGAIN = "get the file again, or one of another copy of the model"


def load_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """A checkpoint's config as transformers reads it, without what it says of quantization.

    Raises:
        CheckpointError: transformers makes no config of it, or its dtype is none of floating-point numbers.
    """
    path = checkpoint.folder / "config.json"
    values = {key: value for key, value in checkpoint.config.items() if key not in _OTHER_OUTPUTS}
    values.pop("quantization_config", None)
    name = values.get("dtype") or values.get("torch_dtype")
    dtype = getattr(torch, name, None) if isinstance(name, str) else torch.float32
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise CheckpointError(f"{path}: dtype {name!r} is none of floating-point numbers, such as bfloat16")
    with tempfile.TemporaryDirectory(prefix="bitpress-") as folder, builds_a_model(checkpoint, Path(folder)):
        (Path(folder) / path.name).write_text(json.dumps(_without_methods(values)))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        config.name_or_path = str(checkpoint.folder)
    text = config.get_text_config(decoder=True)  # a number that the file leaves out has a default
    chosen = getattr(text, "num_experts_per_tok", None)
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        experts = getattr(text, key, None)
        if isinstance(chosen, int) and isinstance(experts, int) and 0 < experts < chosen:
            raise CheckpointError(
                f"{path}: num_experts_per_tok is {chosen}, expected at most {key}, which is {experts}"
            )
    kinds = getattr(text, "layer_types", None) or ["sliding_attention", "chunked_attention"]
    for key, kind in (("sliding_window", "sliding_attention"), ("attention_chunk_size", "chunked_attention")):
        size = getattr(text, key, None)
        if isinstance(size, int | float) and size < 1 and kind in kinds:
            raise CheckpointError(f"{path}: {key} is {size}, expected at least 1 token, or null for all of them")
    return config


@contextlib.contextmanager
def builds_a_model(checkpoint: Checkpoint, copies: Path | None = None) -> Iterator[None]:
    """The boundary around what transformers does with a checkpoint's config (see library_errors), and its budget.

    Parameters pass through memory that is never touched, one at a time, and quantized ones are packed to an eighth in
    the files.
    """
    path, kind = checkpoint.folder / "config.json", checkpoint.config.get("model_type", "no model_type")
    nbytes = sum(info.nbytes for info in checkpoint.tensors.values())
    budget = Budget(_STRUCTURE_SECONDS + len(checkpoint.tensors) / 1000, _STRUCTURE_BYTES + 16 * nbytes)
    advice = "use a checkpoint of an architecture that the installed transformers has"
    if code := [key for key in checkpoint.left_out if key.endswith("auto_map")]:
        advice = f"it asks for code of its own ({code[0]}), which bitpress never runs; {advice}"
    try:
        with (
            library_errors(f"{path}: transformers builds no language model from it ({kind})", advice, copies),
            within(budget),
        ):
            yield
    except OverBudget as error:
        raise CheckpointError(
            f"{path}: to build this model takes {error}, which does not fit its weight files; one of the config's "
            "numbers is far too large"
        ) from error


def _without_methods(value: Any) -> Any:
    """A config's values without the keys that would take the place of a method or a private attribute of its class.

    transformers makes an attribute of every key that it does not know.
    """
    if isinstance(value, list):
        return [_without_methods(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {key: _without_methods(inner) for key, inner in value.items() if not _is_code(key)}


def _is_code(key: str) -> bool:
    if key.startswith("_"):
        return key != "__float__"
    if key == "model_type" or key in _FIELDS:
        return False
    attribute = inspect.getattr_static(PreTrainedConfig, key, None)
    return attribute is not None and not isinstance(attribute, property)


def generation_config(checkpoint: Checkpoint, config: PreTrainedConfig) -> GenerationConfig:
    """How a checkpoint's model writes: its token ids, and how it samples, from generation_config.json and config.json.

    Only settings that cannot keep a model from being used are taken, and only with values that they can have: a file
    may also ask for another kind of search, another cache, or a program of its own. What cannot be used is left out.
    """
    text, chosen, values = config.get_text_config(decoder=True), GenerationConfig(), dict[str, Any]()
    with contextlib.suppress(CheckpointError, FileNotFoundError):  # doctor says what is wrong with the file
        values = read_json(regular_file(checkpoint.folder / "generation_config.json"), _JSON_LIMIT)
    size = getattr(text, "vocab_size", 1 << 31)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for ids in (values.get(key), getattr(text, key, None)):
            usable = [each for each in (ids if isinstance(ids, list) else [ids]) if type(each) is int]
            usable = [each for each in usable if 0 <= each < size]
            if usable:
                setattr(chosen, key, usable if isinstance(ids, list) and key == "eos_token_id" else usable[0])
                break
    for key, (kinds, low, high) in _SAMPLING.items():
        value = values.get(key)
        if type(value) in kinds and low <= value <= high:  # type: ignore[operator]
            setattr(chosen, key, value)
    return chosen


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint's folder.

    Raises:
        CheckpointError: there is none, or none can be made of its files, or one of these is a link that leads out.
    """
    require_tokenizer(folder)
    what = f"{folder}: no tokenizer can be made of its files"
    try:
        with _tokenizer_files(folder) as copies, library_errors(what, _GET_AGAIN, copies):
            size = sum(path.stat().st_size for path in copies.iterdir())
            with silenced(), within(Budget(_TOKENIZER_SECONDS + size / 1e6, _TOKENIZER_BYTES + 100 * size)):
                tokenizer = AutoTokenizer.from_pretrained(copies, trust_remote_code=False, local_files_only=True)
    except OverBudget as error:
        raise CheckpointError(f"{folder}: to make the tokenizer takes {error}; its files are not sane") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise CheckpointError(f"{folder}: its files make a {type(tokenizer).__name__}, which is no tokenizer")
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = str(folder)
    return tokenizer


@contextlib.contextmanager
def _tokenizer_files(folder: Path) -> Iterator[Path]:
    """A temporary folder with copies of what a tokenizer is made of: regular files, of sane sizes, without code."""
    with tempfile.TemporaryDirectory(prefix="bitpress-") as temporary:
        copies = Path(temporary)
        templates = folder / _TEMPLATES
        if templates.is_dir():
            if templates.is_symlink():
                raise CheckpointError(f"{templates} is a link; copy the folder instead")
            (copies / _TEMPLATES).mkdir()
        for path in sorted([*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]):
            if path.suffix not in _TOKENIZER_SUFFIXES or path.name.endswith(".index.json") or path.is_dir():
                continue
            if (size := regular_file(path).stat().st_size) > _LARGEST:
                raise CheckpointError(f"{path}: {size} bytes, expected at most {_LARGEST} of a tokenizer's file")
            copy = copies / path.relative_to(folder)
            if path.name in ("config.json", "tokenizer_config.json"):
                copy.write_text(json.dumps(_tokenizer_settings(path)))
            else:
                shutil.copyfile(path, copy)
        yield copies


def _tokenizer_settings(path: Path) -> dict[str, Any]:
    """config.json or tokenizer_config.json, checked, without what names code or files.

    Raises:
        CheckpointError: it names a class that is no tokenizer of transformers.
    """
    left_out: list[str] = []
    problems: list[str] = []
    values = data_of(read_json(path, _JSON_LIMIT), left_out, problems)
    if problems:
        raise CheckpointError(f"{path} cannot be used:\n{listing(problems)}")
    name = values.get("tokenizer_class")
    if name is not None:
        known = tokenizer_class_from_name(name) if isinstance(name, str) else name
        missing = hasattr(known, "_backends")  # it stands for a tokenizer that needs a package
        if (
            known is not None
            and not missing
            and not (isinstance(known, type) and issubclass(known, PreTrainedTokenizerBase))
        ):
            raise CheckpointError(f"{path}: tokenizer_class {name!r} is no tokenizer of transformers")
    if path.name == "config.json":
        return _without_methods(values)
    odd = ("init_inputs", "tokenizer_object", "post_processor", "is_local", "local_files_only")
    return {
        key: value
        for key, value in values.items()
        if not (key in odd or key.startswith("_") or key.endswith(("_file", "_files")))
    }
