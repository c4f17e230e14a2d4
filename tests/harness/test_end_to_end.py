"""The whole chain on what is built in: plan, workers, gate, timing, memory, store."""

from dataclasses import replace
from pathlib import Path

import pytest

from mambench.harness import machine, registry, runner
from mambench.harness.lock import device_lock
from mambench.harness.plan import Plan, PlannedCase
from mambench.harness.spec import Case, DType, Family, Level, Outcome, Pass, Problem, Settings
from mambench.harness.store import RunFolder, new_run

SETTINGS = Settings(target_s=0.01, min_samples=3, max_samples=10, relative_error=0.5, threads=1)


def problem(family: Family) -> Problem:
    """Return a small problem whose length is no multiple of any chunk."""
    return Problem(
        family=family,
        batch=1,
        seqlen=37,
        d_inner=32,
        d_state=None if family is Family.ATTENTION else 16,
        headdim=None if family is Family.S6 else 16,
        ngroups=None if family is Family.ATTENTION else 1,
    )


def test_every_built_in_implementation_is_proven_right_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        runner, "device_lock", lambda key, **options: device_lock(key, folder=tmp_path, **options)
    )
    device = machine.cpu()
    cases: list[Case] = []
    for name in registry.BUILT_IN:
        implementation = registry.get(name)
        available = [v.name for v in implementation.variants(device) if not v.unavailable]
        if not available:  # a peer that needs a GPU
            continue
        variant = available[0]
        cases += [
            Case(
                implementation=name,
                variant=variant,
                problem=problem(family),
                pass_=Pass.TRAINING,
                dtype=DType.FP32,
            )
            for family in implementation.families
        ]
    assert len({case.implementation for case in cases}) >= 5
    whole = replace(problem(Family.SSD), level=Level.BLOCK, d_model=16)
    cases.append(replace(next(c for c in cases if c.implementation == "ssd"), problem=whole))
    planned = tuple(PlannedCase(case=case) for case in cases)
    plan = Plan(suite="all", device=device, settings=SETTINGS, cases=planned)
    path, run_id, created_at = new_run(tmp_path, plan.suite)
    manifest = {
        **plan.to_dict(),
        "schema": 1,
        "run_id": run_id,
        "created_at": created_at,
        "command": [],
        "environment": machine.environment(device),
        "code": machine.code_version(),
    }
    with RunFolder.create(path, manifest) as folder:
        summary = runner.run(plan, folder)
    found = RunFolder.open(path)
    failures = [(o.case.label, o.reason) for o in found.observations() if o.reason]
    assert not failures
    assert summary.counts == {Outcome.OK: len(cases)}
    assert Plan.from_dict(found.manifest) == plan
    for observation in found.observations():
        assert all(v is None or v >= 0 for v in observation.values.values())
        expected = {"time": "time_s", "memory": "peak_memory_bytes"}[observation.measurement]
        assert observation.values[expected] is not None
        around = "plain" if observation.case.problem.level is Level.BLOCK else None
        assert observation.details.get("surroundings") == around
