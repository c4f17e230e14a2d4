"""The cost model of attention against products counted one by one."""

import pytest

from mambench.kernels.attention.cost import cost

SIZES = {"batch": 2, "seqlen": 512, "nheads": 3, "headdim": 64, "itemsize": 2}


def test_forward_is_two_products_of_half_a_square() -> None:
    flop, size = cost(pass_name="forward", **SIZES)
    one_product = 2 * 512 * 512 * 64  # multiply and add, per head
    assert flop == 2 * 3 * 2 * one_product // 2
    assert size == 4 * 2 * (2 * 512 * 3 * 64)  # q, k, v, out


def test_backward_is_five_products_and_reads_the_row_statistics() -> None:
    flop, size = cost(pass_name="backward", **SIZES)
    assert 2 * flop == 5 * cost(pass_name="forward", **SIZES)[0]
    assert size == 8 * 2 * (2 * 512 * 3 * 64) + 4 * (2 * 512 * 3)


def test_training_is_both_and_writes_the_row_statistics() -> None:
    passes = [cost(pass_name=name, **SIZES) for name in ("forward", "backward")]
    flop, size = cost(pass_name="training", **SIZES)
    assert flop == sum(p[0] for p in passes)
    assert size == sum(p[1] for p in passes) + 4 * (2 * 512 * 3)


def test_an_unknown_pass_is_named() -> None:
    with pytest.raises(ValueError, match="prefil"):
        cost(pass_name="prefil", **SIZES)
