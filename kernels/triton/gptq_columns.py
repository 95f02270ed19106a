"""GPTQ's loop over the columns of a block as one Triton program for each tile of rows: CUDA, float32."""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with torch's CUDA builds, not with its CPU ones
    triton = None

from .launch import unsupported_machine

MAX_COLUMNS = 128  # of a block: a program holds all of them, for its rows, in registers

# One program takes 56 to 72 registers a thread on compute capability 8.0 and 9.0, none spilled. With 64 rows it takes
# 125 to 164, and a layer's few thousand rows would then leave most of a GPU idle.
_ROWS = 16
_WARPS = 4

Grid = tuple[Tensor, Tensor, Tensor]


def problem(device: torch.device) -> str | None:
    """Why `round_columns` and `settle_columns` cannot run on this device, in a few words; None if they can."""
    if device.type != "cuda":
        return f"runs on CUDA, not on {device.type}"
    return unsupported_machine()


def round_columns(left: Tensor, upper: Tensor, grid: Grid, groups: Tensor, codes: Tensor, errors: Tensor) -> None:
    """Round a block's columns one after the other, each with the compensations of those before it: the inner loop of
    GPTQ (arXiv 2210.17323, algorithm 1).

    Everything is transposed: C columns of R rows, C up to MAX_COLUMNS. Tensors are float32 (but `groups`), contiguous
    (but `upper`, whose rows may be apart) and on one device.

    Args:
        left: [C, R], the weights; on return, each column as it was when its turn came.
        upper: [C, C], the block of the upper Cholesky factor of the inverse Hessian, finite below the diagonal too.
        grid: scales, least and largest codes (whole numbers below 2^22), [G, R] each.
        groups: int32 [C], each column's row of the grid.
        codes: [C, R], is set to left / scale, rounded half to even, within the limits.
        errors: [C, R], is set to (left - code * scale) / pivot, for the columns beyond the block to make up for.

    Divisions are IEEE's, and products are fused with the sum that takes them. A loop in torch may differ in that, hence
    in the last bit, and so in codes: first in one that lies half-way between two to within that bit, then in those
    that make up for it.
    """
    _launch(left, upper, grid, groups, None, codes, errors)


def settle_columns(slope: Tensor, inner: Tensor, grid: Grid, groups: Tensor, codes: Tensor, changes: Tensor) -> None:
    """Coordinate descent on a block's codes, one column after the other; tensors as for `round_columns`, but

    Args:
        slope: [C, R], minus half the gradient of the loss; on return, each column as it was when its turn came.
        inner: [C, C], the block of the Hessian.
        codes: [C, R], is set to code + slope / (pivot * scale), rounded half to even, within the limits.
        changes: [C, R], is set to (code - code before) * scale.
    """
    # A copy, as threads share a column's codes and none waits until all others have read what it overwrites.
    _launch(slope, inner, grid, groups, codes.clone(), codes, changes)


def _launch(
    left: Tensor, factor: Tensor, grid: Grid, groups: Tensor, before: Tensor | None, codes: Tensor, steps: Tensor
) -> None:
    columns, rows = left.shape
    assert 0 < columns <= MAX_COLUMNS
    assert factor.stride(1) == 1 or columns == 1
    assert groups.dtype == torch.int32
    assert all(tensor.is_contiguous() for tensor in (left, *grid, groups, codes, steps))
    assert before is None or before.is_contiguous()
    block = max(16, triton.next_power_of_2(columns))
    pointers = (left, factor, *grid, groups, before, codes, steps)
    with torch.cuda.device_of(left):  # Triton would launch on the current one
        _columns[(triton.cdiv(rows, _ROWS),)](
            *pointers, rows, columns, factor.stride(0), BLOCK=block, ROWS=_ROWS, num_warps=_WARPS
        )


if triton is not None:

    @triton.jit
    def _columns(
        left_at, factor_at, scale_at, low_at, high_at, groups_at, before_at, codes_at, steps_at,
        rows, columns, stride, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """All columns of ROWS rows. Those in a register tile are indexed by no variable: a column is taken from it as
        the sum over all columns, the others counted as 0, which is exact."""
        column = tl.arange(0, BLOCK)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        tile = (column < columns)[:, None] & inside[None, :]
        left = tl.load(left_at + column[:, None] * rows + row[None, :], mask=tile, other=0.0)
        for j in range(columns):
            factor = tl.load(factor_at + j * stride + column, mask=column < columns, other=0.0)
            pivot = tl.load(factor_at + j * stride + j)
            group = tl.load(groups_at + j) * rows + row
            scale = tl.load(scale_at + group, mask=inside, other=1.0)
            low = tl.load(low_at + group, mask=inside, other=0.0)
            high = tl.load(high_at + group, mask=inside, other=0.0)
            here = j * rows + row
            current = tl.sum(tl.where(column[:, None] == j, left, 0.0), axis=0)
            if before_at is None:
                ideal = tl.div_rn(current, scale)
            else:
                before = tl.load(before_at + here, mask=inside, other=0.0)
                ideal = before + tl.div_rn(current * tl.div_rn(1.0, pivot), scale)
            # From 2^23 on float32 has no fractions: adding 1.5 * 2^23 rounds half to even, on GPUs and in Triton's
            # interpreter, which lacks CUDA's rint. It holds below 2^22 only, so the limits come first; being whole
            # numbers, they come to the same before and after.
            code = (tl.minimum(tl.maximum(ideal, low), high) + 12582912.0) - 12582912.0
            step = tl.div_rn(tl.fma(-code, scale, current), pivot) if before_at is None else (code - before) * scale
            tl.store(left_at + here, current, mask=inside)  # its sum took all of the row, so all of it was read
            tl.store(codes_at + here, code, mask=inside)
            tl.store(steps_at + here, step, mask=inside)
            left = tl.fma(-factor[:, None], step[None, :], left)  # columns up to j too, which are not looked at again
