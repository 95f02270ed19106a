"""GPTQ's loop over the columns of a block in C, by a CPU's vectors: float32."""

import torch
from torch import Tensor

from .library import library

Grid = tuple[Tensor, Tensor, Tensor]


def problem(device: torch.device) -> str | None:
    """Why `round_columns` and `settle_columns` cannot run on this device, in a few words; None if they can."""
    if device.type != "cpu":
        return f"runs on CPUs, not on {device.type}"
    native = library()
    return native if isinstance(native, str) else None


def round_columns(left: Tensor, upper: Tensor, grid: Grid, groups: Tensor, codes: Tensor, errors: Tensor) -> None:
    """Round a block's columns one after the other, each with the compensations of those before it.

    Tensors and results are those of the Triton program, `kernels/triton/gptq_columns.py`, for any number of columns. No
    product is fused with a sum, as on GPUs they are; so all CPUs give the same bits. It takes one thread.
    """
    _run(left, upper, grid, groups, codes, errors, settle=False)


def settle_columns(slope: Tensor, inner: Tensor, grid: Grid, groups: Tensor, codes: Tensor, changes: Tensor) -> None:
    """Coordinate descent on a block's codes, one column after the other; likewise."""
    _run(slope, inner, grid, groups, codes, changes, settle=True)


def _run(
    left: Tensor, factor: Tensor, grid: Grid, groups: Tensor, codes: Tensor, steps: Tensor, *, settle: bool
) -> None:
    native = library()
    assert not isinstance(native, str), native
    columns, rows = left.shape
    assert factor.shape == (columns, columns)
    assert factor.stride(1) == 1 or columns == 1
    assert groups.shape == (columns,)
    assert groups.dtype == torch.int32
    assert codes.shape == steps.shape == left.shape
    assert all(table.shape == grid[0].shape and table.shape[1] == rows for table in grid)
    assert 0 <= int(groups.min()) <= int(groups.max()) < len(grid[0])
    assert all(tensor.dtype == torch.float32 for tensor in (left, factor, *grid, codes, steps))
    assert all(tensor.is_contiguous() for tensor in (left, *grid, groups, codes, steps))
    tables = (table.data_ptr() for table in grid)
    native.lib.bitpress_columns(
        left.data_ptr(), factor.data_ptr(), factor.stride(0), *tables, groups.data_ptr(), codes.data_ptr(),
        steps.data_ptr(), columns, rows, settle, native.best,
    )  # fmt: skip
