"""Ours against the best peer: who is named, by how much, and when no winner is."""

import pytest

from mambench.harness.analysis.intervals import ROUNDS_FOR_INTERVAL, Interval
from mambench.harness.analysis.results import Analysis, Result
from mambench.harness.analysis.runs import Source
from mambench.harness.errors import UsageError
from mambench.harness.records import Observation
from mambench.harness.spec import Case, DeviceKind, DType, Family, Outcome, Pass, Problem
from mambench.reports import ratios, readme
from mambench.reports.units import TIMES

S6 = Problem(family=Family.S6, batch=1, seqlen=8192, d_inner=2048, d_state=16, ngroups=1)
SSD = Problem(
    family=Family.SSD, batch=1, seqlen=2048, d_inner=2048, d_state=128, headdim=64, ngroups=1
)
UPDATE = Problem(
    family=Family.SSD, batch=128, seqlen=None, d_inner=5120, d_state=128, headdim=64, ngroups=1
)


def result(name, time_s=None, *, problem=S6, width=0.01, outcome=Outcome.OK, **changes):
    implementation, _, variant = name.partition(":")
    case = Case(
        implementation=implementation,
        variant=variant,
        problem=problem,
        pass_=changes.pop("pass_", Pass.FORWARD),
        dtype=DType.BF16,
    )
    interval = time_s and Interval(
        low=time_s * (1 - width), high=time_s * (1 + width), coverage=0.95, over="rounds"
    )
    fields = {"source": "a", "run_id": "r", "time_s": time_s, "interval": interval} | changes
    return Result(case=case, outcome=outcome, **fields)


def analysis(*results):
    source = Source(key="a", label="a GPU", kind=DeviceKind.CUDA, device_name="a GPU", runs=())
    return Analysis(sources=(source,), results=results)


def only(*results, **options):
    (ratio,) = ratios.make(analysis(*results), **options)
    return ratio


def test_the_best_of_ours_meets_the_best_peer():
    ratio = only(
        result("selective_scan:triton", 3e-3),
        result("selective_scan:hopper", 1e-3),
        result("mamba_ssm_scan:cuda", 2.5e-3),
        result("fla_other:x", 4e-3),
        result("associative_scan:triton", 1e-4),  # neither ours to show nor a peer
    )
    assert ratio.ours.case.variant == "hopper"
    assert ratio.peer.case.implementation == "mamba_ssm_scan"
    assert ratio.value == pytest.approx(2.5)
    assert ratio.interval == pytest.approx((2.5 * 0.99 / 1.01, 2.5 * 1.01 / 0.99))
    assert ratio.winner is ratio.ours


def test_a_peer_that_wins_is_said_and_marked_plainly():
    made = ratios.make(
        analysis(result("selective_scan:hopper", 2e-3), result("mamba_ssm_scan:cuda", 1e-3))
    )
    text = ratios.table(made)
    assert made[0].winner is made[0].peer
    assert "Ours is ahead in 0 of 1 rows." in text
    assert "mamba_ssm_scan:cuda wins at s6 forward B=1 L=8,192 D=2,048 N=16, by 2.00 times." in text
    assert (
        f"| 2.00 ms | **1.00 ms** | **mamba_ssm_scan:cuda** | 0.500{TIMES} (0.490 to 0.510) |"
        in text
    )


def test_no_winner_where_the_intervals_meet():
    made = ratios.make(
        analysis(
            result("selective_scan:hopper", 1e-3, width=0.05),
            result("mamba_ssm_scan:cuda", 1.05e-3, width=0.05),
        )
    )
    assert made[0].winner is None
    assert "No difference shows at s6 forward" in ratios.table(made)
    assert "**" not in ratios.table(made)


