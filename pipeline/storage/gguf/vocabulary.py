"""A tokenizer's files from the metadata of a GGUF file: the inverse of tokenizer.py, for files of other programs."""

from collections.abc import Mapping
from typing import Any

from .tokenizer import PRE_TOKENIZERS, SPACE

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(2, 7)  # tokenizer.ggml.token_type
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_LONGEST = 512  # characters of a token that is merged
_MODELS = {"gpt2": False, "llama": True}  # whether it is like SentencePiece's
_STEPS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}], False),
    "smollm": (
        [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
        False,
    ),
}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_STEPS |= {
    name: ([{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}, _BYTES], whole)
    for (regex, whole), name in PRE_TOKENIZERS.items()
}


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """config.json's bos_token_id, eos_token_id and pad_token_id."""
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items() if name != "unk"}
    return {f"{name}_token_id": number for name, number in ids.items() if type(number) is int}


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, dict[str, Any] | str]:
    """File name -> JSON or text: tokenizer.json, tokenizer_config.json and, where there is one, the chat template.

    Raises:
        ValueError: metadata that are missing or of another type, or a kind of tokenizer that is not known here.
    """
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if model not in _MODELS:
        raise ValueError(f"its tokenizer is of the kind {model!r:.40}, and {', '.join(_MODELS)} are known here")
    by_bytes = _MODELS[str(model)]
    if not by_bytes and pre not in _STEPS:
        raise ValueError(
            f"its tokenizer splits text by {pre!r:.40}, and {', '.join(_STEPS)} are known here; put the model's own "
            "config.json and tokenizer beside the file"
        )
    tokens, kinds = _list(metadata, "tokens", str), _list(metadata, "token_type", int)
    if len(tokens) != len(kinds):
        raise ValueError(f"it has {len(tokens)} tokens, and the types of {len(kinds)}")
    added = [
        {
            "id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": kind != _USER_DEFINED,
        }
        for number, (token, kind) in enumerate(zip(tokens, kinds))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    vocabulary = {token: number for number, token in enumerate(tokens) if kinds[number] != _UNUSED}
    if len(vocabulary) != len(tokens) - kinds.count(_UNUSED):
        raise ValueError("some of its tokens are the same")
    names = {}
    for name, key in _SPECIAL.items():
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(number) is int:
            if not 0 <= number < len(tokens):
                raise ValueError(f"tokenizer.ggml.{key}_token_id is {number}, and there are {len(tokens)} tokens")
            names[name] = tokens[number]
    steps, whole = ([], False) if by_bytes else _STEPS[str(pre)]
    begins = metadata.get("tokenizer.ggml.add_bos_token", by_bytes or pre == "llama-bpe")
    space = bool(metadata.get("tokenizer.ggml.add_space_prefix", by_bytes))
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _normalizer(space) if by_bytes else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if steps else None,
        "post_processor": _beginning(names["bos"], vocabulary) if begins is True and "bos" in names else None,
        "decoder": _decoder(space) if by_bytes else _BYTES,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": names.get("unk") if by_bytes else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": by_bytes,
            "byte_fallback": by_bytes,
            "ignore_merges": whole,
            "vocab": vocabulary,
            "merges": _ranked(metadata, tokens, kinds) if by_bytes else _pairs(metadata, vocabulary),
        },
    }
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {f"{name}_token": token for name, token in names.items()}
    files: dict[str, dict[str, Any] | str] = {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}
    template = metadata.get("tokenizer.chat_template")
    return files | ({"chat_template.jinja": template} if isinstance(template, str) else {})


def _list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not values or not all(type(value) is kind for value in values):
        raise ValueError(f"tokenizer.ggml.{key} is no list of values of type {kind.__name__}")
    return values


def _pairs(metadata: Mapping[str, Any], vocabulary: Mapping[str, int]) -> list[list[str]]:
    """The merges as pairs. Raises ValueError for one whose parts or whole are no tokens."""
    pairs = []
    for merge in _list(metadata, "merges", str):
        pair = merge.split(" ")
        if len(pair) != 2 or not all(part in vocabulary for part in (*pair, "".join(pair))):
            raise ValueError(f"the merge {merge!r:.40} is not of two tokens that make one")
        pairs.append(pair)
    return pairs


def _ranked(metadata: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> list[list[str]]:
    """The merges of a tokenizer in the manner of SentencePiece: all pairs of tokens that make one, the best score of
    what they make first."""
    scores = _list(metadata, "scores", float)
    if len(scores) != len(tokens):
        raise ValueError(f"it has {len(tokens)} tokens, and the scores of {len(scores)}")
    place = {token: number for number, token in enumerate(tokens) if kinds[number] not in (_UNUSED, _CONTROL, _BYTE)}
    merges = []
    for token, number in place.items():
        for cut in range(1, min(len(token), _LONGEST)):
            left, right = place.get(token[:cut]), place.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-scores[number], number, left, right))
    return [[tokens[left], tokens[right]] for *_, left, right in sorted(merges)]


def _normalizer(space: bool) -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return {"type": "Sequence", "normalizers": [*([{"type": "Prepend", "prepend": SPACE}] if space else []), replace]}


def _decoder(space: bool) -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    steps: list[dict[str, Any]] = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {
        "type": "Sequence",
        "decoders": [*steps, *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space else [])],
    }


def _beginning(token: str, vocabulary: Mapping[str, int]) -> dict[str, Any]:
    """A token before every text."""
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    special = {token: {"id": token, "ids": [vocabulary[token]], "tokens": [token]}}
    return {
        "type": "TemplateProcessing", "single": [first, text], "pair": [first, text, second], "special_tokens": special,
    }  # fmt: skip
