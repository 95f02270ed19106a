"""Every format by every scheme that it holds: written, read, and decoded by readers written from its description."""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from bitpress.kernels.packing import pack
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.weights.integer import Integer
from bitpress.kernels.weights.nf4 import NF4_CODEBOOK
from bitpress.pipeline.errors import NumericsError
from bitpress.pipeline.formats import detect, first_fitting, registry
from bitpress.pipeline.formats.base import Format
from bitpress.pipeline.methods import default_method

INTEGERS = [
    f"int{b}-{group}{asym}" for b in (2, 3, 4, 8) for group in ("g32", "g64", "channel") for asym in ("", "-asym")
]
FLOATS = ["fp8-block", "fp8-dynamic", "fp8-tensor-dynamic", "fp8-tensor-static", "nvfp4", "mxfp4"]
SCHEMES = [Scheme.parse(name) for name in (*INTEGERS, "int8-dynamic", "nf4", "nf4-dq", *FLOATS)]
SHAPE = (64, 128)
CASES = [
    pytest.param(fmt, scheme, id=f"{fmt.name}-{scheme.name}")
    for fmt in registry().values()
    for scheme in SCHEMES
    if not fmt.problems(scheme, SHAPE)
]
EVERY = pytest.mark.parametrize(("format", "scheme"), CASES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEPT = ["lm_head", "model.layers.1.mlp.gate", "model.layers.0.self_attn.k_proj"]
QUANTIZED = "model.layers.0.mlp.up_proj"
Stored = dict[str, Tensor]


def shapes(format: Format, scheme: Scheme) -> list[tuple[int, int]]:
    """Whole words and blocks; a single row; primes, as far as scheme and format go."""
    size = scheme.group_size if scheme.weight.description().type == "int" and scheme.group_size else 1
    candidates = [SHAPE, (1, 3 * size), (31, 13 * size if size == 1 else size), (7, 11 * size), (32, 32 * size)]
    return [shape for shape in candidates if not scheme.problems(shape) and not format.problems(scheme, shape)]


def random_qtensor(scheme: Scheme, shape: tuple[int, int], scale_dtype: torch.dtype) -> QTensor:
    """A quantized random weight, its codes and zero points then made to take every value there is."""
    generator = torch.Generator().manual_seed(shape[0])
    weight = torch.randn(shape, generator=generator)
    q, _ = default_method(scheme).quantize(weight, scheme, scale_dtype)
    if scheme.weight.description().type == "float":
        q.extra.update(scheme.static.random(generator) if scheme.static else {})
        return q
    if scheme.weight.description().type == "codebook":
        codes = torch.randint(256, q.codes.shape, dtype=torch.uint8, generator=generator)
        return QTensor(scheme, shape, codes, q.scales, extra=q.extra)
    codes = torch.randint(scheme.max_code + 1, shape, dtype=torch.uint8, generator=generator)
    zeros = None
    if q.zeros is not None:
        zeros = torch.randint(scheme.max_code + 1, q.zeros.shape, dtype=torch.uint8, generator=generator)
    return QTensor(scheme, shape, pack(codes, scheme.bits), q.scales, zeros)


def written(format: Format, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> tuple[QTensor, Stored]:
    q = random_qtensor(scheme, shape, format.scale_dtype(scheme, dtype))
    q.check()
    return q, format.write(q, dtype)


# Readers that share nothing with ours, one element at a time, float32 as the formats have it.


def stream(words: Iterable[int], bits: int) -> list[int]:
    """Codes of a bit stream in 32-bit words, lowest bits first; those of the tail's filling, too."""
    words = list(words)
    whole = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return [(whole >> (bits * j)) & (2**bits - 1) for j in range(32 * len(words) // bits)]


def read_gptq(stored: Stored, scheme: Scheme, minus: int = 1) -> np.ndarray:
    scales, g_idx = stored["scales"].float().numpy(), stored["g_idx"].tolist()
    columns = [stream(column, scheme.bits) for column in stored["qweight"].t().tolist()]
    zeros = [stream(row, scheme.bits) for row in stored["qzeros"].tolist()]
    weight = np.zeros((scales.shape[1], len(g_idx)), np.float32)
    for n, k in np.ndindex(*weight.shape):
        group = g_idx[k]
        weight[n, k] = scales[group, n] * np.float32(columns[n][k] - (zeros[group][n] + minus))
    return weight


def read_gptq_v2(stored: Stored, scheme: Scheme) -> np.ndarray:
    return read_gptq(stored, scheme, 0)


def read_awq(stored: Stored, scheme: Scheme) -> np.ndarray:
    scales = stored["scales"].float().numpy()
    codes, zeros = ([stream(row, 4) for row in stored[name].tolist()] for name in ("qweight", "qzeros"))
    size = len(codes) // len(scales)
    weight = np.zeros((scales.shape[1], len(codes)), np.float32)
    for n, k in np.ndindex(*weight.shape):
        place, group = n // 8 * 8 + [0, 2, 4, 6, 1, 3, 5, 7].index(n % 8), k // size
        weight[n, k] = scales[group, n] * np.float32(codes[k][place] - zeros[group][place])
    return weight


def read_mlx(stored: Stored, scheme: Scheme) -> np.ndarray:
    scales, biases = (stored[name].float().numpy() for name in ("scales", "biases"))
    codes = [stream(row, scheme.bits) for row in stored["weight"].view(torch.int32).tolist()]
    weight = np.zeros((len(codes), scales.shape[1] * scheme.group_size), np.float32)
    for n, k in np.ndindex(*weight.shape):
        group = k // scheme.group_size
        weight[n, k] = scales[n, group] * np.float32(codes[n][k]) + biases[n, group]
    return weight


def read_packed(stored: Stored, scheme: Scheme) -> np.ndarray:
    rows, columns = stored["weight_shape"].tolist()
    scales, offset = stored["weight_scale"].float().numpy(), 2 ** (scheme.bits - 1)
    codes = [stream(row, scheme.bits) for row in stored["weight_packed"].tolist()]
    zeros = [[offset] * rows] * scales.shape[1]  # as they lie in the file, where a signed 0 is 2^(bits - 1)
    if "weight_zero_point" in stored:
        zeros = [stream(column, scheme.bits) for column in stored["weight_zero_point"].t().tolist()]
    weight = np.zeros((rows, columns), np.float32)
    groups = [k // (columns // scales.shape[1]) for k in range(columns)]
    if "weight_g_idx" in stored:
        groups = stored["weight_g_idx"].tolist()
    for n, k in np.ndindex(rows, columns):
        group = groups[k]
        weight[n, k] = scales[n, group] * np.float32((codes[n][k] - offset) - (zeros[group][n] - offset))
    return weight


def read_compressed(stored: Stored, scheme: Scheme) -> np.ndarray:
    if scheme.weight.description().type == "float":
        return read_floats(stored, scheme)
    return read_packed(stored, scheme) if "weight_packed" in stored else read_int8(stored, scheme)


def read_int8(stored: Stored, scheme: Scheme) -> np.ndarray:
    scales = stored["weight_scale"].float().numpy()
    weight = np.zeros(stored["weight"].shape, np.float32)
    for n, k in np.ndindex(*weight.shape):
        weight[n, k] = scales[n, 0] * np.float32(stored["weight"][n, k].item())
    return weight


def read_nf4(stored: Stored, scheme: Scheme) -> np.ndarray:
    state = json.loads(bytes(stored["weight.quant_state.bitsandbytes__nf4"].tolist()))
    packed, table = stored["weight"].flatten().tolist(), stored["weight.quant_map"].numpy()
    absmax = stored["weight.absmax"].numpy()
    if scheme.weight.double_quant:
        spread, codebook = stored["weight.nested_absmax"].numpy(), stored["weight.nested_quant_map"].numpy()
        size, offset = state["nested_blocksize"], np.float32(state["nested_offset"])
        absmax = [codebook[code] * spread[i // size] + offset for i, code in enumerate(absmax.tolist())]
    weight = np.zeros(state["shape"][0] * state["shape"][1], np.float32)
    for i in range(weight.size):
        nibble = packed[i // 2] & 15 if i % 2 else packed[i // 2] >> 4
        weight[i] = table[nibble] * absmax[i // state["blocksize"]]
    return weight.reshape(state["shape"])


def read_blocks(stored: Stored, scheme: Scheme) -> np.ndarray:
    """As the package gguf itself decodes them; each type of block has another size."""
    blocks = stored["blocks"].numpy()
    sizes = {gguf.GGML_QUANT_SIZES[kind][1]: kind for kind in map(gguf.GGMLQuantizationType, (2, 6, 8, 11, 39, 40))}
    weight = gguf.quants.dequantize(blocks.reshape(len(blocks), -1), sizes[blocks.shape[-1]])
    if "global_scale" not in stored:
        return weight
    scales = stored["blocks"][..., :4].reshape(len(blocks), -1, 1).view(torch.float8_e4m3fn).float().numpy()
    codes = weight.reshape(len(blocks), -1, 16) / scales  # exact
    return (codes * (scales / stored["global_scale"].numpy())).reshape(weight.shape)


def read_q4_1(stored: Stored, scheme: Scheme) -> np.ndarray:
    """With a minimum that is the product of scale and zero point, and not yet rounded to float16."""
    blocks = stored["blocks"].numpy()
    if blocks.shape[-1] != 20:
        return read_blocks(stored, scheme)
    scales, minima = (blocks[..., i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    codes = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], -1).astype(np.float32)
    return ((codes + np.round(minima / scales)) * scales).reshape(len(blocks), -1)


def read_floats(stored: Stored, scheme: Scheme) -> np.ndarray:
    """ModelOpt's layout, fp8's and that of compressed-tensors differ in names and in how the factor is meant."""
    first = ("weight_scale", "weight_scale_inv", "scales"), ("weight", "weight_packed", "blocks")
    scales, packed = (next(stored[name] for name in names if name in stored) for names in first)
    powers = np.exp2(scales.numpy().astype(np.float32) - 127) if scales.dtype == torch.uint8 else None
    scales = scales.float().numpy()
    if packed.dtype == torch.uint8:
        magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
        table = np.concatenate([magnitudes, -magnitudes])
        codes = np.stack([packed.numpy() & 15, packed.numpy() >> 4], -1).reshape(len(packed), -1)
        if powers is not None:
            return table[codes] * powers.repeat(32, 1)
        divisor = np.float32(1) / stored["weight_scale_2"].numpy() if "weight_scale_2" in stored else None
        divisor = stored["weight_global_scale"].numpy() if divisor is None else divisor
        return table[codes] * (scales / divisor).repeat(16, 1)
    values, block = packed.float().numpy(), scheme.weight.description().strategy == "block"
    if block:
        scales = scales.reshape(-(-values.shape[0] // 128), -1).repeat(128, 0)[: len(values)]
        return values * scales.repeat(128, 1)[:, : values.shape[1]]
    return values * (scales.reshape(-1, 1) if scales.size == len(values) else scales.reshape(1, 1))


READERS: dict[str, Callable[[Stored, Scheme], np.ndarray]] = {
    "gptq": read_gptq,
    "gptq-v2": read_gptq_v2,
    "compressed-tensors": read_compressed,
    "bitsandbytes": read_nf4,
    "gguf": read_blocks,
    "gguf-q4_1": read_q4_1,
    "awq": read_awq,
    "mlx": read_mlx,
    "fp8": read_floats,
    "modelopt": read_floats,
    "mxfp4": read_floats,
}


def assert_same(found: QTensor, expected: QTensor) -> None:
    assert (found.scheme, found.shape) == (expected.scheme, expected.shape)
    assert [name for name, _ in found.tensors()] == [name for name, _ in expected.tensors()]
    for (name, one), (_, other) in zip(found.tensors(), expected.tensors()):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name


def test_every_scheme_has_a_format() -> None:
    assert {case.values[1].name for case in CASES} == {scheme.name for scheme in SCHEMES}
    assert {case.values[0].name for case in CASES} == {
        name for name, format in registry().items() if not format.read_only
    }
    assert all(not first_fitting({"": (scheme, SHAPE)})[0].problems(scheme, SHAPE) for scheme in SCHEMES)


class TestEveryFormat:
    @EVERY
    def test_reads_what_it_wrote(self, format: Format, scheme: Scheme) -> None:
        for shape in shapes(format, scheme):
            for dtype in DTYPES:
                q, stored = written(format, scheme, shape, dtype)
                assert stored.keys() <= set(format.suffixes)
                assert format.layers(f"a.{suffix}" for suffix in stored) == ["a"]
                found = format.read(scheme, {suffix: tensor.clone() for suffix, tensor in stored.items()})
                found.check()
                if (
                    format.quant_method == "gguf" and not scheme.symmetric
                ):  # its blocks hold codes less their zero points
                    assert torch.equal(found.dequantize(), q.dequantize())
                else:
                    assert_same(found, q)

    @EVERY
    def test_an_independent_reader_agrees_to_the_bit(self, format: Format, scheme: Scheme) -> None:
        for shape, dtype in zip(shapes(format, scheme), DTYPES):
            q, stored = written(format, scheme, shape, dtype)
            found = torch.from_numpy(READERS[format.name](stored, scheme))
            assert torch.equal(found, q.dequantize())

    @EVERY
    @pytest.mark.parametrize("kept", [KEPT, ["lm_head"], []])
    def test_the_config_leads_back_to_the_scheme(self, format: Format, scheme: Scheme, kept: list[str]) -> None:
        config = json.loads(json.dumps(format.quantization_config({QUANTIZED: scheme}, kept, torch.bfloat16)))
        assert format.scheme_rules(config).get(QUANTIZED) == scheme
        _, stored = written(format, scheme, SHAPE, torch.bfloat16)
        assert detect(config, [f"model.layers.0.q_proj.{suffix}" for suffix in stored]).name == format.name
        if format.quant_method in ("gguf", "mlx"):  # others read what the files hold, and not this section
            return
        every = [*KEPT, "model.layers.10.mlp.gate"]
        if format.quant_method not in ("awq", "modelopt"):  # whose readers look for entries anywhere in a name
            every.append("model.layers.1.mlp.gate_proj")
        always = (
            {"lm_head"} if format.quant_method in ("gptq", "awq", "fp8") else set()
        )  # readers leave it alone unasked
        assert told_to_keep(config, every) == set(kept) | always


def told_to_keep(config: dict[str, Any], names: list[str]) -> set[str]:
    """Which of the names another runtime would leave alone, by the rules of each format."""
    if config["quant_method"] == "gptq":
        patterns = [key.removeprefix("-:") for key in config.get("dynamic", {}) if key.startswith("-:")]
        assert len(patterns) == len(config.get("dynamic", {}))
        assert config["lm_head"] is False
        return {name for name in names if name == "lm_head" or any(re.match(pattern, name) for pattern in patterns)}
    if config["quant_method"] == "compressed-tensors":
        return set(names) & set(config["ignore"])
    if config["quant_method"] in ("fp8", "mxfp4"):
        return set(names) & set(config["modules_to_not_convert"])
    if config["quant_method"] == "modelopt":
        return {name for name in names if any(entry in name for entry in config["ignore"])}
    if config["quant_method"] == "awq":
        return {name for name in names if any(entry in name for entry in config["modules_to_not_convert"])}
    return set(names) & set(config["llm_int8_skip_modules"] or [])


class TestAWQ:
    CONFIG: ClassVar[dict[str, Any]] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}

    @pytest.mark.parametrize(
        ("changes", "scheme"),
        [
            ({}, "int4-g32-asym"),
            ({"symmetric": True}, "int4-g32"),
            ({"group_size": -1, "version": "GEMM"}, "int4-channel-asym"),
            ({"bits": None, "w_bit": 4, "group_size": None, "q_group_size": 64}, "int4-g64-asym"),
        ],
    )
    def test_configs_of_other_writers(self, changes: dict[str, Any], scheme: str) -> None:
        config = {key: value for key, value in (self.CONFIG | changes).items() if value is not None}
        assert registry()["awq"].scheme_rules(config).get(QUANTIZED) == Scheme.parse(scheme)

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"version": "gemv"}, "version 'gemv' is not supported"),
            ({"version": 1}, "version 1 is not supported"),
            ({"backend": "llm-awq"}, "a layout of its own"),
            ({"bits": 8}, "bits is 8, expected 4"),
            ({"zero_point": False}, "zero_point is False"),
            ({"group_size": "x"}, "group_size is 'x', expected a whole number"),
            ({"symmetric": 1}, "symmetric is 1, expected true or false"),
        ],
    )
    def test_what_is_not_read(self, changes: dict[str, Any], why: str) -> None:
        with pytest.raises(ValueError, match=why):
            registry()["awq"].scheme_rules(self.CONFIG | changes)

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"qweight": torch.zeros(64, 16)}, "qweight has dtype torch.float32"),
            ({"qweight": torch.zeros(64, 9, dtype=torch.int32)}, r"qweight has shape \[64, 9\], expected \[64, 8\]"),
            ({"qzeros": torch.zeros(8, dtype=torch.int32)}, "qzeros has 1 dimensions"),
            ({"qzeros": torch.zeros(4, 8, dtype=torch.int32)}, "hold other numbers than 8"),
            ({"scales": torch.ones(4, 63)}, "63 outputs, no multiple of 8"),
        ],
    )
    def test_tensors_that_do_not_fit(self, changes: Stored, why: str) -> None:
        scheme = Scheme.parse("int4-g32")
        _, stored = written(registry()["awq"], scheme, SHAPE, torch.float16)
        with pytest.raises(ValueError, match=why):
            registry()["awq"].read(scheme, stored | changes)

    def test_an_entry_that_a_quantized_name_holds_is_left_out(self) -> None:
        schemes = {"model.layers.1.mlp.gate_proj": Scheme.parse("int4-g32")}
        config = registry()["awq"].quantization_config(schemes, KEPT, torch.bfloat16)
        assert config["modules_to_not_convert"] == ["lm_head", "model.layers.0.self_attn.k_proj"]

    def test_all_layers_have_one_scheme(self) -> None:
        schemes = {"a": Scheme.parse("int4-g32"), "b": Scheme.parse("int4-g64")}
        assert "int4-g32 and int4-g64" in registry()["awq"].mixture_problems(schemes)[0]


class TestMLX:
    def test_what_mlx_reads_in_config_json(self) -> None:
        schemes = {"a": Scheme.parse("int4-g64"), "b": Scheme.parse("int4-g64"), "c": Scheme.parse("int8-g32-asym")}
        section = registry()["mlx"].quantization_config(schemes, [], torch.bfloat16)
        expected = {"group_size": 64, "bits": 4, "mode": "affine"}
        other = {"group_size": 32, "bits": 8, "mode": "affine"}
        assert registry()["mlx"].config_keys(section) == {"quantization": expected | {"c": other}}

    def test_a_section_of_mlxs_own_writers(self) -> None:
        own = {"group_size": 64, "bits": 4, "mode": "affine", "b": {"group_size": 32, "bits": 8}, "c": False}
        for other in ({}, {"quantization_config": own}):  # mlx-lm writes it twice
            section = registry()["mlx"].section_of({"quantization": own, **other})
            assert section is not None
            rules = registry()["mlx"].scheme_rules(section)
            assert (rules.get("a"), rules.get("b")) == tuple(map(Scheme.parse, ("int4-g64-asym", "int8-g32-asym")))
        assert registry()["mlx"].section_of({"quantization": own, "quantization_config": {"quant_method": "x"}}) is None

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"weight": torch.zeros(64, 16, dtype=torch.int32)}, "weight has dtype torch.int32, expected torch.uint32"),
            ({"biases": torch.zeros(64, 4, dtype=torch.float16)}, "biases are not whole zero points times their"),
            ({"biases": torch.zeros(64, 3)}, "biases are torch.float32"),
            ({"scales": torch.zeros(64, dtype=torch.float16)}, "scales has 1 dimensions"),
        ],
    )
    def test_tensors_that_do_not_fit(self, changes: Stored, why: str) -> None:
        scheme = Scheme.parse("int4-g32-asym")
        _, stored = written(registry()["mlx"], scheme, SHAPE, torch.float16)
        if changes.keys() == {"biases"} and changes["biases"].shape == stored["biases"].shape:
            changes = {"biases": stored["biases"] * 1.01}
        with pytest.raises(ValueError, match=why):
            registry()["mlx"].read(scheme, stored | changes)

    def test_products_that_float32_rounds_are_refused(self) -> None:
        scheme = Scheme.parse("int4-g32-asym")
        q = random_qtensor(scheme, SHAPE, torch.float32)
        with pytest.raises(NumericsError, match="which rounds some of these"):
            registry()["mlx"].write(q, torch.float32)


