"""Plans and run folders of the planted implementations; imported by tests by its path."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambench.harness import machine, store
from mambench.harness.plan import Plan, PlannedCase
from mambench.harness.spec import Case, DType, Family, Pass, Problem, Settings

PLUGIN = Path(__file__).with_name("planted.py")
QUICK = Settings(target_s=0.005, min_samples=3, max_samples=20, relative_error=0.5, threads=1)


def case(name: str, *, seqlen: int = 16, pass_: Pass = Pass.FORWARD) -> Case:
    """Return a tiny attention case of a planted implementation."""
    problem = Problem(family=Family.ATTENTION, batch=1, seqlen=seqlen, d_inner=16, headdim=8)
    return Case(
        implementation=name, variant="planted", problem=problem, pass_=pass_, dtype=DType.FP32
    )


def plan(
    cases: Sequence[Case | PlannedCase], settings: Settings = QUICK, suite: str = "planted"
) -> Plan:
    """Return a plan for this machine's CPU."""
    planned = tuple(c if isinstance(c, PlannedCase) else PlannedCase(case=c) for c in cases)
    return Plan(
        suite=suite, device=machine.cpu(), settings=settings, cases=planned, plugins=(str(PLUGIN),)
    )


def manifest(made: Plan, **changes: Any) -> dict[str, Any]:
    """Return the manifest of a run of the plan."""
    return {
        **made.to_dict(),
        "schema": 1,
        "run_id": "0123abcd",
        "created_at": "2026-01-01T00:00:00+00:00",
        "command": ["run_bench.py", "run"],
        "environment": {},
        "code": {"id": "test"},
        **changes,
    }


def folder(path: Path, made: Plan) -> store.RunFolder:
    """Make a run folder for the plan."""
    return store.RunFolder.create(path, manifest(made))


def main(path: str) -> None:
    """Run the good implementation at many lengths into a new folder, until done or killed."""
    from mambench.harness import runner

    made = plan(many())
    with folder(Path(path), made) as opened:
        runner.run(made, opened)


def many() -> list[Case]:
    """Return what `main` runs."""
    return [case("good", seqlen=seqlen) for seqlen in range(8, 28)]


if __name__ == "__main__":
    main(sys.argv[1])
