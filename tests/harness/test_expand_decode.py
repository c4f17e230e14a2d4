"""Plans of the passes prefill and decode: what has a length, and what is refused."""

from pathlib import Path

from mambench.harness import suite
from mambench.harness.plan import make_plan
from mambench.harness.spec import Device, DeviceKind, Family, Outcome, Pass

CPU = Device(kind=DeviceKind.CPU, name="a processor", memory_bytes=8 << 30)
GPU = Device(
    kind=DeviceKind.CUDA, name="NVIDIA H100", compute_capability=(9, 0), memory_bytes=80 << 30
)
SWEEP = """
  - implementations: [ssd, associative_scan, flash_attention]
    families: [ssd, attention]
    passes: [decode]
    dtype: {cpu: fp32, cuda: bf16}
    axes:
      batch: "1,2"
      seqlen: "2^7..2^9"
      d_inner: 128
      headdim: 64
"""


def make(text=SWEEP, device=CPU, **options):
    return make_plan(suite.parse(f"title: T\nsweeps:{text}", Path("t.yaml")), device, **options)


def test_a_state_update_has_no_length_and_is_asked_once():
    made = make()
    updates = [p.case for p in made.cases if p.case.implementation == "ssd"]
    assert [(c.problem.batch, c.problem.seqlen) for c in updates] == [(1, None), (2, None)]
    assert "L=" not in updates[0].label
    attention = [p.case for p in made.cases if p.case.problem.family is Family.ATTENTION]
    assert len(attention) == 2 * 3
    assert {c.tokens for c in attention} == {1, 2}
    assert made.cases[0].case.problem.seqlen is None, "in order of length, those without first"


def test_what_cannot_decode_is_unsupported_once():
    found = [p for p in make().cases if p.case.implementation == "associative_scan"]
    assert {(p.outcome, p.case.variant) for p in found} == {(Outcome.UNSUPPORTED, "none")}
    assert found[0].reason == "associative_scan computes whole sequences, not one token"


def test_a_block_is_neither_prefilled_nor_decoded():
    text = SWEEP.replace("d_inner: 128", "d_model: 128").replace("axes:", "level: block\n    axes:")
    made = make(text.replace("[decode]", "[prefill, decode]"))
    assert {p.outcome for p in made.cases} == {Outcome.UNSUPPORTED}
    assert "the pass decode is measured at level op" in {p.reason for p in made.cases}


def test_prefill_has_lengths():
    made = make(SWEEP.replace("[decode]", "[prefill]"))
    assert {p.case.problem.seqlen for p in made.cases} == {128, 256, 512}
    assert {p.outcome for p in made.cases} == {None}


def test_a_plan_of_decode_survives_its_manifest():
    made = make(device=GPU)
    assert type(made).from_dict(made.to_dict()) == made
    assert make().plan_hash == make().plan_hash


def test_a_filter_by_length_keeps_what_has_none():
    kept = make(filters=["seqlen>=512"])
    assert {p.case.problem.seqlen for p in kept.cases} == {None, 512}


def test_caches_beyond_the_device_are_left_out():
    made = make_plan(suite.find("decode"), GPU)
    assert all(p.case.pass_ is Pass.DECODE for p in made.cases)
    runnable = [p for p in made.runnable if p.case.implementation == "flash_attention"]
    assert max(p.memory_bytes for p in runnable) <= 1.5 * GPU.memory_bytes
    skipped = [p for p in made.cases if p.outcome is Outcome.SKIPPED]
    assert any("GiB by the memory model" in (p.reason or "") for p in skipped)
    batches = {p.case.problem.batch for p in made.runnable if p.case.implementation == "ssd"}
    assert batches == {1, 8, 32, 128, 512, 1024}
