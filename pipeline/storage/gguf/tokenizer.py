"""A tokenizer as the keys of a GGUF file's metadata, from tokenizer.json; one that llama.cpp would read otherwise is
refused by name.

llama.cpp has the regular expressions of byte-level tokenizers in its code and goes by their names. Source:
src/llama-vocab.cpp of llama.cpp (as in llama-cpp-python 0.3.36).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import read_json

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # tokenizer.ggml.token_type
SPACE = "\u2581"  # what SentencePiece has for a space
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (regular expression, ignore_merges) -> llama.cpp's name
PRE_TOKENIZERS = {
    (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST, False): "dbrx",
    (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST, False): "qwen2",
    (
        _CONTRACTIONS
        + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        False,
    ): "qwen35",
    (_CASED % ("", "", ""), True): "tekken",
    (_CASED % (_CONTRACTIONS + "?", _CONTRACTIONS + "?", "{1,3}"), False): "gpt-4o",
}
_SPECIAL = ("bos", "eos", "unk", "pad")


def tokens_of(files: Mapping[str, Path]) -> dict[str, int]:
    """The tokens of a checkpoint's tokenizer.json with their ids; {} where it has none.

    Args:
        files: name -> path of the checkpoint's small files.
    """
    if "tokenizer.json" not in files:
        return {}
    tokenizer = read_json(files["tokenizer.json"])
    vocabulary = _part(tokenizer, "model")["vocab"]  # of Unigram a list of tokens with their scores
    pairs = enumerate(vocabulary) if isinstance(vocabulary, list) else ()
    tokens = {token: number for number, (token, _) in pairs} or dict(vocabulary)
    return tokens | {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or []}


def tokenizer_metadata(files: Mapping[str, Path], config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys tokenizer.* of a checkpoint's tokenizer.

    Args:
        files: name -> path of the checkpoint's small files. config: config.json.
    Raises:
        ValueError: it has none, or one that llama.cpp would read otherwise.
    """
    if "tokenizer.json" not in files:
        raise ValueError("tokenizer.json is missing, of which GGUF's tokenizer is made; save it by transformers")
    tokenizer = read_json(files["tokenizer.json"])
    settings = read_json(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    model = _part(tokenizer, "model")
    if model.get("type") != "BPE":
        raise ValueError(f"the tokenizer is of type {model.get('type')!r}, and only BPE is known here as GGUF")
    if odd := [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)]:
        raise ValueError(f"the tokenizer has {', '.join(odd)}, which llama.cpp has not")
    added = {entry["id"]: entry for entry in tokenizer.get("added_tokens") or []}
    ids: dict[int, str] = {number: token for token, number in model["vocab"].items()}
    ids |= {number: entry["content"] for number, entry in added.items()}
    size = max(int(config["vocab_size"]), 0)
    if max(ids, default=0) >= size:
        raise ValueError(f"the tokenizer has the id {max(ids)}, and the model {size} tokens")
    by_bytes = bool(model.get("byte_fallback"))
    tokens = [ids.get(number, f"[PAD{number}]") for number in range(size)]
    kinds = [_kind(number, ids, added, model, by_bytes) for number in range(size)]
    for number, entry in added.items():
        if not entry.get("special"):
            tokens[number] = entry["content"].replace(SPACE, " ")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
    metadata: dict[str, Any] = {}
    if by_bytes:
        metadata |= {"model": "llama", "pre": "default", "add_space_prefix": _space_prefix(tokenizer)}
        metadata["scores"] = _scores(model["vocab"], merges, tokens, added)
    else:
        metadata |= {"model": "gpt2", "pre": pre_tokenizer(tokenizer)}
        if not merges:
            raise ValueError("the tokenizer has no merges, without which llama.cpp reads no BPE")
        metadata["merges"] = merges
    metadata |= {"tokens": tokens, "token_type": kinds}
    numbers = {token: number for number, token in ids.items()}
    for name in _SPECIAL:
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = numbers.get(token) if isinstance(token, str) else config.get(f"{name}_token_id")
        if type(number) is int and 0 <= number < size:
            metadata[{"unk": "unknown", "pad": "padding"}.get(name, name) + "_token_id"] = number
    first, last = _around(tokenizer)
    metadata["add_bos_token"] = first if first is not None else bool(settings.get("add_bos_token"))
    metadata["add_eos_token"] = last if last is not None else bool(settings.get("add_eos_token"))
    result = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    return result | _chat_templates(files, settings)


def pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits text before it merges.

    Raises:
        ValueError: it has no name there; the sentence names what it does.
    """
    normalizer = tokenizer.get("normalizer")
    kinds = [step.get("type") for step in _steps(normalizer, "normalizers")]
    if any(kind != "NFC" for kind in kinds):  # llama.cpp normalizes nothing, and text comes as NFC nearly always
        raise ValueError(f"the tokenizer normalizes text by {', '.join(map(str, kinds))}, which llama.cpp does not")
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    shown = [_shown(step) for step in steps]
    if any(step.get("type") == "ByteLevel" and step.get("add_prefix_space") for step in steps):
        raise ValueError("the tokenizer puts a space before the text (add_prefix_space), which llama.cpp does not")
    merges = bool(_part(tokenizer, "model").get("ignore_merges"))
    name = {("ByteLevel",): "gpt-2", ("Digits, one by one", "ByteLevel"): "smollm"}.get(tuple(shown))
    if name is not None and not merges:
        return name
    if len(steps) == 2 and shown[1] == "ByteLevel without its own regular expression":
        pattern = (steps[0].get("pattern") or {}).get("Regex") if steps[0].get("type") == "Split" else None
        whole = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        if whole and (name := PRE_TOKENIZERS.get((str(pattern), merges))) is not None:
            return name
    also = " (with ignore_merges)" if merges else ""
    raise ValueError(
        f"the pre-tokenizer {' then '.join(shown) or 'None'}{also} has no name in llama.cpp that is known here"
    )


def _shown(step: Mapping[str, Any]) -> str:
    """A step of the pre-tokenizer in words."""
    kind = str(step.get("type"))
    if kind == "ByteLevel":
        return kind if step.get("use_regex", True) else f"{kind} without its own regular expression"
    if kind == "Digits":
        return f"{kind}, one by one" if step.get("individual_digits") else kind
    if kind == "Split":
        return f"{kind} by {step.get('pattern')}, {step.get('behavior')}"
    return kind


def _steps(value: Any, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, a pre-tokenizer or a post-processor; [] of none."""
    if not isinstance(value, dict):
        return []
    return (
        [step for each in value.get(key) or [] for step in _steps(each, key)]
        if value.get("type") == "Sequence"
        else [value]
    )


def _part(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = value.get(key)
    if not isinstance(part, dict):
        raise ValueError(f"tokenizer.json: {key} is {part!r:.40}, expected an object")
    return part


def _kind(
    number: int, ids: Mapping[int, str], added: Mapping[int, Any], model: Mapping[str, Any], by_bytes: bool
) -> int:
    """The token_type of an id."""
    if number not in ids:
        return _UNUSED
    if by_bytes and ids[number] == model.get("unk_token"):
        return _UNKNOWN
    if number in added:
        return _CONTROL if added[number].get("special") else _USER_DEFINED
    text = ids[number]
    return _BYTE if by_bytes and len(text) == 6 and text.startswith("<0x") and text.endswith(">") else _NORMAL


def _space_prefix(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer in the manner of SentencePiece puts a space before the text.

    Raises:
        ValueError: it changes text in another way, too.
    """
    prefix = False
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        replaced = (step.get("pattern") or {}).get("String"), step.get("content")
        if step.get("type") == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif step.get("type") != "Replace" or replaced != (" ", SPACE):
            raise ValueError(f"the tokenizer normalizes text by {_shown(step)}, which llama.cpp does not")
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace" and step.get("replacement") == SPACE and not step.get("split"):
            prefix = prefix or step.get("prepend_scheme") in ("first", "always")
        elif step.get("type") != "Split" or (step.get("pattern"), step.get("behavior")) != (
            {"String": " "},
            "MergedWithPrevious",
        ):  # Gemma splits by spaces when none are left
            raise ValueError(f"the pre-tokenizer {_shown(step)} has no name in llama.cpp that is known here")
    return prefix


def _scores(
    vocabulary: Mapping[str, int], merges: list[str], tokens: list[str], added: Mapping[int, Any]
) -> list[float]:
    """What SentencePiece's tokenizer in llama.cpp ranks pairs by: the pair whose token has the highest score is merged.

    BPE ranks the pairs themselves, so both agree where the merges of a token follow each other and no pair is left out
    whose token is known.

    Raises:
        ValueError: they do not agree.
    """
    rank: dict[str, int] = {}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    last = ""
    for number, pair in enumerate(pairs):
        token = "".join(pair)
        if token in rank and token != last:
            raise ValueError(
                f"the merges of the token {token!r} do not follow each other, as llama.cpp would have them"
            )
        rank.setdefault(token, number)
        last = token
    known = set(pairs)
    special = {entry["content"] for entry in added.values()}
    for token in vocabulary:
        if token in special or (token.startswith("<0x") and token.endswith(">")):
            continue
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in known:
                raise ValueError(f"the tokenizer never merges {pair[0]!r} and {pair[1]!r}, which llama.cpp would merge")
    return [-1000.0 if number in added else -float(rank.get(token, len(merges))) for number, token in enumerate(tokens)]


def _around(tokenizer: Mapping[str, Any]) -> tuple[bool | None, bool | None]:
    """Whether a token is put before every text, and after it; None where nothing says so."""
    for step in _steps(tokenizer.get("post_processor"), "processors"):
        if step.get("type") == "TemplateProcessing" and isinstance(single := step.get("single"), list) and single:
            return "SpecialToken" in single[0], "SpecialToken" in single[-1]
    return None, None


def _chat_templates(files: Mapping[str, Path], settings: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.chat_template, and one key for each further template."""
    if "chat_template.jinja" in files:
        return {"tokenizer.chat_template": files["chat_template.jinja"].read_text(encoding="utf-8")}
    templates = settings.get("chat_template")
    if isinstance(templates, str):
        return {"tokenizer.chat_template": templates}
    named = {each["name"]: each["template"] for each in templates or [] if isinstance(each, dict)}
    keys = {f"tokenizer.chat_template.{name}": text for name, text in named.items() if name != "default"}
    if keys:
        keys["tokenizer.chat_templates"] = sorted(name for name in named if name != "default")
    return keys | ({"tokenizer.chat_template": named["default"]} if "default" in named else {})
