"""The cases of a suite as tests of pytest-benchmark; collected when it is named.

pytest --pyargs mambench.harness.pytest_cases --mambench-suite quick --benchmark-json=run.json
"""

from mambench.harness.pytest_plugin import BenchCase
from mambench.harness.spec import Case


def test_case(bench_case: BenchCase, mambench_case: Case) -> None:
    """Prove the case right and time it."""
    bench_case(mambench_case)
