"""Whole numbers on the host; Triton's functions of these names take a hundred times as long."""


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up, of positive b."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is not below n, of n from 1."""
    return 1 << (n - 1).bit_length()
