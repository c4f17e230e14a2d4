"""What the command line accepts: durations, and what a shell completes."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from mambench.harness.cli.options import parse_duration, settings_options
from mambench.harness.errors import UsageError

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("5m", 300),
        ("1h30m", 5400),
        ("0.5", 0.5),
        ("1.5h", 5400),
        ("2M", 120),
    ],
)
def test_durations(text: str, seconds: float):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "m", "-5", "5 minutes", "1m1h", "nan", "inf"])
def test_what_is_no_duration(text: str):
    with pytest.raises(UsageError, match="duration"):
        parse_duration(text)


def completed(words: str, index: int) -> list[str]:
    environment = {
        **os.environ,
        "_RUN_BENCH_PY_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(index),
    }
    command = [sys.executable, str(ROOT / "run_bench.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_completion_offers_names():
    assert completed("run_bench.py pl", 1) == ["plan"]
    assert "scan-vs-attention" in completed("run_bench.py run --suite sc", 3)
    assert "selective_scan" in completed("run_bench.py run -i sel", 3)
    assert "bf16" in completed("run_bench.py run --dtype b", 3)


def test_completion_offers_measurements_after_a_comma():
    command = click.command()(settings_options(lambda **_: None))
    option = next(p for p in command.params if p.name == "measure")
    offered = option.type.shell_complete(click.Context(command), option, "time,en")
    assert [item.value for item in offered] == ["time,energy"]
