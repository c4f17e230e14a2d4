from pathlib import Path

import pytest

from mambench.harness.instruments import cpu_cache
from mambench.harness.instruments.timing import StopRule


def cache(root: Path, *sizes: str) -> Path:
    for index, size in enumerate(sizes):
        folder = root / "cpu0" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(size + "\n")
    return root


def test_the_largest_cache_is_the_last_level(tmp_path: Path) -> None:
    assert cpu_cache.last_level_bytes(cache(tmp_path, "48K", "2048K", "105M")) == 105 << 20
    assert cpu_cache.last_level_bytes(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("size", "says"), [(None, "does not say"), (300 << 20, "too long to empty"), (32 << 20, None)]
)
def test_what_cannot_be_emptied_has_a_reason(
    monkeypatch: pytest.MonkeyPatch, size: int | None, says: str | None
) -> None:
    monkeypatch.setattr(cpu_cache, "last_level_bytes", lambda: size)
    missing = cpu_cache.missing()
    assert (missing is None) if says is None else (says in (missing or ""))


def test_emptying_is_not_timed_and_precedes_every_sample() -> None:
    now_ns, calls = [0], list[str]()

    def takes(name: str, ns: int) -> None:
        calls.append(name)
        now_ns[0] += ns

    def execute() -> None:
        cold = bool(calls) and calls[-1] == "evict"
        takes("execute", 5_000_000 if cold else 1_000_000)

    def clock() -> int:
        now_ns[0] += 10
        return now_ns[0]

    rule = StopRule(target_s=0.2, min_samples=6, max_samples=50, relative_error=0.01)
    timing = cpu_cache.time_cold(execute, lambda: takes("evict", 20_000_000), rule, clock=clock)
    assert timing.median_s == pytest.approx(5e-3, rel=1e-4)
    assert timing.details["convergence"]["converged"]
    assert calls.count("evict") == len(timing.samples_s) >= 6