@pytest.mark.parametrize(("rounds", "told"), [(1, False), (ROUNDS_FOR_INTERVAL, True)])
def test_no_winner_within_what_two_processes_differ_by(rounds: int, told: bool):
    ratio = only(
        result("selective_scan:hopper", 1e-3, width=0.001, rounds=rounds),
        result("mamba_ssm_scan:cuda", 1.015e-3, width=0.001, rounds=rounds),
    )
    assert ratio.interval[0] > 1
    assert (ratio.winner is ratio.ours) == told
    assert (ratio.winner is None) == (not told)


def test_a_time_with_launch_gaps_is_marked_and_beats_nobody():
    gaps = {"method": "events", "found": {"time": {"launch_gaps": True}}}
    ours = result("selective_scan:hopper", 1e-3, method="cuda-graph")
    made = ratios.make(analysis(ours, result("mamba_ssm_scan:cuda", 12e-3, **gaps)))
    text = ratios.table(made)
    assert made[0].winner is None
    assert "no winner is named at s6 forward" in text
    assert "| 1.00 ms | 12.0 ms \u2021 |" in text
    assert "Ours is ahead in 0 of 1 rows." in text
    long = {"method": "events", "found": {"time": {"launch_gaps": False}}}  # kernels of seconds
    (fair,) = ratios.make(analysis(ours, result("mamba_ssm_scan:cuda", 12e-3, **long)))
    assert fair.winner is fair.ours
    assert "\u2021" not in ratios.table([fair])


def test_without_intervals_the_medians_decide_and_none_is_shown():
    ratio = only(
        result("selective_scan:hopper", 1e-3),
        result("mamba_ssm_scan:cuda", 2e-3, interval=None),
    )
    assert ratio.interval is None
    assert ratio.winner is ratio.ours
    assert f"| 2.00{TIMES} |" in ratios.table([ratio])


@pytest.mark.parametrize("outcome", [Outcome.WRONG, Outcome.UNSUPPORTED, Outcome.OOM])
def test_a_peer_that_did_not_end_ok_is_never_the_best_and_is_named(outcome):
    made = ratios.make(
        analysis(
            result("ssd:hopper", 1e-3, problem=SSD),
            result("fla_simple_gla:chunk", problem=SSD, outcome=outcome, reason="its reason"),
            result("mamba_ssm_ssd:triton", 2e-3, problem=SSD),
        )
    )
    assert made[0].peer.case.implementation == "mamba_ssm_ssd"
    assert f"fla_simple_gla:chunk: {outcome.value} in 1 row (its reason)." in ratios.table(made)


def test_a_wrong_result_with_a_time_is_not_compared():
    ratio = only(
        result("ssd:hopper", 2e-3, problem=SSD),
        result("mamba_ssm_ssd:triton", 1e-3, problem=SSD, outcome=Outcome.WRONG),
    )
    assert ratio.peer is None
    assert ratio.value is None
    assert "Not compared: ssd forward B=1 L=2,048 H=32 P=64 N=128." in ratios.table([ratio])


def test_ours_that_failed_is_shown_as_that():
    ratio = only(
        result("ssd:hopper", problem=SSD, outcome=Outcome.CRASHED),
        result("mamba_ssm_ssd:triton", 1e-3, problem=SSD),
    )
    assert "| crashed | 1.00 ms |" in ratios.table([ratio])
    assert "Ours is ahead in 0 of 1 rows." in ratios.sentences([ratio])


def test_rows_that_are_all_ours_are_said_to_be_all():
    one, two = (
        only(result("selective_scan:hopper", 1e-3), result("mamba_ssm_scan:cuda", times * 1e-3))
        for times in (2, 4)
    )
    assert ratios.sentences([one, two]).startswith(
        "Ours is ahead in all 2 rows, by 2.00 to 4.00 times (median 3.00)."
    )
    lost = only(result("selective_scan:hopper", 2e-3), result("mamba_ssm_scan:cuda", 1e-3))
    assert ratios.sentences([one, lost]).startswith(
        "Ours is ahead in 1 of 2 rows, there by 2.00 to 2.00 times"
    )


