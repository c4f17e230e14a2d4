"""Kernels of known time and traffic: compiled for a GPU anywhere, run where there is one."""

import pytest
import torch

pytest.importorskip("triton")

from mambench.kernels import probes

COMPILED = {
    "_spin_kernel": ({"record_ptr": "*i64", "cycles": "i32"}, {}),
    "_timer_kernel": ({"steps_ptr": "*i64", "count": "i32"}, {}),
    "_chain_kernel": ({"out_ptr": "*fp32", "rounds": "i32", "BLOCK": "constexpr"}, {(2,): 1024}),
}


def ptx(name: str) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants = COMPILED[name]
    source = ASTSource(fn=getattr(probes, name), signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


def test_waiting_is_not_compiled_away_and_lies_between_the_timer_readings() -> None:
    code = ptx("_spin_kernel")
    reads = [line.split("%")[-1].strip(";\t ") for line in code.splitlines() if "clock64" in line]
    assert len(reads) == 2  # at the begin, and in the loop
    first, last = code.index("%globaltimer"), code.rindex("%globaltimer")
    assert first < code.index("%clock64") < code.rindex("%clock64") < last
    assert "bra" in code[first:last]
    assert last < code.index("atom.global")


def test_the_timer_is_read_until_it_steps() -> None:
    code = ptx("_timer_kernel")
    assert code.count("%globaltimer") >= 2  # before the loop, and in it
    assert "bra" in code[code.rindex("%globaltimer") :]


def test_every_exponential_is_taken() -> None:
    code = ptx("_chain_kernel")
    assert "ex2.approx" in code
    assert "bra" in code


@pytest.mark.gpu
@pytest.mark.alone
def test_a_wait_is_as_long_as_its_cycles_and_is_recorded() -> None:
    record = probes.new_record()
    for _ in range(20):
        probes.spin(record, 1_000_000)
    executions, own_ns, cycles = probes.read_record(record)
    assert executions == 20
    assert 1_000_000 <= cycles / executions < 1_001_000
    assert 0.2e6 < own_ns / executions < 5e6  # 0.2 to 5 GHz


@pytest.mark.gpu
def test_copies_and_sums_are_right() -> None:
    source = torch.randn(8 * probes.BLOCK, device="cuda")
    target = torch.full_like(source, torch.nan)
    probes.copy(source, target)
    assert torch.equal(source, target)
    out = torch.full((8,), torch.nan, device="cuda")
    probes.total(source, out)
    torch.testing.assert_close(out, source.view(8, -1).sum(dim=1), rtol=1e-5, atol=1e-3)
