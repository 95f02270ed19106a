"""Seeded damage to files of checkpoints and runs: to bytes, JSON, safetensors headers, numbers, links."""

import contextlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

HEADER_LIMIT = 100 << 20
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "I32", "I8", "U8", "BOOL")

# Values that programs stumble over, wherever they stand.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 256, 65536, 2**31 - 1, 2**31, 2**53, 2**63, 10**30, 0.0, -0.0, 0.5,
    1e-45, 1e38, 1e308, float("nan"), float("inf"), "", " ", "0", "none", "auto", "float16", "float99",
    "\x1b[2J\x9b1m\u202e", "\ud800", "x" * 300, "ü" * 200, "../../etc/passwd", "/etc/passwd", "C:x", "a\0b",
    "re:(a+)+$", "re:[", ".*", [], {}, [[]], [1], ["x"], {"a": 1}, {"": None}, [None] * 9,
]  # fmt: skip

# Keys that mean something to transformers, a format or bitpress, with values that try that meaning.
KEYS: dict[str, list[Any]] = {
    "attn_implementation": ["eager", "org/kernels", "flash_attention_2", "paged|eager", 1],
    "_attn_implementation": ["org/kernels", "sdpa"], "experts_implementation": ["org/kernels", "eager", "batched_mm"],
    "auto_map": [{"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.Model"}, 1],
    "trust_remote_code": [True], "num_labels": [2**31, -1], "id2label": [{"0": "x"}, 5], "use_cache": [False, "x"],
    "max_position_embeddings": [2**24, 1, 0], "n_positions": [2**24], "num_hidden_layers": [1, 3, 255, 0],
    "num_key_value_heads": [1, 3, 4, 8, 0], "num_attention_heads": [1, 3, 8], "head_dim": [1, 7, 16, 1024],
    "hidden_act": ["gelu", "nonesuch", "relu"], "tie_word_embeddings": [True, False, "x"],
    "rope_scaling": [{"rope_type": "yarn", "factor": 0}, {"rope_type": "linear", "factor": 1e300}, {"type": "x"}, []],
    "rope_parameters": [{"rope_type": "default"}, {"rope_type": "llama3"}, {"rope_type": "dynamic", "factor": -1}, 1],
    "layer_types": [["full_attention"], ["sliding_attention"] * 2, ["x"], 5], "sliding_window": [0, 1, -1, 2**40],
    "model_type": ["gpt2", "mixtral", "t5", "bert", "mamba", "gemma3", "vit", "x", 5],
    "architectures": [[], [1], ["T5ForConditionalGeneration"], "LlamaForCausalLM", None],
    "torch_dtype": ["float16", "int8", "float8_e4m3fn", 5], "dtype": ["float16", "complex64", "int8"],
    "quantization_config": [
        {"quant_method": "gptq"}, {"quant_method": "x"}, {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "compressed-tensors", "config_groups": {}}, {"quant_method": "fp8"}, 5, [],
    ],
    "bits": [1, 3, 5, 16, "4", 4.5], "group_size": [0, -1, 1, 3, 2**40, "128"], "desc_act": ["x", True],
    "ignore": [["re:(a|aa)+$"], ["re:" + "a?" * 60 + "a" * 60], "lm_head", [5]], "targets": [["re:.*"], [], 5],
    "dynamic": [{"+:.*": {"bits": 8}}, {"-:(a+)+$": {}}, 5], "sym": ["x", False], "checkpoint_format": ["gptq_v2", "x"],
    "chat_template": [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 2**31 }}",
        "{{ 9 ** (9 ** 9) }}", "{% for %}", "{{ ''.__class__.__mro__ }}", "{% include '/etc/passwd' %}", 5, {},
    ],
    "tokenizer_class": ["LlamaTokenizer", "T5Tokenizer", "X", "PreTrainedTokenizerFast", 5],
    "model_max_length": [-1, 2**70, "x"], "eos_token": [5, "x", None], "padding": [{"strategy": {"Fixed": 10**12}}],
    "truncation": [{"max_length": 0, "strategy": "LongestFirst", "stride": 10**9, "direction": "Right"}],
    "pre_tokenizer": [
        {"type": "Split", "pattern": {"Regex": "(a+)+b|(.*)*x"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}, None,
    ],
    "normalizer": [{"type": "Replace", "pattern": {"String": ""}, "content": "x" * 99}, {"type": "NFC"}],
    "max_new_tokens": [2**40, -1, "x"], "num_beams": [10**6, 0], "temperature": [0, -1, "x"], "do_sample": ["x", True],
    "cache_implementation": ["static", "x"], "metadata": [{"format": "tf"}, {"format": 5}, []],
    "__metadata__": [{"format": "pt", "x": "y" * 999}, {"format": 5}, []],
    "fingerprint": [5, [], {}], "perplexity": ["x", None, -1, float("nan")],
    "files": [{"../x": "y"}, {"config.json": 5}],
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """One damage. kind: a name of KINDS. seed: decides the rest."""

    kind: str
    file: str
    seed: int

    def apply(self, folder: Path) -> None:
        """Damage the file in `folder`, if it is still there."""
        path = folder / self.file
        if path.is_file() and not path.is_symlink():
            # damaged before: no JSON any more, or too deep
            with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError, struct.error):
                KINDS[self.kind](path, Random(self.seed))


