"""Finds where the scale of a layer's inputs can be moved into what makes them: a norm, or the layer before.

Nothing is known of any architecture. A block is tried: the rows of a candidate are multiplied by powers of two, and it
makes a group's inputs if these come out multiplied by the same powers, to the bit. Powers of two are never rounded, so
equality is exact in every dtype. At last the whole folding is tried, and the block's outputs must be the same bits.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_BASE = 8  # factors 1 to 2^7: what a bfloat16 block computes with them stays far from overflow


def rows_of_inputs(
    plain: Tensor, rows: int, start: int, inputs_with: Callable[[Tensor], Tensor | None]
) -> Tensor | None:
    """Which row of a candidate each input channel of a group is made by, int64 [in]; None if it is not so made.

    Each round tells one digit of the row's number, by the factor 2^digit that the row gets.

    Args:
        plain: the group's inputs [tokens, in].
        rows: how many the candidate has. start: the first of them that is tried; those before it stay as they are.
        inputs_with: the same inputs where each row is multiplied by a factor [rows].
    """
    number = (torch.arange(rows) - start).clamp(min=0)  # 0: the factor is 1 in every round
    result = torch.zeros(plain.shape[1], dtype=torch.int64)
    alive = (plain != 0) & plain.isfinite()
    first = alive.to(torch.int8).argmax(0)  # a token in which the channel is not zero
    if not alive.any(0).all():
        return None
    at = (first, torch.arange(plain.shape[1]))
    place = 1
    while place < rows - start:
        scaled = inputs_with((number // place % _BASE).to(torch.float32).exp2())
        if scaled is None:
            return None
        ratio = (scaled[at].double() / plain[at].double()).log2()
        digit = ratio.round()
        if not ((digit == ratio) & (digit >= 0) & (digit < _BASE)).all():
            return None
        if not torch.equal(plain * digit.exp2().to(plain.dtype), scaled):
            return None
        result += digit.to(torch.int64) * place
        place *= _BASE
    result += start
    return result if (result < rows).all() else None


def segments(rows: int, inputs: int) -> Iterator[int]:
    """Where the rows may begin that make a group's inputs: at 0, or, of several layers fused into one, further on.

    The up rows follow the gate rows; the value rows are the last of query, key and value rows, and there are as many
    query rows as the output layer has inputs.
    """
    yield 0
    if rows == 2 * inputs:
        yield inputs
    if inputs < rows <= 3 * inputs and (rows - inputs) % 2 == 0:
        yield rows - (rows - inputs) // 2


def probe(rows: Tensor) -> Tensor:
    """Factors for each input, equal where the row is, to prove a folding with: powers of two from 1/4 to 4."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-2, 3, (int(rows.max()) + 1,), generator=generator).to(torch.float32).exp2()
    return factors[rows]
