"""Fixtures for the kernels: random quantized weights, and memory that starts as NaN."""

from collections.abc import Callable, Iterator

import pytest
import torch

from bitpress.kernels.packing import pack
from bitpress.kernels.qtensor import NESTED_BLOCK, NestedScales, QTensor
from bitpress.kernels.scheme import NF4_BLOCK, Scheme


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """The matrices are small: more threads only wait for each other."""
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def make_qtensor(generator: torch.Generator) -> Callable[..., QTensor]:
    """make_qtensor("int4-g128", 64, 256): random codes, scales and zero points; weights of the order of 1."""

    def randint(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, dtype=torch.uint8, generator=generator)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) + 0.5

    def make(name: str, out_features: int, in_features: int, scale_dtype: torch.dtype = torch.float32) -> QTensor:
        scheme, shape = Scheme.parse(name), (out_features, in_features)
        if scheme.code == "nf4":
            blocks = -(-out_features * in_features // NF4_BLOCK)
            codes = randint(256, -(-out_features * in_features // 2))
            if not scheme.double_quant:
                return QTensor(scheme, shape, codes, rand(blocks))
            codebook = torch.linspace(-1, 1, 256)
            nested = NestedScales(rand(-(-blocks // NESTED_BLOCK)), codebook, torch.tensor(2.0))
            return QTensor(scheme, shape, codes, randint(256, blocks), nested=nested)
        groups, levels = scheme.groups(in_features), 1 << scheme.bits
        codes = pack(randint(levels, out_features, in_features), scheme.bits)
        scales = (rand(out_features, groups) * 2 / levels).to(scale_dtype)
        return QTensor(
            scheme, shape, codes, scales, None if scheme.symmetric else randint(levels, out_features, groups)
        )

    return make


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """torch.empty and its kin fill floating memory with NaN and integers with their largest value."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was)
