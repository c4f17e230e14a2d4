"""The GPU's timer held against others: Triton's do_bench, and NVIDIA's nvbench where installed.

Their starts of a kernel hold the events around a call besides: they are found on a short wait,
shown, bounded, and taken off before longer kernels are compared. Imports torch at module level.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from mambench.harness.selftest import gpu
from mambench.harness.selftest import run as selftest
from mambench.harness.selftest.run import Check
from mambench.harness.spec import Device
from mambench.harness.text import si_time

AGREEMENT = 0.02  # two timers, above 50 us
OTHER_STARTS_S = 8e-6  # what another timer's start may be beyond ours
SHORT_WAIT = "wait-20us"

Kernels = dict[str, Callable[[], None]]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How long the steady kernels are: found once, so that every process runs the same ones."""

    cycles_per_s: float
    chain_rounds: int


def scale() -> Scale:
    """Measure the SM clock, and how many rounds of exponentials take about 400 us."""
    from mambench.kernels import probes

    rate = gpu.settled_clock(probes.new_record())
    out, trial = probes.chain_out(), 10_000  # long enough to hide its launch
    return Scale(
        cycles_per_s=rate,
        chain_rounds=round(trial * 400e-6 / seconds(lambda: probes.chain(out, trial))),
    )


def steady_kernels(scale: Scale) -> Kernels:
    """Return kernels that take as long with a cold L2 as with a warm one, by name.

    Two timers can only agree on what does not depend on how they treat caches: waits, a chain of
    exponentials, and a copy of many times L2.
    """
    from mambench.kernels import probes

    record = probes.new_record()
    values = gpu.multiple(16 * probes.l2_bytes() // 4, probes.BLOCK)
    source = torch.randn(values, device="cuda")
    target = torch.empty_like(source)
    out = probes.chain_out()

    def wait(wait_s: float) -> Callable[[], None]:
        cycles = round(scale.cycles_per_s * wait_s)
        return lambda: probes.spin(record, cycles)

    return {
        SHORT_WAIT: wait(20e-6),
        "wait-100us": wait(100e-6),
        "wait-1ms": wait(1e-3),
        "exponentials": lambda: probes.chain(out, scale.chain_rounds),
        "copy-16xL2": lambda: probes.copy(source, target),
    }


def two_timers(device: Device) -> Iterator[Check]:
    """Check graph replay against Triton's do_bench, and NVIDIA's nvbench where installed."""
    from mambench.harness.selftest import nvbench as selftest_nvbench

    measured = scale()
    kernels = steady_kernels(measured)
    ours = {name: gpu.by_graph(execute, gpu.RULE) for name, execute in kernels.items()}

    yield from _against_do_bench(ours, kernels)
    del kernels
    torch.cuda.empty_cache()
    found, lack = selftest_nvbench.times_s(device, measured)
    if lack is not None:
        yield selftest.skipped("two timers", "NVIDIA's nvbench (cuda-bench)", lack)
    else:
        yield from agree("NVIDIA's nvbench", ours, found)


def _against_do_bench(ours: dict[str, float], kernels: Kernels) -> list[Check]:
    checks: list[Check] = []
    for _ in range(gpu.ATTEMPTS):
        failed = sum(not check.passed for check in checks)
        others = {name: _do_bench(execute) for name, execute in kernels.items()}
        checks = list(agree("Triton's do_bench", ours, others))
        if failed:
            checks = [replace(c, got=f"{c.got}; measured again, {failed} failed") for c in checks]
        if all(check.passed for check in checks):
            break
    return checks


def agree(whose: str, ours: dict[str, float], others: dict[str, float]) -> Iterator[Check]:
    """Check that another timer's times, its longer start aside, are ours within 2 %."""
    start_s = others.get(SHORT_WAIT, math.nan) - ours[SHORT_WAIT]
    yield selftest.between(
        "two timers",
        f"start of a kernel beyond ours, of {whose}",
        low=-selftest.ABSOLUTE_S,
        high=OTHER_STARTS_S,
        got=start_s,
        show=gpu.signed_time,
        unit="s",
        note=f"on a wait of 20 us, {si_time(ours[SHORT_WAIT])} by graph replay",
    )
    for name, ours_s in ours.items():
        if name == SHORT_WAIT:
            continue
        expected_s = others.get(name, math.nan) - start_s
        yield selftest.near(
            "two timers",
            f"{name}: graph replay against {whose}",
            expected=expected_s,
            got=ours_s,
            tolerance=AGREEMENT * expected_s,
            show=si_time,
            unit="s",
            note=f"{si_time(others.get(name, math.nan))} with its start",
        )


def _do_bench(execute: Callable[[], None]) -> float:
    import importlib

    bench: Any = importlib.import_module("triton.testing").do_bench
    return bench(execute, warmup=25, rep=150, return_mode="median") / 1e3


def seconds(execute: Callable[[], None]) -> float:
    """Return a rough time of one execution, after some that compile and raise the clock."""
    for _ in range(50):
        execute()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        execute()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / 20