def draw(folder: Path, random: Random, only: str | None = None) -> list[Mutation]:
    """One to three mutations of files of the folder; `only`: of files whose name contains that."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if not only or only in name]
    mutations = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        name = random.choice(names)
        kinds = [kind for kind in KINDS if any(name.endswith(suffix) for suffix in SUFFIXES.get(kind, ("",)))]
        weights = [1 if kind in SUFFIXES else 0.3 for kind in kinds]
        mutations.append(Mutation(random.choices(kinds, weights)[0], name, random.getrandbits(32)))
    return mutations


def _bytes(path: Path, random: Random) -> None:
    """Flip, set, cut, insert, repeat or clear some bytes."""
    data = bytearray(path.read_bytes())
    begin = random.randrange(len(data) + 1)
    size = random.choice((1, 1, 2, 8, 100))
    end = min(len(data), begin + size)
    step = random.randrange(8)
    if step == 0 and begin < len(data):
        data[begin] ^= 1 << random.randrange(8)
    elif step == 1:
        data[begin:end] = random.randbytes(end - begin)
    elif step == 2:
        del data[begin:]
    elif step == 3:
        del data[begin:end]
    elif step == 4:
        data[begin:begin] = random.randbytes(size)
    elif step == 5:
        data[begin:begin] = data[begin:end] * random.randrange(1, 4)
    elif step == 6:
        data[begin:end] = bytes(end - begin)
    else:
        data.clear()
    path.write_bytes(data)


def _file(path: Path, random: Random) -> None:
    """Something else stands where the file was: nothing, another file, a folder, a link, a pipe."""
    step = random.randrange(7)
    others = sorted(other for other in path.parent.iterdir() if other.is_file() and other != path)
    outside = path.parent.parent / "outside" / path.name
    if step == 0:
        path.unlink()
    elif step == 1 and others:
        path.write_bytes(random.choice(others).read_bytes())
    elif step == 2:
        path.unlink()
        path.mkdir()
    elif step == 3:  # the same content, but not the folder's own
        outside.parent.mkdir(exist_ok=True)
        path.rename(outside)
        path.symlink_to(outside)
    elif step == 4:
        path.unlink()
        path.symlink_to(path.name)
    elif step == 5:
        path.unlink()
        os.mkfifo(path)
    else:
        os.truncate(path, 1 << 30)  # a file with a hole


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


def mutate_json(value: Any, random: Random) -> Any:
    """The value with one change somewhere."""
    if isinstance(value, dict) and random.random() < 0.35:
        key = random.choice([key for key in KEYS if key in value] * 4 + list(KEYS))
        value[key] = random.choice(KEYS[key])
        return value
    places = list(_places(value))
    if not places:
        return random.choice(VALUES)
    container, key = random.choice(places)
    item = container[key]
    step = random.randrange(8)
    if step == 0:
        del container[key]
    elif step == 1:
        other, name = random.choice(places)
        container[key] = other.get(name) if isinstance(other, dict) else item
    elif step == 2 and isinstance(container, dict):
        container[random.choice([str(key) + " ", str(key).upper(), "", "\x1b[2J", "x" * 300, "../x"])] = item
        del container[key]
    elif step == 3:
        container[key] = random.choice(([item], {"x": item}, [item] * 3, str(item)))
    elif step == 4 and isinstance(item, int | float) and not isinstance(item, bool):
        container[key] = random.choice((item + 1, item - 1, item * 2, item // 2, -item, float(item), str(item)))
    elif step == 5 and isinstance(item, str) and item:
        at = random.randrange(len(item))
        container[key] = item[:at] + random.choice(("", "\x1b", "/", "..", "\0", "é", item)) + item[at + 1 :]
    else:
        container[key] = random.choice(VALUES)
    return value


def _json(path: Path, random: Random) -> None:
    """A change of a JSON file's values; of a file that holds one object a line, of one line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        lines = text.splitlines()
        number = random.randrange(len(lines)) if lines else 0
        lines[number : number + 1] = [_dumped(mutate_json(json.loads(line), random)) for line in lines[number:][:1]]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    path.write_text(_dumped(mutate_json(json.loads(text), random), random), encoding="utf-8")


