"""Quantities are written with three digits and the right prefix."""

import pytest

from mambench.reports import units


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.2345e-3, "1.23 ms"),
        (1e-3, "1.00 ms"),
        (9.996e-4, "1.00 ms"),
        (999.4e-6, "999 µs"),
        (59.94e-6, "59.9 µs"),
        (12.0, "12.0 s"),
        (0.0, "0 s"),
        (3.2e-9, "3.20 ns"),
        (1500.0, "1.50 ks"),
        (None, units.MISSING),
        (float("nan"), units.MISSING),
    ],
)
def test_seconds(value, text):
    assert units.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (80 * 2**30, "80.0 GiB"),
        (1023.7 * 2**20, "1.00 GiB"),
        (1.5 * 2**40, "1.50 TiB"),
        (None, units.MISSING),
    ],
)
def test_memory_is_binary(value, text):
    assert units.memory(value) == text


def test_rates_are_decimal():
    assert units.si(3.02e12, "B/s") == "3.02 TB/s"
    assert units.si(658e12, "FLOP/s") == "658 TFLOP/s"
    assert units.si(999.6e9, "B/s") == "1.00 TB/s"


@pytest.mark.parametrize(
    ("value", "text"),
    [(512, "512"), (1024, "1K"), (131072, "128K"), (2**20, "1M"), (1500, "1,500")],
)
def test_lengths(value, text):
    assert units.length(value) == text


@pytest.mark.parametrize(
    ("text", "short"),
    [("10.0 ms", "10 ms"), ("1.50 s", "1.5 s"), ("100 ms", "100 ms"), ("1K", "1K")],
)
def test_ticks_have_no_trailing_zeros(text, short):
    assert units.tick(text) == short


@pytest.mark.parametrize(
    ("value", "text"), [(1847.3, "1,850"), (599.4, "599"), (28631.0, "28,600")]
)
def test_interpolated_lengths_have_three_digits(value, text):
    assert units.about(value) == text
