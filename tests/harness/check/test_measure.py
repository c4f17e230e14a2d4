"""The order of a check: proof, interleaved rounds, confirmations; on a runner that makes it up."""

import io
import random
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from check_rounds import CASES, observation

from mambench.harness import runner
from mambench.harness.check import measure as check
from mambench.harness.check.measure import AGAIN, BASE, HEAD, Arm, Check, Terms
from mambench.harness.check.progress import PlainProgress
from mambench.harness.check.rounds import AA, Rounds, pairs
from mambench.harness.check.sides import Side
from mambench.harness.plan import Plan, PlannedCase
from mambench.harness.spec import Case, Device, DeviceKind, Outcome, Settings
from mambench.harness.verdict import Verdict
from mambench.harness.workers.pool import Code

CPU = Device(kind=DeviceKind.CPU, name="a processor", memory_bytes=2**34)
PLAN = Plan(
    suite="planted",
    device=CPU,
    settings=Settings(),
    cases=tuple(PlannedCase(case=c) for c in CASES),
)
STORED = AA(
    pairs={
        c.case_id: {"time_s": np.random.default_rng(9).normal(-7, 0.004, (10, 2)).tolist()}
        for c in CASES
    }
)


class World:
    """What the processes of each arm would find, and what was asked of them."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, tuple[str, ...], list[Case], runner.Session]] = []
        self.turns: list[tuple[str, int, Case]] = []
        self.slower: dict[str, float] = {}  # by case_id, on the head
        self.failing: dict[str, set[str]] = {}  # by arm
        self.rng = np.random.default_rng(1)
        self.now = 0.0
        self.lock = threading.Lock()
        self.process_s = 10.0

    def run(
        self, plan: Plan, folder: Any, *, pool: Any, session: runner.Session, listener: Any
    ) -> None:
        arm = folder.path.name
        assert pool.name == arm
        cases = [p.case for p in plan.cases]
        kinds = plan.settings.measurements
        with self.lock:
            self.asked.append((arm, session.round, kinds, cases, session))
            self.now += self.process_s
        for case in cases:
            listener.on_case_start(case)
            self.turns.append((arm, session.round, case))
            self.observe(folder, session, kinds, case)
            listener.on_case_end(case, ())

    def observe(
        self, folder: Any, session: runner.Session, kinds: tuple[str, ...], case: Case
    ) -> None:
        arm = folder.path.name
        if case.case_id in self.failing.get(arm, ()):
            folder.append(
                observation(case, {}, round=session.round, outcome=Outcome.WRONG, reason="wrong")
            )
            return
        factor = 1 + self.slower.get(case.case_id, 0.0) if arm == HEAD else 1.0
        time_s = 1e-3 * factor * float(np.exp(self.rng.normal(0, 0.004)))
        values = {"time": {"time_s": time_s}, "memory": {"peak_memory_bytes": 2**26}}
        for kind in kinds:
            folder.append(observation(case, values[kind], measurement=kind, round=session.round))


class FakePool(nullcontext[Any]):
    def __init__(self, name: str) -> None:
        super().__init__(self)
        self.name = name

    def wait_ready(self) -> None:
        """It is."""


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(runner, "run", made.run)
    monkeypatch.setattr(check, "make_pool", lambda *, threads, code: FakePool(code.root.name))
    return made


class Quiet(PlainProgress):
    def __init__(self) -> None:
        super().__init__(io.StringIO())


Run = Callable[..., check.Measured]


@pytest.fixture
def run(world: World, tmp_path: Path) -> Run:
    def with_arms(*names: str, plan: Plan = PLAN, **terms: Any) -> check.Measured:
        arms = [
            Arm(
                name=name,
                side=Side(name=name, ref=name, root=tmp_path, code=Code(root=tmp_path / name)),
                plan=plan,
            )
            for name in names
        ]
        job = Check(arms, tmp_path / "out", Terms(**terms), Quiet(), clock=lambda: world.now)
        return job.run()

    return with_arms


def rounds(world: World, arm: str) -> list[int]:
    return [number for name, number, *_ in world.asked if name == arm]


def test_sides_are_proven_where_nothing_but_times_is_wanted(world: World, run: Run):
    plan = replace(PLAN, settings=Settings(measurements=("time",)))
    found = run(BASE, HEAD, stored=STORED, plan=plan)
    assert [entry[2] for entry in world.asked if not entry[1]] == [("time",)] * 2
    assert rounds(world, HEAD) == [0, 1, 2, 3, 4, 5]
    assert {p.verdict for p in found.assessment.points} == {Verdict.SAME}


def test_equal_sides_are_proven_once_and_measured_in_five_rounds(world: World, run: Run):
    found = run(BASE, HEAD, stored=STORED)
    assert rounds(world, BASE) == rounds(world, HEAD) == [0, 1, 2, 3, 4, 5]
    proof, *timed = (entry for entry in world.asked if entry[0] == HEAD)
    assert proof[2] == ("memory",)
    assert not proof[4].proven
    assert {entry[2] for entry in timed} == {("time",)}
    assert all(entry[4].proven for entry in timed)
    assert {p.verdict for p in found.assessment.points} == {Verdict.SAME}


def test_cases_are_shuffled_anew_in_each_round(world: World, run: Run):
    run(BASE, HEAD, stored=STORED)
    orders = {(entry[1], tuple(case.case_id for case in entry[3])) for entry in world.asked}
    assert len({order for _, order in orders}) == 2 + 5  # two proofs, five rounds
    assert {frozenset(order) for _, order in orders} == {frozenset(c.case_id for c in CASES)}


def test_on_a_cpu_the_arms_measure_each_case_in_turn(world: World, run: Run):
    run(BASE, HEAD, stored=STORED)
    timed = [(arm, number, case) for arm, number, case in world.turns if number]
    assert len(timed) == 5 * 2 * len(CASES)
    first = set()
    for (one, number, case), (other, same_number, same_case) in zip(
        timed[::2], timed[1::2], strict=True
    ):
        assert ({one, other}, number, case) == ({BASE, HEAD}, same_number, same_case)
        first.add(one)
    assert first == {BASE, HEAD}  # neither is always the one that begins


def test_on_a_gpu_the_arms_of_a_round_follow_one_another(world: World, run: Run):
    gpu = Device(kind=DeviceKind.CUDA, name="a GPU", memory_bytes=2**34, compute_capability=(9, 0))
    run(BASE, HEAD, stored=STORED, plan=replace(PLAN, device=gpu))
    timed = [(arm, number) for arm, number, *_ in world.asked if number]
    assert [number for _, number in timed] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    for pair in range(0, 10, 2):
        assert {arm for arm, _ in timed[pair : pair + 2]} == {BASE, HEAD}
    orders = {tuple(case.case_id for case in entry[3]) for entry in world.asked}
    assert len(orders) == len(world.asked)  # another order in each process


@pytest.mark.parametrize("seed", range(5))
def test_two_arms_alternate_as_abba_and_three_at_random(seed: int):
    orders = check._orders((BASE, HEAD), 6, random.Random(seed))
    for first, second in zip(orders[::2], orders[1::2], strict=True):
        assert second == first[::-1]
    three = {tuple(order) for order in check._orders("abc", 60, random.Random(seed))}
    assert len(three) == 6


def test_on_an_unknown_machine_the_base_is_measured_twice_a_round(world: World, run: Run):
    found = run(BASE, HEAD, AGAIN)
    assert rounds(world, AGAIN) == [1, 2, 3, 4, 5]
    assert found.evidence.again is not None
    assert Verdict.REGRESSED not in {p.verdict for p in found.assessment.points}


def test_only_suspects_are_measured_again_and_twice(world: World, run: Run):
    world.slower[CASES[3].case_id] = 0.2
    found = run(BASE, HEAD, stored=STORED)
    assert rounds(world, HEAD) == list(range(22))
    again = {tuple(c.case_id for c in e[3]) for e in world.asked if e[1] > 5}
    assert all(CASES[3].case_id in ids for ids in again)
    # The case alone, its family and its curve; never the cases of other implementations.
    family = {c.case_id for c in CASES if c.implementation == CASES[3].implementation}
    assert {i for ids in again for i in ids} <= family
    named = {p.case for p in found.assessment.points if p.verdict is Verdict.REGRESSED and p.case}
    assert named == {CASES[3]}


def test_a_case_that_was_not_proven_is_not_timed(world: World, run: Run):
    world.failing[HEAD] = {CASES[0].case_id}
    found = run(BASE, HEAD, stored=STORED)
    timed = {c.case_id for e in world.asked if e[1] for c in e[3]}
    assert CASES[0].case_id not in timed
    assert len(timed) == len(CASES) - 1
    failed = [p for p in found.assessment.points if p.verdict is Verdict.FAILED]
    assert [p.case for p in failed] == [CASES[0]]


def test_nothing_proven_means_no_rounds_and_no_verdict_of_the_same(world: World, run: Run):
    world.failing[BASE] = {c.case_id for c in CASES}
    found = run(BASE, HEAD, stored=STORED)
    assert rounds(world, HEAD) == [0]
    assert {p.verdict for p in found.assessment.points} == {Verdict.NEW}


def test_the_time_budget_leaves_at_least_three_rounds(world: World, run: Run):
    found = run(BASE, HEAD, stored=STORED, time_budget_s=15.0)
    assert rounds(world, HEAD) == [0, 1, 2, 3]
    assert found.evidence.stages.screening == (1, 2, 3)


def test_suspects_without_time_to_confirm_stay_suspects(world: World, run: Run):
    world.slower[CASES[3].case_id] = 0.2
    # Two proofs and five rounds of two processes take 120 s; the 16 rounds more do not fit.
    found = run(BASE, HEAD, stored=STORED, time_budget_s=200.0)
    assert CASES[3].case_id in found.assessment.suspects
    assert Verdict.REGRESSED not in {p.verdict for p in found.assessment.points}


def test_a_stored_baseline_stands_for_the_base(world: World, run: Run, tmp_path: Path):
    world.slower[CASES[3].case_id] = 0.2
    measured = run(BASE, HEAD, stored=STORED).evidence.base
    five = [o for found in measured.found.values() for o in found if o.round <= 5]
    baseline = Rounds.of(five, repeated=True)
    world.asked.clear()
    arm = Arm(
        name=HEAD,
        side=Side(name=HEAD, ref=HEAD, root=tmp_path, code=Code(root=tmp_path / HEAD)),
        plan=PLAN,
    )
    terms = Terms(stored=STORED, baseline=baseline)
    found = Check([arm], tmp_path / "second", terms, Quiet()).run()
    assert {name for name, *_ in world.asked} == {HEAD}
    regressed = {p.case for p in found.assessment.points if p.verdict is Verdict.REGRESSED}
    assert CASES[3] in regressed


def test_what_a_calibration_keeps(world: World, run: Run):
    found = run(BASE, AGAIN)
    assert found.evidence.again is not None
    kept = pairs(found.evidence.base, found.evidence.again, found.evidence.stages.screening)
    assert set(kept.pairs) == {c.case_id for c in CASES}
    differences = kept.differences(CASES, "time_s")
    assert differences is not None
    assert differences.shape == (len(CASES), 5)
    assert 0.002 < float(np.std(differences)) < 0.012