class TestGPTQ:
    @pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
    def test_zero_points_are_stored_minus_one(self, bits: int, word: int) -> None:
        _, stored = written(registry()["gptq"], Scheme(Integer(bits, 32)), SHAPE, torch.float16)
        assert (stored["qzeros"] == word).all()

    def test_zero_points_of_three_bits(self) -> None:
        _, stored = written(registry()["gptq"], Scheme(Integer(3, 32)), SHAPE, torch.float16)
        assert {code for row in stored["qzeros"].tolist() for code in stream(row, 3)} == {3}

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("group", [32, 64, None])
    def test_dtypes_shapes_and_groups(self, bits: int, group: int | None) -> None:
        (rows, columns), size = SHAPE, group or SHAPE[1]
        _, stored = written(registry()["gptq"], Scheme(Integer(bits, group)), SHAPE, torch.bfloat16)
        assert {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in stored.items()} == {
            "qweight": (torch.int32, (columns * bits // 32, rows)),
            "qzeros": (torch.int32, (columns // size, rows * bits // 32)),
            "scales": (torch.float16, (columns // size, rows)),
            "g_idx": (torch.int32, (columns,)),
        }
        assert stored["g_idx"].tolist() == [k // size for k in range(columns)]
        assert all(tensor.is_contiguous() for tensor in stored.values())

    def test_shapes_and_zero_points_that_it_cannot_hold(self) -> None:
        gptq = registry()["gptq"]
        assert "multiples of 32" in gptq.problems(Scheme.parse("int4-channel"), (33, 64))[0]
        assert "multiples of 32" in registry()["gptq-v2"].problems(Scheme.parse("int4-channel"), (33, 64))[0]
        assert "zero point of 0" in gptq.problems(Scheme.parse("int4-g32-asym"), SHAPE)[0]

    def test_version_2_is_no_default(self) -> None:
        assert first_fitting({"": (Scheme.parse("int4-g32"), SHAPE)})[0].name == "gptq"
        assert first_fitting({"": (Scheme.parse("int4-g32-asym"), SHAPE)})[0].name == "compressed-tensors"

    @pytest.mark.parametrize(("bits", "word"), [(2, 0xAAAAAAAA), (4, 0x88888888), (8, 0x80808080)])
    def test_zero_points_of_version_2_are_stored_as_they_are(self, bits: int, word: int) -> None:
        _, stored = written(registry()["gptq-v2"], Scheme(Integer(bits, 32)), SHAPE, torch.float16)
        assert {value & 0xFFFFFFFF for value in stored["qzeros"].flatten().tolist()} == {word}

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_symmetric_files_under_the_other_version_s_tag_are_read_right(self, bits: int) -> None:
        first, second = registry()["gptq"], registry()["gptq-v2"]
        for writer, reader in ((first, second), (second, first)):
            q, stored = written(writer, Scheme(Integer(bits, 32)), SHAPE, torch.float16)
            assert_same(reader.read(q.scheme, stored), q)

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_asymmetric_version_1_whose_zero_points_borrow_from_their_neighbours(self, bits: int) -> None:
        """Its writers take version 2's words as numbers and subtract a 1 in the place of every code; 3-bit codes
        straddle words, and are subtracted from one by one."""
        q, _ = written(registry()["gptq-v2"], Scheme(Integer(bits, 32, symmetric=False)), SHAPE, torch.float16)
        assert q.zeros is not None
        q.zeros[::3] = 0  # where the borrow comes from
        stored = registry()["gptq-v2"].write(q, torch.float16)
        ones = sum(1 << place for place in range(0, 32, bits))
        rows = stored["qzeros"].tolist()
        if bits == 3:
            codes = torch.tensor([[(code - 1) & 7 for code in stream(row, 3)] for row in rows], dtype=torch.uint8)
            stored["qzeros"] = pack(codes, 3)
        else:
            less = [[((word & 0xFFFFFFFF) - ones) % 2**32 for word in row] for row in rows]
            stored["qzeros"] = torch.tensor(less).to(torch.int32)
        assert_same(registry()["gptq"].read(q.scheme, stored), q)

    @pytest.mark.parametrize("name", [name for name in INTEGERS if "asym" not in name])
    def test_without_g_idx_the_inputs_lie_as_in_the_model(self, name: str) -> None:
        q, stored = written(registry()["gptq"], Scheme.parse(name), SHAPE, torch.float16)
        del stored["g_idx"]
        assert_same(registry()["gptq"].read(q.scheme, stored), q)

    @pytest.mark.parametrize(
        ("change", "names", "said"),
        [
            ({}, [], None),
            ({"desc_act": True, "group_size": -1}, [], None),  # one group: no order matters
            ({"dynamic": {"-:^a$": {}, r".*\.down_proj": {"desc_act": True}}}, [], None),
            ({"desc_act": True}, [], "desc_act is true, and g_idx is missing"),
            ({"dynamic": {r".*\.up_proj": {"desc_act": True}}}, [], "desc_act is true, and g_idx is missing"),
            ({}, ["other.g_idx"], f"g_idx is missing, which other layers have.*\n  {QUANTIZED}.g_idx"),
        ],
    )
    def test_g_idx_may_be_left_out_where_it_says_nothing(
        self, change: dict[str, Any], names: list[str], said: str | None
    ) -> None:
        layers = [QUANTIZED, *(name.removesuffix(".g_idx") for name in names)]
        lost = registry()["gptq"].missing_tensors(self.config(**change), layers, names)
        assert (lost is None) == (said is None)
        assert said is None or re.match(said, lost or "")

    def test_older_configs_without_sym(self) -> None:
        config = self.config()
        del config["sym"], config["desc_act"]
        assert registry()["gptq"].scheme_rules(config).get(QUANTIZED) == Scheme.parse("int4-g128")

    def config(self, **changes: Any) -> dict[str, Any]:
        schemes = {QUANTIZED: Scheme.parse("int4-g128")}
        return registry()["gptq"].quantization_config(schemes, [], torch.float16) | changes

    def test_gptqmodel_s_other_names(self) -> None:
        config = self.config(method="gptq", format="gptq_v2")
        del config["quant_method"], config["checkpoint_format"]
        found = detect(config, ["a.qweight"])
        assert found.name == "gptq-v2"
        assert found.scheme_rules(config).get(QUANTIZED) == Scheme.parse("int4-g128")

    def test_layers_left_alone_and_layers_with_settings_of_their_own(self) -> None:
        gptq = registry()["gptq"]
        assert gptq.scheme_rules(self.config(dynamic={"-:^lm_head$": {}})).get(QUANTIZED) == Scheme.parse("int4-g128")
        assert gptq.scheme_rules(self.config(dynamic=None)).get(QUANTIZED) == Scheme.parse("int4-g128")
        for pattern in (r"+:.*\.down_proj", r".*\.down_proj"):
            later = {r".*\.layers\.1\..*": {"bits": 2}}
            rules = gptq.scheme_rules(self.config(dynamic={"-:^lm_head$": {}, pattern: {"bits": 8}, **later}))
            assert rules.get("model.layers.1.mlp.down_proj") == Scheme.parse("int8-g128")  # the first that matches
            assert rules.get("model.layers.1.mlp.up_proj") == Scheme.parse("int2-g128")
            assert rules.get(QUANTIZED) == Scheme.parse("int4-g128")

    @pytest.mark.parametrize("pattern", ["(a+)+$", r"(.*a){30}", r"(\w|\w\w)*x", "(?=x)", "[", "a|b"])
    def test_patterns_that_could_take_for_ever_are_refused(self, pattern: str) -> None:
        with pytest.raises(ValueError, match="pattern"):
            registry()["gptq"].scheme_rules(self.config(dynamic={pattern: {"bits": 8}}))
        left_alone = self.config(dynamic={f"-:{pattern}": {}})  # need not be run to read what is quantized
        assert registry()["gptq"].scheme_rules(left_alone).get(QUANTIZED) == Scheme.parse("int4-g128")

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
            ({"checkpoint_format": ["gptq"]}, "checkpoint_format"),
            ({"sym": None}, "symmetric is None"),
            ({"bits": "4"}, "bits is '4'"),
            ({"dynamic": ["x"]}, "dynamic is"),
        ],
    )
    def test_configs_that_are_not_read(self, change: dict[str, Any], said: str) -> None:
        config = self.config(**change)
        with pytest.raises(ValueError, match=said):
            detect(config, ["a.qweight"]).scheme_rules(config)


class TestCompressedTensors:
    @pytest.mark.parametrize("name", INTEGERS)
    def test_dtypes_and_shapes(self, name: str) -> None:
        scheme = Scheme.parse(name)
        for rows, columns in shapes(registry()["compressed-tensors"], scheme):
            _, stored = written(registry()["compressed-tensors"], scheme, (rows, columns), torch.bfloat16)
            groups = columns // (scheme.group_size or columns)
            expected = {
                "weight_packed": (torch.int32, (rows, -(-columns * scheme.bits // 32))),
                "weight_scale": (torch.bfloat16, (rows, groups)),
                "weight_shape": (torch.int64, (2,)),
            }
            if not scheme.symmetric:
                expected["weight_zero_point"] = (torch.int32, (-(-rows * scheme.bits // 32), groups))
            assert {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in stored.items()} == expected
            assert stored["weight_shape"].tolist() == [rows, columns]
            assert all(tensor.is_contiguous() for tensor in stored.values())

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_is_gptq_transposed_where_both_hold_it(self, bits: int) -> None:
        scheme = Scheme(Integer(bits, 32))
        _, one = written(registry()["compressed-tensors"], scheme, SHAPE, torch.float16)
        _, other = written(registry()["gptq"], scheme, SHAPE, torch.float16)
        assert torch.equal(one["weight_packed"].t(), other["qweight"])
        assert torch.equal(one["weight_scale"].t(), other["scales"])

    @pytest.mark.parametrize("name", [*INTEGERS, "int8-dynamic"])
    def test_zero_points_as_early_versions_stored_them(self, name: str) -> None:
        """int8 [out, groups], the middle code taken away; and zeros beside symmetric weights."""
        packed, scheme = registry()["compressed-tensors"], Scheme.parse(name)
        q, stored = written(packed, scheme, (31, 64), torch.bfloat16)
        if q.zeros is not None:
            signed = q.zeros.to(torch.int16) - 2 ** (scheme.bits - 1)
            assert_same(packed.read(scheme, stored | {"weight_zero_point": signed.to(torch.int8)}), q)
            return
        nothing = torch.zeros(stored["weight_scale"].shape, dtype=torch.int8)
        assert_same(packed.read(scheme, stored | {"weight_zero_point": nothing}), q)
        nothing[-1] = 1
        with pytest.raises(ValueError, match=r"weight_zero_point does not belong to a symmetric scheme: \d of \d+ are"):
            packed.read(scheme, stored | {"weight_zero_point": nothing})

    @pytest.mark.parametrize("actorder", [None, "weight", "static", "group", "dynamic"])
    def test_every_actorder(self, actorder: str | None) -> None:
        packed = registry()["compressed-tensors"]
        config = packed.quantization_config({QUANTIZED: Scheme.parse("int4-g32")}, [], torch.bfloat16)
        config["config_groups"]["group_0"]["weights"]["actorder"] = actorder
        assert packed.scheme_rules(config).get(QUANTIZED) == Scheme.parse("int4-g32")
        needed = packed.missing_tensors(config, [QUANTIZED], [])
        assert (needed is not None) == (actorder in ("group", "dynamic"))  # the second is the first's other name
        assert packed.missing_tensors(config, [QUANTIZED], [f"{QUANTIZED}.weight_g_idx"]) is None

    def test_int8(self) -> None:
        scheme, shape = Scheme.parse("int8-dynamic"), (7, 13)
        _, stored = written(registry()["compressed-tensors"], scheme, shape, torch.bfloat16)
        assert {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in stored.items()} == {
            "weight": (torch.int8, shape),
            "weight_scale": (torch.bfloat16, (7, 1)),
        }

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"num_bits": 4.0}, "bits is 4.0"),
            ({"num_bits": 5}, "int5 is not a scheme"),
            ({"group_size": "128"}, "group_size is '128'"),
            ({"group_size": 0}, "group_size 0"),
            ({"symmetric": "yes"}, "symmetric is 'yes'"),
            ({"strategy": "tensor"}, "strategy 'tensor'"),
            ({"actorder": "shuffled"}, "actorder 'shuffled'"),
            ({"type": "float"}, "type 'float'"),
        ],
    )
    def test_configs_that_are_not_read(self, change: dict[str, Any], said: str) -> None:
        packed = registry()["compressed-tensors"]
        config = packed.quantization_config({QUANTIZED: Scheme.parse("int4-g128")}, [], torch.bfloat16)
        config["config_groups"]["group_0"]["weights"] |= change
        with pytest.raises(ValueError, match=said):
            packed.scheme_rules(config)

    def test_rotations_are_not_read(self) -> None:
        packed = registry()["compressed-tensors"]
        config = packed.quantization_config({QUANTIZED: Scheme.parse("int4-g128")}, [], torch.bfloat16)
        with pytest.raises(ValueError, match="transform_config"):
            packed.scheme_rules(config | {"transform_config": {"config_groups": {"u": {}}}})


class TestBitsAndBytes:
    @pytest.mark.parametrize("double", [False, True])
    @pytest.mark.parametrize("shape", [(1, 1), SHAPE, (31, 13), (257, 129)])
    def test_dtypes_and_shapes(self, double: bool, shape: tuple[int, int]) -> None:
        scheme = Scheme.parse("nf4-dq" if double else "nf4")
        _, stored = written(registry()["bitsandbytes"], scheme, shape, torch.bfloat16)
        blocks = -(-shape[0] * shape[1] // 64)
        state = stored.pop("weight.quant_state.bitsandbytes__nf4")
        assert state.dtype == torch.uint8
        expected = {
            "weight": (torch.uint8, (-(-shape[0] * shape[1] // 2), 1)),
            "weight.absmax": (torch.uint8 if double else torch.float32, (blocks,)),
            "weight.quant_map": (torch.float32, (16,)),
        }
        content = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
        if double:
            expected["weight.nested_absmax"] = (torch.float32, (-(-blocks // 256),))
            expected["weight.nested_quant_map"] = (torch.float32, (256,))
            content |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        assert {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in stored.items()} == expected
        decoded = json.loads(bytes(state.tolist()))
        assert isinstance(decoded.pop("nested_offset", 0.0), float)
        assert decoded == content
        assert stored["weight.quant_map"].tolist() == list(NF4_CODEBOOK)

    @pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
    def test_codes_that_are_stored_as_floats(self, storage: torch.dtype) -> None:
        q, stored = written(registry()["bitsandbytes"], Scheme.parse("nf4-dq"), SHAPE, torch.bfloat16)
        stored["weight"] = stored["weight"].flatten().view(storage).unsqueeze(1)
        assert_same(registry()["bitsandbytes"].read(q.scheme, stored), q)

    @pytest.mark.parametrize("name", ["nf4", "nf4-dq"])
    @pytest.mark.parametrize("shape", [SHAPE, (31, 13), (257, 129)])
    def test_bitsandbytes_itself_reads_it(self, name: str, shape: tuple[int, int]) -> None:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        q, stored = written(registry()["bitsandbytes"], Scheme.parse(name), shape, torch.float32)
        weight = stored.pop("weight")
        state = QuantState.from_dict(stored, torch.device("cpu"))
        found = dequantize_4bit(weight, state)
        # their double-quantized scales may be multiplied and added in one step: one rounding less
        torch.testing.assert_close(found, q.dequantize(), rtol=2**-22 if q.extra else 0, atol=0)