def test_machines_passes_and_problems_are_not_mixed():
    assert not ratios.make(
        analysis(
            result("selective_scan:hopper", 1e-3),
            result("mamba_ssm_scan:cuda", 1e-3, source="b"),
            result("mamba_ssm_scan:cuda", 1e-3, pass_=Pass.TRAINING),
            result("mamba_ssm_ssd:triton", 1e-3, problem=SSD),
        )
    )


def test_other_metrics_and_a_state_update():
    pair = (
        result("ssd:triton", 1e-3, problem=UPDATE, pass_=Pass.DECODE, extra_memory_bytes=1 << 20),
        result(
            "mamba_ssm_ssd:triton", 1e-3, problem=UPDATE, pass_=Pass.DECODE,
            extra_memory_bytes=3 << 20,
        ),
    )  # fmt: skip
    ratio = only(*pair, metric="extra_memory_bytes")
    assert ratio.label == "ssd state update B=128 H=80 P=64 N=128"
    row = f"| **1.00 MiB** | 3.00 MiB | mamba_ssm_ssd:triton | 3.00{TIMES} |"
    assert row in ratios.table([ratio])
    with pytest.raises(UsageError, match="tokens_per_s"):
        only(*pair, metric="tokens_per_s")


def test_launches_are_whole_numbers():
    ours, theirs = (
        result(name, 1e-3, values={"kernel_count": count})
        for name, count in (("selective_scan:hopper", 4), ("mamba_ssm_scan:cuda", 9))
    )
    ratio = only(ours, theirs, metric="kernel_count")
    assert f"| **4** | 9 | mamba_ssm_scan:cuda | 2.25{TIMES} |" in ratios.table([ratio])


def test_nothing_to_compare_is_said():
    assert "No question" in ratios.sentences([])


@pytest.fixture
def published(tmp_path, write_fixture_run):
    """A published run in which ours and two peers were asked one question."""
    times = {"selective_scan:hopper": 1e-3, "mamba_ssm_scan:cuda": 2e-3, "fla_other:x": 3e-3}
    observations = [
        Observation(
            case=result(name).case,
            observation_id=name,
            started_at="2026-03-01T00:00:00Z",
            duration_s=1.0,
            measurement="time",
            outcome=Outcome.OK,
            method="cuda-graph",
            values={"time_s": time_s},
            samples_s=(time_s,) * 9,
            details={},
        )
        for name, time_s in times.items()
    ]
    write_fixture_run(tmp_path / "published" / "gpu", observations)
    return tmp_path / "published"


def block(tmp_path, spec):
    path = tmp_path / "README.md"
    path.write_text(f"# T\n\n<!-- figures:begin {spec} -->\nold\n<!-- figures:end -->\n")
    return path


def test_a_document_gets_the_table_with_its_provenance(tmp_path, published):
    path = block(tmp_path, "gpu table=ratios")
    assert readme.refresh([path], published) == [path]
    text = path.read_text()
    row = "| **1.00 ms** | 2.00 ms | mamba_ssm_scan:cuda | 2.00"
    assert f"{row}{TIMES} (2.00 to 2.00) |" in text
    assert "Measured on Fixture GPU" in text
    assert "old" not in text
    assert readme.refresh([path], published) == []
    path = block(tmp_path, "gpu table=ratios peers=fla_* pass=forward dtype=bf16")
    readme.refresh([path], published)
    assert f"3.00{TIMES}" in path.read_text()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpu table=ratio", "Did you mean 'ratios'"),
        ("gpu table=ratios metrik=time_s", "metric"),
        ("gpu table=ratios metric=time", "time_s"),
        ("gpu table=ratios pass=training", "no question"),
    ],
)
def test_a_mistake_in_a_block_is_named(tmp_path, published, spec, message):
    path = block(tmp_path, spec)
    with pytest.raises(UsageError, match=message):
        readme.refresh([path], published)
    assert "old" in path.read_text()
