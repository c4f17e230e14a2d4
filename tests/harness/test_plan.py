"""From suites to plans: expansion, variants, estimates, order, budget, and back from JSON."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mambench.harness import plan as planning
from mambench.harness import registry, suite
from mambench.harness.errors import PluginError, UsageError
from mambench.harness.plan import Plan, PlannedCase, make_plan, within_budget
from mambench.harness.profilers import catalog
from mambench.harness.spec import Case, Device, DeviceKind, Family, Level, Outcome, Settings
from mambench.implementations.base import Implementation, Variant

GIB = 1024**3
CPU = Device(kind=DeviceKind.CPU, name="a processor", memory_bytes=16 * GIB)
GPU = Device(kind=DeviceKind.CUDA, name="a GPU", compute_capability=(9, 0), memory_bytes=80 * GIB)


class Fake(Implementation):
    summary = "for tests"
    known: tuple[Variant, ...] = (Variant(name="only"),)
    declines: str | None = None
    bytes_needed = 0

    def variants(self, device: Device) -> tuple[Variant, ...]:
        return self.known

    def op(self, family: Family, variant: str):
        raise AssertionError("planning must not load operations")

    def workspace_bytes(self, case: Case) -> int:
        return self.bytes_needed


class Scan(Fake):
    name = "scan"
    families = (Family.S6, Family.SSD)


class Attention(Fake):
    name = "attention"
    families = (Family.ATTENTION,)
    known = (
        Variant(name="best", unavailable="pip install best"),
        Variant(name="picky"),
        Variant(name="plain"),
    )

    def unsupported(self, case: Case, device: Device) -> str | None:
        picky = case.variant == "picky" and case.problem.headdim == 32
        return "headdim 32 is too small" if picky else None


class Slow(Fake):
    name = "slow"
    families = (Family.S6,)

    def launches(self, case: Case) -> int:
        return 10_000 * case.problem.seqlen


@pytest.fixture(autouse=True)
def implementations(monkeypatch: pytest.MonkeyPatch) -> dict[str, Implementation]:
    found: dict[str, Implementation] = {i.name: i for i in (Scan(), Attention(), Slow())}
    monkeypatch.setattr(registry, "load", lambda plugins=(): found)
    profilers = catalog.load()
    monkeypatch.setattr(catalog, "load", lambda plugins=(): profilers)
    return found


SWEEP = """
  - implementations: [scan, attention]
    passes: [forward]
    dtype: {cpu: fp32, cuda: bf16}
    axes:
      seqlen: [128, 256]
      d_inner: 128
      d_state: [16, 64]
      headdim: 64
