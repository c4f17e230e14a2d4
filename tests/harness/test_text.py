"""How quantities and tables are written."""

import pytest

from mambench.harness.text import binary_bytes, duration, si_time, table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_duration(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.3, "12.3 s"), (0.0012346, "1.235 ms"), (7.123e-5, "71.23 us"), (5e-9, "5 ns")],
)
def test_si_time(seconds: float, text: str):
    assert si_time(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(512, "512 B"), (1536, "1.5 KiB"), (79.2 * 2**30, "79.2 GiB"), (2**41, "2.0 TiB")],
)
def test_binary_bytes(count: float, text: str):
    assert binary_bytes(count) == text


def test_table():
    text = table([("a", "1"), ("long", "100")], header=("name", "n"), right=" r")
    assert text.splitlines() == ["name    n", "a       1", "long  100"]
    assert table([]) == ""
