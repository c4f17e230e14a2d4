"""The gate with planted faults: each must be caught, and correct implementations must pass."""

import gc

import pytest
import torch

from mambench.harness import gate
from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Pass, Problem
from mambench.implementations.problems.s6 import S6Problem
from mambench.implementations.problems.ssd import SsdProblem
from mambench.implementations.workload import Workload
from mambench.kernels import recurrence_torch, scan_torch

SIZES = {
    Family.S6: {"d_inner": 16, "d_state": 8},
    Family.SSD: {"d_inner": 64, "headdim": 16, "d_state": 8},
}


def make(op, *, family=Family.S6, pass_=Pass.TRAINING, dtype=DType.BF16, seqlen=100, **options):
    problem = Problem(family=family, batch=1, seqlen=seqlen, ngroups=1, **SIZES[family])
    case = Case(implementation="x", variant="x", problem=problem, pass_=pass_, dtype=dtype)
    owner = {Family.S6: S6Problem, Family.SSD: SsdProblem}[family](**options)
    return Workload(case=case, family=owner, op=op, device="cpu", seed=7), case


def check(op, **options):
    workload, case = make(op, **options)
    return gate.check(workload, case, seed=0)


def scan(*args, **kwargs):
    return scan_torch.selective_scan(*args, **kwargs)


@pytest.mark.parametrize("module", [scan_torch, recurrence_torch])
@pytest.mark.parametrize("family", [Family.S6, Family.SSD])
@pytest.mark.parametrize("dtype", [DType.FP32, DType.BF16, DType.FP16])
@pytest.mark.parametrize("pass_", [Pass.FORWARD, Pass.TRAINING])
def test_a_correct_implementation_passes(module, family, dtype, pass_):
    op = module.selective_scan if family is Family.S6 else module.state_space_dual
    report = check(op, family=family, dtype=dtype, pass_=pass_, seqlen=70)
    assert report.passed, report.reason
    assert report.reason is None
    assert ("grad_B" in report.errors) == pass_.needs_grad
    assert report.judged == "all"


@pytest.mark.parametrize("seed", range(4))
def test_a_correct_kernel_with_rounded_operands_passes(seed):
    """State passing over chunks of 16, operands of products in bf16, one bf16 x dt."""

    def op(x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus):
        low = torch.bfloat16
        dt = torch.nn.functional.softplus(dt.float() + dt_bias)
        scaled = (x.float() * dt[..., None]).to(low).float()
        state, parts = torch.zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]), []
        for start in range(0, x.shape[1], 16):
            part = slice(start, start + 16)
            total = torch.cumsum(dt[:, part] * A, dim=1)  # (B, Q, H)
            difference = total[:, :, None] - total[:, None]
            causal = torch.ones(difference.shape[1:3]).tril()[:, :, None].bool()
            decay = difference.masked_fill(~causal, -torch.inf).exp()
            products = torch.einsum("btgn,bsgn->bts", C[:, part].float(), B[:, part].float())
            weights = (products[..., None] * decay).to(low).float()
            within = torch.einsum("btsh,bshp->bthp", weights, scaled[:, part])
            passed = torch.einsum("btgn,bhpn->bthp", C[:, part].float(), state.to(low).float())
            parts.append(within + passed * total.exp()[..., None])
            kept = (total[:, -1:] - total).exp()
            inflow = (scaled[:, part] * kept[..., None]).to(low).float()
            state = state * total[:, -1].exp()[..., None, None]
            state = state + torch.einsum("bthp,btgn->bhpn", inflow, B[:, part].float())
        return (torch.cat(parts, dim=1) + D[:, None] * x.float()).to(x.dtype)

    workload, case = make(op, family=Family.SSD)
    report = gate.check(workload, case, seed=seed)
    assert report.passed, report.reason


def wrong_scale(*args, **kwargs):
    return scan(*args, **kwargs) * 1.02


def state_dropped_between_chunks(u, delta, A, B, C, D, **kwargs):
    parts = [slice(start, start + 64) for start in range(0, u.shape[2], 64)]
    outs = [scan(u[..., p], delta[..., p], A, B[..., p], C[..., p], D, **kwargs) for p in parts]
    return torch.cat(outs, dim=2)


def last_steps_of_one_channel_wrong(*args, **kwargs):
    y = scan(*args, **kwargs)
    factor = torch.ones_like(y)
    factor[:, 5, -8:] = 0.5
    return y * factor


