"""The Triton associative scan without a GPU: in the interpreter, and as compiled for GPUs."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from mambench.kernels import scan_triton

HERE = Path(__file__).parent
SCRIPT = HERE / "interpret_associative.py"
CASES = (
    *("s6", "s6-one-step", "s6-bare", "s6-float16"),
    *("ssd", "ssd-limits", "ssd-wide-skip", "ssd-bare"),
)
KERNELS = ("states_kernel", "output_kernel", "grad_states_kernel", "grad_shared_kernel")
FEW_BYTES = 8  # two registers


FAULTY = ("s6 without carry", "one step without carry")


@pytest.fixture(scope="module")
def interpreted(interpret):
    return interpret(SCRIPT, *CASES, *FAULTY)


@pytest.mark.parametrize("case", CASES)
def test_interpreted(interpreted, case):
    assert interpreted[case] == {}


def test_a_carry_that_is_dropped_between_blocks_is_noticed(interpreted):
    assert {"out", "last"} <= set(interpreted["s6 without carry"])
    assert interpreted["one step without carry"] == {}  # one block needs no carry


S6, SSD = "s6 associative bf16 N=16", "ssd associative bf16 P=64 N=128"


@pytest.mark.parametrize(("arch", "entry"), [(80, S6), (90, SSD), (100, S6), (120, S6)])
def test_it_compiles_for_every_architecture_without_spilling(binaries, arch, entry):
    found = binaries(entry, arch, *KERNELS)
    assert not {name: b.stack_bytes for name, b in found.items() if b.stack_bytes > FEW_BYTES}


def test_widest_state_compiles(compile_call):
    def call(draw):
        like_x, like_B = (1, 4096, 4, 8), (1, 4096, 1, 256)
        out = scan_triton.state_space_dual(
            draw(*like_x, grad=True), draw(1, 4096, 4), draw(4, dtype=torch.float32),
            draw(*like_B), draw(*like_B), 64,
        )  # fmt: skip
        draw.backward(out)

    found = compile_call(call, 90, "grad_states_kernel")
    assert found["grad_states_kernel"].shared_bytes < 99 << 10


def test_what_it_does_not_take_is_refused():
    x = torch.zeros(1, 2, 3, dtype=torch.float64)
    A, B = torch.zeros(2, 4), torch.zeros(1, 1, 4, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match="float32, float16 or bfloat16"):
        scan_triton.selective_scan(x, x, A, B, B)
    x, B = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 1, 257)
    with pytest.raises(ValueError, match="at most 256"):
        scan_triton.state_space_dual(x, torch.zeros(1, 3, 2), torch.zeros(2), B, B, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["s6", "ssd"])
@pytest.mark.parametrize("seqlen", [1, 333, 4096])
def test_on_a_gpu_it_equals_the_scan_in_torch(dtype, family, seqlen):
    sys.path.insert(0, str(HERE))
    try:
        import interpret_associative as cases
    finally:
        sys.path.pop(0)
    from mambench.kernels import scan_torch

    names = {"s6": cases.S6, "ssd": cases.SSD}[family]
    sizes = {"s6": (2, seqlen, 32, 1, 16, 2), "ssd": (2, seqlen, 4, 8, 20, 2)}[family]
    case = {"sizes": sizes, "dtype": dtype}
    inputs = {k: v.detach().cuda().requires_grad_() for k, v in cases.draw(case, names).items()}
    wide = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    got = cases.run(scan_triton, case, inputs, names)
    wanted = cases.run(scan_torch, case, wide, names)
    for name, value in got.items():
        size = wanted[name].norm()  # 0: one step from no state does not depend on A
        error = (value.double() - wanted[name]).norm() / torch.where(size > 0, size, 1.0)
        assert error <= (1e-4 if dtype is torch.float32 else 1e-2), (name, float(error))