def _dumped(value: Any, random: Random | None = None) -> str:
    """JSON, now and then with a key twice, or nested for ever."""
    text = json.dumps(value)  # lone surrogates become escapes, NaN stays NaN, as Python's reader takes it
    if random and isinstance(value, dict) and value and random.random() < 0.05:
        key = random.choice(list(value))
        return f"{text[:-1]}, {json.dumps(key)}: {json.dumps(random.choice(VALUES))}}}"
    if random and random.random() < 0.02:
        return '{"x":' * 100_000 + text + "}" * 100_000
    return text


def _split(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _header(path: Path, random: Random) -> None:
    """A change of a safetensors header: names, dtypes, shapes, offsets, its length."""
    header, data = _split(path)
    names = [name for name in header if name != "__metadata__"]
    entry = header[random.choice(names)]
    step = random.randrange(8)
    if step == 0:
        entry["dtype"] = random.choice(
            ["F32", "F16", "BF16", "I8", "U8", "I32", "I64", "BOOL", "F8_E4M3", "F64", "X", 5]
        )
    elif step == 1:
        entry["shape"] = random.choice([entry["shape"][::-1], [1, *entry["shape"]], [], [0], [-1], [2**62, 4], "x"])
    elif step == 2:
        entry["data_offsets"] = random.choice([[0, 0], entry["data_offsets"][::-1], [0, 2**60], [-1, 5], [0], "x"])
    elif step == 3:
        one, other = random.choice(names), random.choice(names)
        header[one], header[other] = header[other], header[one]
    elif step == 4:
        name = random.choice(names)
        renamed = name + random.choice([".x", "\x1b[2J", "/../../x", "\0", "x" * 300])
        header = {(renamed if key == name else key): value for key, value in header.items()}
    elif step == 5:
        del header[random.choice(names)]
    else:
        header = mutate_json(header, random)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    length = len(encoded)
    if random.random() < 0.1:
        length = random.choice((0, 1, length - 1, length + 1, 2**32, 2**63, HEADER_LIMIT + 1))
    path.write_bytes(struct.pack("<Q", length) + encoded + data)


def _numbers(path: Path, random: Random) -> None:
    """A change of one tensor's bytes: of one number or of all, random, extreme, or another tensor's."""
    header, data = _split(path)
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    begin, end = random.choice(tensors)["data_offsets"]
    width = random.choice((1, 2, 4, 8, end - begin))
    start = begin + random.randrange(max(1, (end - begin) // max(1, width))) * width
    stop = min(end, start + width)
    size = stop - start
    step = random.randrange(5)
    if step == 0:
        piece = random.randbytes(size)
    elif step == 1:
        piece = bytes(size)
    elif step == 2:
        piece = b"\xff" * size
    elif step == 3:
        piece = (random.choice((b"\x00\x7c", b"\x80\x7f", b"\x00\x00\x80\x7f", b"\xff\x7f", b"\x01\x00")) * size)[:size]
    else:
        at = random.randrange(max(1, len(data) - size))
        piece = data[at : at + size]
    path.write_bytes(path.read_bytes()[: -len(data)] + data[:start] + piece.ljust(size, b"\0") + data[stop:])


KINDS: dict[str, Callable[[Path, Random], None]] = {
    "bytes": _bytes, "file": _file, "json": _json, "header": _header, "numbers": _numbers,
}  # fmt: skip
SUFFIXES = {"json": (".json", ".jsonl"), "header": (".safetensors",), "numbers": (".safetensors",)}
