"""Cold against hot: what L2 is worth to a kernel is known from the bandwidths on either side of it.

Imports torch only inside functions. A set that fits in L2 must take longer to read cold than hot,
by what main memory is slower than L2; a set of many times L2 must take the same, because nothing of
it is left to be found.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mambench.harness.instruments import timing
from mambench.harness.selftest import run as selftest
from mambench.harness.selftest.run import Check
from mambench.harness.spec import Device
from mambench.harness.text import binary_bytes, si_time

PART = "L2"
RULE = timing.StopRule(target_s=0.2, min_samples=20, max_samples=200, relative_error=1e-3)
FITS = 1 / 4  # of L2: each half of it may keep lines of its own of the same data
LARGE = 32  # L2 sizes: all that L2 could keep of such a set is 3 % of it
L2_OVER_DRAM = 1.2  # a hot set that is not read faster than this was not in L2
MARGIN = 0.5  # of what the bandwidths let expect
SAME = 0.03


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Times of reading a set of bytes."""

    set_bytes: int
    hot_s: float
    cold_s: float


def cold_and_hot(device: Device) -> Iterator[Check]:
    """Read half of a set that fits, all of it, and one that does not, each hot and cold."""
    from mambench.kernels import probes

    half, fits, large = (_read(share * probes.l2_bytes()) for share in (FITS / 2, FITS, LARGE))
    yield from judge(half, fits, large)


def judge(half: Reading, fits: Reading, large: Reading) -> Iterator[Check]:
    """Check cold against hot, with the bandwidths that the readings themselves show."""
    dram = large.set_bytes / large.cold_s
    # A difference of two sizes: what a kernel takes to start is in neither bandwidth.
    taken_s = fits.hot_s - half.hot_s
    l2 = (fits.set_bytes - half.set_bytes) / taken_s if taken_s > 0 else float("inf")
    yield selftest.between(
        PART,
        f"bandwidth of {binary_bytes(fits.set_bytes)} read hot, over main memory's",
        low=L2_OVER_DRAM,
        high=None,
        got=l2 / dram,
        show=_ratio,
        unit="ratio",
        note=f"main memory {dram / 1e12:.2f} TB/s",
    )
    expected_s = fits.set_bytes * (1 / dram - 1 / l2)
    yield selftest.between(
        PART,
        f"{binary_bytes(fits.set_bytes)}: cold less hot",
        low=MARGIN * expected_s,
        high=None,
        got=fits.cold_s - fits.hot_s,
        show=_signed,
        unit="s",
        note=f"{si_time(fits.cold_s)} cold, {si_time(fits.hot_s)} hot; bandwidths let expect "
        f"{_signed(expected_s)}",
    )
    yield selftest.near(
        PART,
        f"{binary_bytes(large.set_bytes)}: cold against hot",
        expected=large.hot_s,
        got=large.cold_s,
        tolerance=SAME * large.hot_s,
        show=si_time,
        unit="s",
    )


def _read(set_bytes: float) -> Reading:
    import torch

    from mambench.harness.instruments import cuda_cold, cuda_timing
    from mambench.kernels import probes

    programs = max(1, round(set_bytes / 4 / probes.BLOCK))
    source = torch.ones(programs * probes.BLOCK, dtype=torch.float32, device="cuda")
    out = torch.empty(programs, dtype=torch.float32, device="cuda")
    execute: Callable[[], None] = lambda: probes.total(source, out)  # noqa: E731
    execute()
    hot, _ = cuda_timing.time_gpu(execute, RULE)
    cold, _ = cuda_cold.time_cold(execute, RULE)
    return Reading(set_bytes=source.numel() * 4, hot_s=hot.median_s, cold_s=cold.median_s)


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _signed(time_s: float) -> str:
    return si_time(time_s) if time_s >= 0 else f"-{si_time(-time_s)}"