def one_value_nan(*args, **kwargs):
    y = scan(*args, **kwargs)
    hole = torch.zeros_like(y)
    hole[0, 3, 50] = torch.nan
    return y + hole


def wrong_dtype(*args, **kwargs):
    return scan(*args, **kwargs).float()


def one_token_too_many(*args, **kwargs):
    return torch.nn.functional.pad(scan(*args, **kwargs), (0, 1))


FAULTS = {
    wrong_scale: "y",
    state_dropped_between_chunks: "y",
    last_steps_of_one_channel_wrong: "y",
    one_value_nan: "y: 1 of 1600 values are NaN",
    wrong_dtype: "y: dtype torch.float32, expected torch.bfloat16",
    one_token_too_many: "y: shape (1, 16, 101), expected (1, 16, 100)",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("pass_", [Pass.FORWARD, Pass.BACKWARD])
def test_a_wrong_output_is_caught(fault, pass_):
    report = check(fault, pass_=pass_)
    assert not report.passed
    assert report.reason is not None
    if pass_ is Pass.FORWARD or not report.errors:
        assert FAULTS[fault] in report.reason
    else:  # the worst tensor is named, which may be a gradient
        assert report.errors["y"]["block_error"] > report.errors["y"]["block_budget"]


def test_the_reason_names_tensor_block_error_and_budget():
    reason = check(last_steps_of_one_channel_wrong, pass_=Pass.FORWARD).reason
    assert reason is not None
    assert reason.startswith("y")
    assert "relative error" in reason
    assert "budget" in reason
    seen = check(last_steps_of_one_channel_wrong, pass_=Pass.FORWARD).errors["y"]
    assert seen["block_error"] > 4 * seen["error"]  # what averaging would have hidden


class Gradient(torch.autograd.Function):
    """The identity, with a gradient that is scaled, in the last steps only if so asked."""

    @staticmethod
    def forward(ctx, value, factor, last_only):
        ctx.factor, ctx.last_only = factor, last_only
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        (grad[..., -16:] if ctx.last_only else grad).mul_(ctx.factor)
        return grad, None, None


@pytest.mark.parametrize("name", ["B", "A", "delta_bias", "u"])
def test_a_wrong_gradient_alone_is_caught(name):
    def op(u, delta, A, B, C, D, *, delta_bias, **kwargs):
        tensors = {"u": u, "A": A, "B": B, "delta_bias": delta_bias}
        tensors[name] = Gradient.apply(tensors[name], 1.05, False)
        u, A, B, delta_bias = tensors.values()
        return scan(u, delta, A, B, C, D, delta_bias=delta_bias, **kwargs)

    report = check(op)
    assert not report.passed
    assert report.reason is not None
    assert report.reason.startswith(f"grad_{name}")
    assert report.errors["y"]["error"] < report.errors["y"]["budget"]
    assert check(op, pass_=Pass.FORWARD).passed


def test_a_gradient_wrong_in_the_last_steps_alone_is_caught():
    def op(u, *args, **kwargs):
        return scan(Gradient.apply(u, 0.9, True), *args, **kwargs)

    report = check(op, seqlen=1000)
    assert not report.passed
    assert report.reason is not None
    assert "grad_u" in report.reason


@pytest.mark.parametrize("family", [Family.S6, Family.SSD])
def test_a_wrong_gradient_of_few_values_fails_however_often_it_is_drawn(family):
    def s6(u, delta, A, B, C, D, *args, **kwargs):
        return scan_torch.selective_scan(
            u, delta, A, B, C, Gradient.apply(D, 1.05, False), *args, **kwargs
        )

    def ssd(x, dt, A, *args, **kwargs):
        return scan_torch.state_space_dual(x, dt, Gradient.apply(A, 1.2, False), *args, **kwargs)

    report = check({Family.S6: s6, Family.SSD: ssd}[family], family=family)
    assert not report.passed
    assert report.reason is not None
    assert report.reason.startswith({Family.S6: "grad_D", Family.SSD: "grad_A"}[family])


def test_an_input_without_gradient_is_caught():
    def op(u, delta, A, B, C, D, **kwargs):
        return scan(u, delta, A, B, C, D.detach(), **kwargs)

    assert check(op).reason == "grad_D: the operation is not differentiable in D"


def test_an_output_without_graph_is_caught():
    report = check(lambda *args, **kwargs: scan(*args, **kwargs).detach())
    assert report.reason == "y: has no graph, so no gradient can be computed from it"


def test_an_unwritten_tail_is_caught():
    def op(*args, **kwargs):
        y = scan(*args, **kwargs)
        out = torch.empty_like(y)
        out[..., :-3] = y[..., :-3]
        return out

    report = check(op, pass_=Pass.FORWARD)
    assert report.reason is not None
    assert report.reason.startswith("y: 48 of 1600 values are NaN or infinite: never written")


def test_a_result_kept_from_an_earlier_call_is_caught():
    kept = []

    def op(*args, **kwargs):
        if not kept:
            kept.append(scan(*args, **kwargs))
        return kept[0].clone()

    assert not check(op, pass_=Pass.FORWARD).passed


def test_an_output_buffer_that_the_next_call_overwrites_is_caught():
    buffer = torch.empty(1, 16, 100, dtype=torch.bfloat16)
    report = check(lambda *a, **k: buffer.copy_(scan(*a, **k)), pass_=Pass.FORWARD)
    assert report.reason == "y: the second call overwrote the first call's result"


def test_a_changed_input_is_caught():
    def op(u, delta, *args, **kwargs):
        y = scan(u, delta, *args, **kwargs)
        delta.detach()[0, 0, 0] += 1
        return y

    assert check(op, pass_=Pass.FORWARD).reason == "delta: the operation changed its input"


def test_two_exchanged_input_values_are_a_change():
    def op(u, *args, **kwargs):
        y = scan(u, *args, **kwargs)
        u.detach()[0, 0, [0, 1]] = u.detach()[0, 0, [1, 0]]
        return y

    assert check(op, pass_=Pass.FORWARD).reason == "u: the operation changed its input"


def test_a_sample_is_judged_and_the_rest_must_be_finite():
    few = {"judged_states": 1}
    assert check(scan, **few).passed
    assert check(scan, **few).judged == "4 channels"

    def op(channel, value):
        def spoilt(*args, **kwargs):
            y = scan(*args, **kwargs)
            factor = torch.ones_like(y)
            factor[:, channel] = value
            return y * factor

        return spoilt

    workload, _ = make(scan, **few)
    sampled = workload.family.sample(workload.problem, seed=0).channels
    assert sampled is not None
    other = next(c for c in range(16) if c not in sampled)
    assert not check(op(sampled[1], 1.1), **few).passed
    assert check(op(other, 1.1), **few).passed  # the price of sampling
    assert not check(op(other, torch.inf), **few).passed


def test_the_workload_is_the_same_before_and_after():
    workload, case = make(scan)
    before = {name: tensor.detach().clone() for name, tensor in workload.inputs.items()}
    versions = {name: tensor.data_ptr() for name, tensor in workload.inputs.items()}
    assert gate.check(workload, case, seed=0).passed
    for name, tensor in workload.inputs.items():
        assert torch.equal(tensor, before[name])
        assert tensor.data_ptr() == versions[name]
        assert tensor.grad is None
        assert tensor.requires_grad


def test_torch_is_left_as_it_was_even_when_the_operation_raises():
    def op(*args, **kwargs):
        assert torch.get_deterministic_debug_mode() == 1
        raise RuntimeError("launch failed")

    filled = torch.utils.deterministic.fill_uninitialized_memory
    with pytest.raises(RuntimeError, match="launch failed"):
        check(op)
    assert torch.get_deterministic_debug_mode() == 0
    assert torch.utils.deterministic.fill_uninitialized_memory == filled


def test_nothing_that_was_allocated_stays():
    workload, case = make(scan)
    gate.check(workload, case, seed=0)
    gc.collect()
    before = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    gate.check(workload, case, seed=0)
    after = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    assert after == before


@pytest.mark.gpu
@pytest.mark.parametrize("family", [Family.S6, Family.SSD])
def test_on_the_gpu_correct_passes_and_memory_is_given_back(family):
    from mambench.harness.registry import get
    from mambench.implementations.workload import build

    device = Device(kind=DeviceKind.CUDA, name="gpu", memory_bytes=1 << 34)
    problem = Problem(family=family, batch=1, seqlen=2048, ngroups=1, **SIZES[family])
    case = Case(
        implementation="associative_scan",
        variant="torch",
        problem=problem,
        pass_=Pass.TRAINING,
        dtype=DType.BF16,
    )
    workload = build(case, get("associative_scan"), device, seed=0)
    gate.check(workload, case, seed=0)
    before = torch.cuda.memory_allocated()
    report = gate.check(workload, case, seed=0)
    assert report.passed, report.reason
    assert torch.cuda.memory_allocated() == before