"""


def make(text: str = SWEEP, device: Device = CPU, **options: object) -> Plan:
    read = suite.parse(f"title: T\nsweeps:{text}", Path("t.yaml"))
    return make_plan(read, device, **options)  # pyright: ignore[reportArgumentType]


def labels(plan: Plan) -> set[str]:
    return {planned.case.label for planned in plan.cases}


def test_axes_that_do_not_apply_are_not_swept():
    made = make()
    by_family = {
        f: [p.case.problem for p in made.cases if p.case.problem.family is f] for f in Family
    }
    assert len(by_family[Family.S6]) == len(by_family[Family.SSD]) == 4
    assert sorted(p.seqlen for p in by_family[Family.ATTENTION]) == [128, 256]
    assert {p.d_state for p in by_family[Family.ATTENTION]} == {None}
    assert {p.headdim for p in by_family[Family.S6]} == {None}
    assert {p.ngroups for p in by_family[Family.SSD]} == {1}


def test_devices_decide_dtype_and_values():
    text = SWEEP.replace("[128, 256]", "{cpu: 128, cuda: 4096}")
    assert {(p.case.dtype, p.case.problem.seqlen) for p in make(text).cases} == {("fp32", 128)}
    assert {(p.case.dtype, p.case.problem.seqlen) for p in make(text, GPU).cases} == {
        ("bf16", 4096)
    }


def test_a_sweep_without_a_dtype_for_the_device_is_not_run():
    text = SWEEP.replace("{cpu: fp32, cuda: bf16}", "{cuda: bf16}")
    with pytest.raises(UsageError, match="no case on cpu"):
        make(text)
    assert make(text, GPU).cases


def test_equal_cases_of_two_sweeps_are_one():
    assert len(make(SWEEP + SWEEP.replace("[16, 64]", "[16, 32]")).cases) == 10 + 4


def test_a_block_has_the_width_its_family_needs():
    text = SWEEP.replace("d_inner: 128", "d_model: 128").replace("axes:", "level: block\n    axes:")
    problems = [p.case.problem for p in make(text).cases]
    assert {(p.family, p.d_inner, p.d_model, p.level) for p in problems} == {
        (Family.S6, 256, 128, Level.BLOCK),
        (Family.SSD, 256, 128, Level.BLOCK),
        (Family.ATTENTION, 128, 128, Level.BLOCK),
    }


def test_the_best_available_variant_is_named():
    made = make(implementations=["attention"])
    assert {p.case.variant for p in made.cases} == {"picky"}


def test_a_variant_that_declines_gives_way_to_the_next():
    made = make(implementations=["attention"], axes={"headdim": (32,)})
    assert {(p.case.variant, p.outcome) for p in made.cases} == {("plain", None)}


def test_a_variant_can_be_asked_for():
    made = make(implementations=["attention:plain"])
    assert {p.case.variant for p in made.cases} == {"plain"}
    declined = make(implementations=["attention:picky"], axes={"headdim": (32,), "seqlen": (128,)})
    (planned,) = declined.cases
    assert planned.outcome is Outcome.UNSUPPORTED
    assert planned.reason == "headdim 32 is too small"


def test_all_variants_can_be_asked_for():
    made = make(implementations=["attention:*"], axes={"seqlen": (128,)})
    found = {p.case.variant: (p.outcome, p.reason) for p in made.cases}
    assert found == {
        "best": (Outcome.UNAVAILABLE, "pip install best"),
        "picky": (None, None),
        "plain": (None, None),
    }


def test_nothing_available_is_a_case_with_a_reason(implementations: dict[str, Implementation]):
    implementations["attention"].known = (Variant(name="best", unavailable="pip install best"),)  # type: ignore[attr-defined]
    made = make(implementations=["attention"], axes={"seqlen": (128,)})
    assert [(p.case.variant, p.outcome, p.reason) for p in made.cases] == [
        ("best", Outcome.UNAVAILABLE, "pip install best")
    ]
    implementations["attention"].known = ()  # type: ignore[attr-defined]
    (planned,) = make(implementations=["attention"], axes={"seqlen": (128,)}).cases
    assert planned.outcome is Outcome.UNAVAILABLE


@pytest.mark.parametrize("method", ["variants", "unsupported", "launches", "workspace_bytes"])
def test_an_implementation_that_raises_is_named(
    implementations: dict[str, Implementation], monkeypatch: pytest.MonkeyPatch, method: str
):
    def broken(*_: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(implementations["scan"], method, broken)
    with pytest.raises(PluginError) as caught:
        make()
    assert f"implementation 'scan': {method} raised KeyError: 'oops' (" in str(caught.value)
    assert "test_plan.py:" in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("scann", "unknown implementation 'scann'. Did you mean 'scan'?"),
        ("x*", "unknown implementation 'x*'"),
        ("attention:plian", "unknown variant of attention 'plian'. Did you mean 'plain'?"),
        ("attention:", "'attention:' names no variant: write attention:NAME"),
    ],
)
def test_a_misspelt_implementation(wanted: str, says: str):
    with pytest.raises(UsageError) as caught:
        make(implementations=[wanted])
    assert says in str(caught.value)


def test_a_suite_that_names_an_unknown_implementation_says_so():
    with pytest.raises(UsageError, match="suite 't': unknown implementation 'scam'"):
        make(SWEEP.replace("[scan,", "[scam,"))


def test_asking_picks_from_the_suite_or_joins_it():
    assert {p.case.implementation for p in make(implementations=["sc*"]).cases} == {"scan"}
    two = SWEEP + SWEEP.replace("[scan, attention]", "[attention]").replace("[128, 256]", "512")
    assert 512 not in {p.case.problem.seqlen for p in make(two, implementations=["scan"]).cases}
    joined = make(two, implementations=["slow"]).cases
    assert {p.case.problem.seqlen for p in joined} == {128, 256, 512}


def test_overrides_replace_axes_dtype_and_pass():
    made = make(axes={"seqlen": (64,), "d_state": (8,), "dtype": ("fp64",), "pass": ("training",)})
    assert {(p.case.problem.seqlen, p.case.dtype, p.case.pass_) for p in made.cases} == {
        (64, "fp64", "training")
    }
    assert {p.case.problem.d_state for p in made.cases} == {8, None}
    assert made.notes == ()


def test_an_override_that_applies_to_nothing_is_told():
    made = make(implementations=["attention"], axes={"d_state": (8,)})
    assert made.notes == ("axis d_state does not apply to any case of this run",)


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        ({"headdim": (48,)}, "headdim 48 does not divide d_inner 128"),
        ({"ngroups": (3,)}, "ngroups 3 does not divide d_inner, 128"),
        ({"ngroups": (4,)}, "ngroups 4 does not divide the number of heads, 2"),
    ],
)
def test_sizes_that_do_not_fit_each_other(axes: dict[str, tuple[int, ...]], says: str):
    with pytest.raises(UsageError) as caught:
        make(axes=axes)
    assert says in str(caught.value)


def test_sizes_asked_for_need_not_fit_every_sweep():
    two = SWEEP + SWEEP.replace("d_inner: 128", "d_inner: 192")
    made = make(two, axes={"ngroups": (3,)}, implementations=["scan"])
    assert {p.case.problem.d_inner for p in made.cases} == {192}
    assert any("ngroups 3 does not divide d_inner, 128" in note for note in made.notes)


def test_cases_that_cannot_fit_are_skipped_with_the_estimate(
    implementations: dict[str, Implementation],
):
    implementations["scan"].bytes_needed = 20 * GIB  # type: ignore[attr-defined]
    assert all(p.outcome is None for p in make().cases)  # over the memory, within the factor
    implementations["scan"].bytes_needed = 25 * GIB  # type: ignore[attr-defined]
    refused = [p for p in make().cases if p.case.implementation == "scan"]
    assert {p.outcome for p in refused} == {Outcome.SKIPPED}
    assert refused[0].reason is not None
    assert "needs about 25.0 GiB" in refused[0].reason
    assert "the device has 16.0 GiB" in refused[0].reason
    assert all(p.outcome is None for p in make(device=GPU).cases)


def test_order_is_by_length_and_then_by_cost():
    made = make(SWEEP.replace("[scan,", "[slow, scan,"))
    keys = [(p.case.problem.seqlen, p.estimate_s) for p in made.cases]
    assert keys == sorted(keys)
    first = [p.case.implementation for p in made.cases if p.case.problem.seqlen == 128]
    assert first[-1] == "slow"


def test_more_work_is_estimated_to_take_longer():
    made = {
        (p.case.implementation, p.case.problem.seqlen): p
        for p in make(
            SWEEP.replace("[scan,", "[slow,"), axes={"d_state": (16,), "seqlen": (128, 65536)}
        ).cases
    }
    assert made["slow", 65536].estimate_s > made["slow", 128].estimate_s
    assert made["attention", 65536].estimate_s > made["attention", 128].estimate_s
    assert made["attention", 65536].memory_bytes > made["attention", 128].memory_bytes


def planned(implementation: str, seqlen: int, estimate_s: float) -> PlannedCase:
    (found,) = make(
        implementations=[implementation], axes={"seqlen": (seqlen,), "d_state": (16,)},
        filters=["family!=ssd"],
    ).cases  # fmt: skip
    return replace(found, estimate_s=estimate_s)


def test_the_budget_ends_slow_curves_and_lets_fast_ones_go_on():
    cases = [
        planned("attention", 128, 1),
        planned("slow", 128, 4),
        planned("attention", 256, 1),
        planned("slow", 256, 8),
        planned("attention", 512, 1),
        planned("slow", 512, 0.5),  # its curve has ended, however cheap this case is
    ]
    kept, note = within_budget(cases, 10)
    assert [p.outcome for p in kept] == [None, None, None, Outcome.SKIPPED, None, Outcome.SKIPPED]
    assert sum(p.estimate_s for p in kept if p.outcome is None) <= 10
    assert note == "the time budget of 10 s leaves out 2 cases"
    assert kept[3].reason is not None
    assert "time budget" in kept[3].reason
    assert [p.case for p in kept] == [p.case for p in cases]


def test_a_budget_that_holds_everything_changes_nothing():
    cases = list(make().cases)
    assert within_budget(cases, 1e9) == (cases, None)


def test_an_outcome_known_beforehand_costs_no_budget():
    unavailable = replace(
        planned("attention", 128, 100), outcome=Outcome.UNAVAILABLE, reason="not here"
    )
    kept, note = within_budget([unavailable, planned("slow", 128, 5)], 6)
    assert kept[0] is unavailable
    assert kept[1].outcome is None
    assert note is None


def test_settings_come_from_the_suite_and_are_overridden():
    read = suite.parse(
        f"title: T\nsettings: {{target_s: 2, min_samples: 9}}\nsweeps:{SWEEP}", Path("t")
    )
    made = make_plan(read, CPU, settings={"min_samples": 3})
    assert made.settings == Settings(target_s=2, min_samples=3)
    assert make_plan(read, CPU, settings=Settings(seed=7)).settings == Settings(seed=7)


def test_filters_keep_what_passes_all():
    made = make(filters=["seqlen>=256", "d_state=64"])
    assert {p.case.problem.seqlen for p in made.cases} == {256}
    assert {p.case.problem.d_state for p in made.cases} == {64, None}
    with pytest.raises(UsageError, match="no case of suite 't' passes the filter seqlen>9000"):
        make(filters=["seqlen>9000"])


def test_a_plan_survives_json():
    made = make(device=GPU, implementations=["scan", "attention:*"], plugins=["./p.py"])
    again = Plan.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made
    assert again.plan_hash == made.plan_hash == made.to_dict()["plan_hash"]
    assert made.plugins == (str(Path("p.py").resolve()),)


def test_the_hash_is_of_the_questions():
    made = make()
    assert replace(made, settings=Settings(seed=3), notes=("n",)).plan_hash == made.plan_hash
    assert make(axes={"seqlen": (128,)}).plan_hash != made.plan_hash
    assert planning.PlannedCase(case=made.cases[0].case).case.case_id == made.cases[0].case.case_id


def test_measurements_are_the_suite_s_unless_asked_for():
    text = "title: T\nmeasure: {cpu: [time], cuda: [time, energy]}\nsweeps:" + SWEEP
    read = suite.parse(text, Path("t.yaml"))
    assert make_plan(read, CPU).settings.measurements == ("time",)
    assert make_plan(read, GPU).settings.measurements == ("time", "energy")
    assert make_plan(read, GPU, measure=["memory"]).settings.measurements == ("memory",)
    assert make(device=GPU).settings.measurements == ("time", "call_time", "memory")
    with pytest.raises(UsageError, match=r"unknown measurement 'tme'.* Did you mean 'time'"):
        make(measure=["tme"])


def test_a_plan_says_what_each_measurement_takes_and_what_will_be_missing():
    made = make(measure=["time", "cold_time", "launches"])
    assert made.measure_s["time"] > 0
    assert made.measure_s["launches"] == 0
    assert any(note.startswith("launches will be missing: ") for note in made.notes)
    alone = make(measure=["time"])
    added = made.measure_s["cold_time"]
    assert made.estimate_s == pytest.approx(alone.estimate_s + added, abs=0.01)


def test_what_is_measured_in_batches_needs_the_time():
    # Only a case that was proven right and timed is handed to a batch profiler.
    made = make(device=GPU, measure=["traffic"])
    assert made.settings.measurements == ("time", "traffic")
