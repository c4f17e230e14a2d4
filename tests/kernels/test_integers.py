"""Whole numbers on the host are what Triton's functions give."""

import pytest

from mambench.kernels.integers import ceil_div, next_power_of_2


def test_they_are_triton_s():
    triton = pytest.importorskip("triton")
    for n in (*range(1, 70), 1 << 20, (1 << 31) + 1):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        assert ceil_div(n, 7) == triton.cdiv(n, 7)
    assert ceil_div(0, 7) == 0
