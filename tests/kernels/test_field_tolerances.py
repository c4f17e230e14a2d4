"""Our operations at the shapes and within the tolerances of other projects' tests.

mamba_ssm, tests/ops/test_selective_scan.py and tests/ops/triton/test_selective_state_update.py:
their sizes, distributions of the inputs and (rtol, atol), elementwise; of the update the tied
heads, without an index of the batch. fla's tests: the RMSE ratio, at sizes of its simple_gla.
mamba_ssm has no end-to-end test of its SSD. The truth is a loop over time in float64.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu, softplus

from mambench.kernels.ssd.hopper_config import refusal

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SCAN = {"fp32": (6e-4, 2e-3), "fp16": (3e-3, 5e-3), "bf16": (3e-2, 5e-2)}
UPDATE = {"fp32": (3e-4, 1e-3), "fp16": (5e-3, 1e-2), "bf16": (1e-2, 5e-2)}
HEADS = {"fp32": (3e-4, 1e-3), "fp16": (5e-3, 3e-2), "bf16": (1e-2, 1e-1)}
FLA_RATIO = 5e-3
# Gradients are given more, and those of parameters at least 1e-3.
LOOSER = {"u": (2, 2), "delta": (5, 10), "A": (1, 5)}
PARAMETERS = ("A", "D", "delta_bias")


def load_literal():
    path = Path(__file__).parent / "s6" / "literal.py"
    spec = importlib.util.spec_from_file_location("literal_of_field", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


literal = load_literal()


def scan_op(name):
    if name == "numba":
        from mambench.kernels.s6 import numba_scan as module
    elif name == "triton":
        from mambench.kernels.s6 import triton_scan as module
    elif name == "hopper":
        from mambench.kernels.s6 import hopper_op as module
    elif name == "associative-triton":
        from mambench.kernels import scan_triton as module
    else:
        from mambench.kernels import scan_torch as module
    return module.selective_scan


def scan_inputs(seqlen, groups, dtype, device):
    torch.manual_seed(0)
    batch, dim, d_state = 2, 4, 8
    inputs = {
        "A": -0.5 * torch.rand(dim, d_state),
        "B": torch.randn(batch, groups, d_state, seqlen).to(dtype),
        "C": torch.randn(batch, groups, d_state, seqlen).to(dtype),
        "D": torch.randn(dim),
        "z": torch.randn(batch, dim, seqlen).to(dtype),
        "delta_bias": 0.5 * torch.rand(dim),
        "u": torch.randn(batch, dim, seqlen).to(dtype),
        "delta": (0.5 * torch.rand(batch, dim, seqlen)).to(dtype),
    }
    return {name: value.to(device).requires_grad_() for name, value in inputs.items()}


def judge_scan(op, seqlen, groups, dtype, device):
    inputs = scan_inputs(seqlen, groups, DTYPES[dtype], device)
    wide = {name: v.detach().double().requires_grad_() for name, v in inputs.items()}
    out, last = op(**inputs, delta_softplus=True, return_last_state=True)
    truth, state = literal.scan(**wide, delta_softplus=True)
    rtol, atol = SCAN[dtype]
    torch.testing.assert_close(out.double(), truth, rtol=rtol, atol=atol)
    torch.testing.assert_close(last.double(), state, rtol=rtol, atol=atol)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, tuple(inputs.values()), grad)
    wanted = torch.autograd.grad(truth, tuple(wide.values()), grad.double())
    for name, value, reference in zip(inputs, got, wanted, strict=True):
        r, a = (max(rtol, 1e-3), max(atol, 1e-3)) if name in PARAMETERS else (rtol, atol)
        times = LOOSER.get(name, (1, 1))
        torch.testing.assert_close(
            value.double(), reference, rtol=r * times[0], atol=a * times[1], msg=f"d{name}: {{}}"
        )


@pytest.mark.parametrize("name", ["numba", "associative-torch"])
@pytest.mark.parametrize(
    ("seqlen", "groups", "dtype"),
    [(128, 1, "fp32"), (256, 2, "fp16"), (512, 2, "bf16"), (1024, 1, "fp32")],
)
def test_selective_scan(name, seqlen, groups, dtype):
    judge_scan(scan_op(name), seqlen, groups, dtype, "cpu")


def test_a_scan_that_forgets_a_little_is_outside():
    def forgets(*, A, **rest):
        return scan_op("associative-torch")(A=1.1 * A, **rest)

    with pytest.raises(AssertionError):
        judge_scan(forgets, 128, 1, "fp32", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "hopper", "associative-triton"])
@pytest.mark.parametrize("dtype", SCAN)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("seqlen", [128, 256, 512, 1024, 2048, 4096])
def test_selective_scan_on_a_gpu(name, seqlen, groups, dtype):
    if name == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    judge_scan(scan_op(name), seqlen, groups, dtype, "cuda")


def update_op(name):
    if name == "numba":
        from mambench.kernels.state_update import numba_update as module
    elif name == "triton":
        from mambench.kernels.state_update import triton_update as module
    else:
        from mambench.kernels.state_update import torch_update as module
    return module.selective_state_update


def updated(state, x, dt, A, B, C, D, z, dt_bias):
    """The definition in float64: state (B, H, P, N), A (H, P, N), the rest (B, H, P) or (H, P)."""
    repeats = x.shape[1] // B.shape[1]
    B, C = (value.repeat_interleave(repeats, 1)[:, :, None] for value in (B, C))
    dt = softplus(dt + dt_bias)[..., None]
    state = state * torch.exp(dt * A) + dt * B * x[..., None]
    out = (state * C).sum(-1) + D * x
    return (out if z is None else out * silu(z)), state


def judge_update(op, dim, d_state, gated, dtype, device, *, groups=None):
    """Judge an update of single channels (groups None), or of heads of 64 channels in groups."""
    torch.manual_seed(0)
    batch, headdim = 2, 64
    tied = groups is not None
    dim -= dim % headdim if tied else 0
    places = (dim // headdim, headdim) if tied else (dim,)
    rows = places[:1]  # what has a dt, a bias and a D of its own
    itype = DTYPES[dtype]
    state = torch.randn(batch, *places, d_state).to(device, itype)
    x = torch.randn(batch, *places).to(device, itype)
    dt = torch.randn(batch, *rows).to(device, itype)
    dt_bias = torch.rand(rows).to(device) - 4
    A = -torch.rand(*rows, *(() if tied else (d_state,))).to(device) - 1
    B, C = (torch.randn(batch, groups or 1, d_state).to(device) for _ in "BC")
    D = torch.randn(rows).to(device)
    z = torch.randn_like(x) if gated else None
    by_channel = (batch, *rows, headdim if tied else 1)

    def spread(value):
        return value.double()[..., None].expand(*value.shape, by_channel[-1])

    decays = A.double()[:, None, None] if tied else A.double()[:, None]
    truth, wanted = updated(
        state.double().view(*by_channel, d_state),
        x.double().view(by_channel),
        spread(dt), decays, B.double(), C.double(), spread(D),
        None if z is None else z.double().view(by_channel),
        spread(dt_bias),
    )  # fmt: skip
    out = op(state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=True)
    rtol, atol = (HEADS if tied else UPDATE)[dtype]
    torch.testing.assert_close(out.double(), truth.view_as(out), rtol=rtol, atol=atol)
    torch.testing.assert_close(state.double(), wanted.view_as(state), rtol=rtol, atol=atol)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("groups", [None, 1, 4])
@pytest.mark.parametrize(
    ("name", "dim", "d_state", "dtype"),
    [
        ("numba", 2048, 16, "fp32"),
        ("numba", 2064, 64, "fp32"),
        ("torch", 4096, 64, "bf16"),
        ("torch", 2048, 32, "fp16"),
    ],
)
def test_state_update(name, dim, d_state, gated, dtype, groups):
    judge_update(update_op(name), dim, d_state, gated, dtype, "cpu", groups=groups)


def update_cases():
    """Return (dim, groups, d_state, gated, dtype): all pairs of values, and all of single channels.

    A kernel is compiled for every case.
    """
    options = [(gated, dtype) for dtype in UPDATE for gated in (False, True)]
    cases = [(2048, None, n, *option) for n in (16, 32, 64) for option in options]
    widths = [(2064, None), (4096, None), *((d, g) for d in (2048, 4096) for g in (1, 2, 4))]
    for i, (dim, groups) in enumerate(widths):
        for j, n in enumerate((16, 32, 64)):
            cases += [(dim, groups, n, *options[(i + 2 * j + k) % 6]) for k in (0, 3)]
    return cases


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "groups", "d_state", "gated", "dtype"), update_cases())
def test_state_update_on_a_gpu(dim, d_state, gated, dtype, groups):
    judge_update(update_op("triton"), dim, d_state, gated, dtype, "cuda", groups=groups)


def ssd_op(name):
    if name == "torch":
        from mambench.kernels.ssd import torch_ssd

        return torch_ssd.ssd
    if name == "triton":
        from mambench.kernels.ssd import triton_ssd

        return triton_ssd.ssd
    if name == "associative-triton":
        from mambench.kernels import scan_triton

        return scan_triton.state_space_dual
    from mambench.kernels.ssd import hopper_op

    return hopper_op.ssd


def judge_ssd(op, sizes, dtype, device):
    """Judge out, final state and gradients by fla's measure, the ratio of root mean squares."""
    from mambench.implementations.problems.recurrence import by_rows, solve

    batch, seqlen, heads, width = sizes
    torch.manual_seed(42)
    over_time = (batch, seqlen, heads, width)
    inputs = {
        "x": torch.randn(over_time).to(dtype),
        "dt": torch.rand(batch, seqlen, heads).to(dtype),
        "A": -torch.rand(heads),
        "B": torch.randn(batch, seqlen, 1, width).to(dtype) * width**-0.5,
        "C": torch.randn(batch, seqlen, 1, width).to(dtype),
        "initial_states": torch.randn(batch, heads, width, width),
    }
    inputs = {name: value.to(device).requires_grad_() for name, value in inputs.items()}
    out, final = op(**inputs, chunk_size=64, return_final_states=True)
    wide = {name: v.detach().double().requires_grad_() for name, v in inputs.items()}
    x, dt, A, B, C, entry = wide.values()
    decay = torch.exp(dt * A).transpose(1, 2)[..., None]  # (B, H, L, 1)
    inflow = torch.einsum("blh,blhp,blgn->bhlpn", dt, x, B)
    first = torch.cat(
        (inflow[:, :, :1] + decay[:, :, :1, None] * entry[:, :, None], inflow[:, :, 1:]), 2
    )
    states = solve(decay, first.flatten(-2), by_rows).unflatten(-1, (width, width))
    truth = torch.einsum("bhlpn,blgn->blhp", states, C)
    grads = torch.randn_like(out), torch.randn_like(final)
    got = (out, final, *torch.autograd.grad((out, final), tuple(inputs.values()), grads))
    wanted = (truth, states[:, :, -1])
    wanted += torch.autograd.grad(wanted, tuple(wide.values()), [g.double() for g in grads])
    for name, value, reference in zip(("out", "final", *inputs), got, wanted, strict=True):
        error = (value.double() - reference).square().mean().sqrt()
        ratio = float((error / reference.square().mean().sqrt()).detach())
        assert ratio < FLA_RATIO, (name, ratio)


@pytest.mark.parametrize("sizes", [(1, 63, 1, 32), (2, 100, 3, 20)])
def test_ssd(sizes):
    judge_ssd(ssd_op("torch"), sizes, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "hopper", "associative-triton"])
@pytest.mark.parametrize(
    "sizes", [(1, 63, 1, 64), (2, 500, 3, 60), (2, 1000, 3, 64), (3, 1024, 2, 128)]
)
def test_ssd_on_a_gpu(name, sizes):
    if name == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    op = ssd_op(name)
    if name == "hopper" and refusal(headdim=sizes[-1], d_state=sizes[-1]) is not None:
        with pytest.raises(ValueError, match="multiples of 8"):
            judge_ssd(op, sizes, torch.float16, "cuda")
        return
    judge_ssd(op, sizes, torch.float16, "cuda")
