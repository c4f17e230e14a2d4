"""The peers' adapters: availability, limits, and the mapping of simple_gla to SSD."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from mambench.harness import registry
from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Pass, Problem
from mambench.implementations.peers import availability, fla, mamba_ssm
from mambench.implementations.problems.ssd import SsdProblem

CPU = Device(kind=DeviceKind.CPU, name="cpu", memory_bytes=1 << 33)
H100 = Device(kind=DeviceKind.CUDA, name="H100", compute_capability=(9, 0), memory_bytes=80 << 30)
PEERS = ["mamba_ssm_scan", "mamba_ssm_ssd", "fla_simple_gla"]
SSD = Problem(
    family=Family.SSD, batch=2, seqlen=19, d_inner=24, d_state=5, headdim=6, ngroups=2, gated=True
)


def a_case(name: str, variant: str, **changes: object) -> Case:
    family = registry.get(name).families[0]
    sizes = {"headdim": 64} if family is Family.SSD else {}
    problem = Problem(
        family=family, batch=1, seqlen=512, d_inner=2048, d_state=16, ngroups=1, **sizes
    )
    case = Case(
        implementation=name, variant=variant, problem=problem, pass_=Pass.FORWARD, dtype=DType.BF16
    )
    return replace(case, **changes)


def simple_gla_by_steps(q, k, v, g, *, scale, initial_state=None, output_final_state=False):
    """The documented recurrence, one step at a time: S (B, H, N, P)."""
    batch, seqlen, nheads, d_state = q.shape
    state = q.new_zeros(batch, nheads, d_state, v.shape[-1], dtype=g.dtype)
    if initial_state is not None:
        state = initial_state
    steps = []
    for t in range(seqlen):
        inflow = torch.einsum("bhn,bhp->bhnp", k[:, t], v[:, t])
        state = torch.exp(g[:, t])[..., None, None] * state + inflow
        steps.append(scale * torch.einsum("bhn,bhnp->bhp", q[:, t].to(state.dtype), state))
    return torch.stack(steps, 1).to(v.dtype), state if output_final_state else None


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_is_unavailable_on_the_cpu(name):
    variants = registry.get(name).variants(CPU)
    assert variants
    assert {variant.unavailable for variant in variants} == {availability.NEEDS_GPU}


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_that_is_not_installed_says_what_to_install(name, monkeypatch):
    monkeypatch.setattr(availability, "find_spec", lambda module: None)
    for variant in registry.get(name).variants(H100):
        assert "not installed" in variant.unavailable
        assert "pip install" in variant.unavailable


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_that_is_installed_runs_from_ampere_on(name, monkeypatch):
    monkeypatch.setattr(availability, "find_spec", lambda module: object())
    assert all(v.unavailable is None for v in registry.get(name).variants(H100))
    turing = replace(H100, name="T4", compute_capability=(7, 5))
    assert all("8.0, T4 has 7.5" in v.unavailable for v in registry.get(name).variants(turing))


def test_one_missing_module_is_named_alone(monkeypatch):
    monkeypatch.setattr(
        availability, "find_spec", lambda module: None if module == "selective_scan_cuda" else 1
    )
    (variant,) = registry.get("mamba_ssm_scan").variants(H100)
    assert variant.unavailable.startswith("selective_scan_cuda is not installed: ")
    assert "MAMBA_KEEP_CUDA_BUILD=TRUE" in variant.unavailable  # or it is left out again


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"dtype": DType.FP64}, "fp32"), ({"dtype": DType.BF16}, None)],
)
@pytest.mark.parametrize("name", PEERS)
def test_float64_is_declined(name, changes, reason):
    peer = registry.get(name)
    for variant in peer.variants(H100):
        declined = peer.unsupported(a_case(name, variant.name, **changes), H100)
        assert (reason in declined) if reason else declined is None


def test_the_scan_declines_what_its_kernel_cannot_index():
    peer, case = registry.get("mamba_ssm_scan"), a_case("mamba_ssm_scan", "cuda")
    wide = replace(case, problem=replace(case.problem, d_inner=65_536))
    deep = replace(case, problem=replace(case.problem, d_state=257))
    assert "d_inner" in peer.unsupported(wide, H100)
    assert "d_state" in peer.unsupported(deep, H100)


@pytest.mark.parametrize(
    ("triton", "refused"),
    [("3.3.1", False), ("3.4.0", True), ("3.6.0", True), ("3.7.0", True), ("3.7.1", False)],
)
def test_the_backward_that_fla_refuses_is_declined(monkeypatch, triton, refused):
    monkeypatch.setattr(fla, "version", lambda name: triton)
    monkeypatch.setattr(fla, "find_spec", lambda module: None)
    peer = registry.get("fla_simple_gla")
    training = a_case("fla_simple_gla", "chunk", pass_=Pass.TRAINING)
    assert (peer.unsupported(training, H100) is not None) == refused
    assert peer.unsupported(replace(training, pass_=Pass.FORWARD), H100) is None
    assert peer.unsupported(replace(training, variant="fused_chunk"), H100) is None
    ampere = replace(H100, compute_capability=(8, 0))
    assert peer.unsupported(training, ampere) is None


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("pass_", [Pass.FORWARD, Pass.TRAINING])
def test_the_memory_for_the_plan_grows_with_the_length(name, pass_):
    peer = registry.get(name)
    for variant in peer.variants(H100):
        case = a_case(name, variant.name, pass_=pass_)
        long = replace(case, problem=replace(case.problem, seqlen=8192))
        short_bytes, long_bytes = peer.workspace_bytes(case), peer.workspace_bytes(long)
        assert 4 * short_bytes <= long_bytes <= 16 * short_bytes


@pytest.mark.parametrize("gated", [False, True])
def test_simple_gla_with_what_surrounds_it_is_ssd(gated):
    family, problem = SsdProblem(), replace(SSD, gated=gated)
    inputs = family.make_inputs(problem, dtype=torch.float32, device="cpu", seed=1)
    leaves = [inputs[name].requires_grad_() for name in family.differentiable(problem)]
    op = fla.as_ssd(simple_gla_by_steps, compiled=False)
    sample = family.sample(problem, seed=0)
    (out,), (expected,) = (
        family.call(op, problem, inputs),
        family.reference(problem, {k: v.double() for k, v in inputs.items()}, sample),
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, grad)
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    for value, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, reference, rtol=2e-3, atol=2e-3)


def test_every_optional_argument_of_ssd_is_mapped(literal_ssd):
    family = SsdProblem()
    inputs = family.make_inputs(SSD, dtype=torch.float32, device="cpu", seed=2)
    entry = torch.randn(2, 4, 6, 5)
    op = fla.as_ssd(simple_gla_by_steps, compiled=False)
    out, final = op(
        *(inputs[name] for name in ("x", "dt", "A", "B", "C")),
        64,
        **{name: inputs[name] for name in ("D", "z", "dt_bias")},
        initial_states=entry,
        dt_softplus=True,
        return_final_states=True,
    )
    expected, last = literal_ssd(**inputs, initial_states=entry)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final, last, rtol=1e-4, atol=1e-4)


def test_dt_limits_and_bare_calls_are_mapped(literal_ssd):
    inputs = SsdProblem().make_inputs(SSD, dtype=torch.float32, device="cpu", seed=3)
    op = fla.as_ssd(simple_gla_by_steps, compiled=False)
    five = [inputs[name] for name in ("x", "dt", "A", "B", "C")]
    bare = op(*five, 64, dt_limit=(0.1, 0.2))
    five[1] = five[1].clamp(0.1, 0.2)
    torch.testing.assert_close(bare, op(*five, 64))


def test_a_wrong_mapping_is_seen(literal_ssd):
    inputs = SsdProblem().make_inputs(SSD, dtype=torch.float32, device="cpu", seed=2)

    def scaled(q, k, v, g, *, scale, **options):
        return simple_gla_by_steps(q, k, v, g, scale=q.shape[-1] ** -0.5, **options)

    op = fla.as_ssd(scaled, compiled=False)
    five = [inputs[name] for name in ("x", "dt", "A", "B", "C")]
    rest = {name: inputs[name] for name in ("D", "z", "dt_bias")}
    expected, _ = literal_ssd(**inputs)
    difference = op(*five, 64, **rest, dt_softplus=True) - expected
    assert difference.norm() > 0.05 * expected.norm()


def test_listing_the_peers_imports_none_of_them_and_no_torch():
    code = (
        "import runpy, sys\n"
        "from pathlib import Path\n"
        "package = Path('mambench').resolve()\n"
        "runpy.run_path(str(package / '_start.py'))['load_package'](package)\n"
        "from mambench.harness import machine, registry\n"
        "for item in registry.load().values(): item.variants(machine.cpu())\n"
        "heavy = {'torch', 'triton', 'mamba_ssm', 'fla', 'flashinfer', 'einops'}\n"
        "found = heavy & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def update_by_steps(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """The one-token update of single channels, as documented: everything (B, H, P) or (H, P, N)."""
    assert dt.shape == x.shape
    assert A.shape == state.shape[1:]
    assert dt.stride(-1) == A.stride(-1) == A.stride(-2) == dt_bias.stride(-1) == 0
    groups = x.shape[1] // B.shape[1]
    dt = torch.nn.functional.softplus(dt + dt_bias)[..., None]
    state.mul_(torch.exp(dt * A)).add_(
        dt * x[..., None] * B.repeat_interleave(groups, 1)[:, :, None]
    )
    out = (state * C.repeat_interleave(groups, 1)[:, :, None]).sum(-1) + D * x
    return out * torch.nn.functional.silu(z)


def test_the_update_of_tied_heads_continues_the_sequence(literal_ssd):
    inputs = SsdProblem().make_inputs(SSD, dtype=torch.float64, device="cpu", seed=4)
    over_time = ("x", "dt", "B", "C", "z")
    before = {k: v[:, :-1] if k in over_time else v for k, v in inputs.items()}
    _, state = literal_ssd(**before)
    now = {k: v[:, -1] if k in over_time else v for k, v in inputs.items()}
    out = mamba_ssm.tied_update(update_by_steps)(state, **now, dt_softplus=True)
    expected, last = literal_ssd(**inputs)
    torch.testing.assert_close(out, expected[:, -1])
    torch.testing.assert_close(state, last)


def test_decode_is_offered_on_a_gpu_where_installed(monkeypatch):
    monkeypatch.setattr(availability, "find_spec", lambda module: object())
    for name in ("mamba_ssm_scan", "mamba_ssm_ssd", "flashinfer_update"):
        (variant,) = registry.get(name).decode_variants(H100)
        assert variant.unavailable is None
        (variant,) = registry.get(name).decode_variants(CPU)
        assert variant.unavailable == availability.NEEDS_GPU


def test_flashinfer_declines_sequences_and_sizes():
    peer = registry.get("flashinfer_update")
    assert all("one token" in variant.unavailable for variant in peer.variants(H100))
    with pytest.raises(NotImplementedError, match="one token"):
        peer.op(Family.SSD, "cuda")
    case = a_case("flashinfer_update", "cuda")
    assert "d_state" in peer.unsupported(case, H100)
    assert peer.unsupported(replace(case, problem=replace(case.problem, d_state=128)), H100) is None
    assert "bf16" in peer.unsupported(replace(case, dtype=DType.FP32), H100)


def test_a_flashinfer_that_cannot_load_what_it_compiles_is_unavailable(monkeypatch):
    installed = {"flashinfer": object()}
    monkeypatch.setattr(availability, "find_spec", installed.get)
    (variant,) = registry.get("flashinfer_update").decode_variants(H100)
    assert variant.unavailable.startswith("tvm_ffi is not installed: pip install flashinfer-python")


# What a peer and the libraries it imports warn of is theirs.
@pytest.mark.filterwarnings("default")
@pytest.mark.gpu
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("pass_", [Pass.FORWARD, Pass.TRAINING])
def test_peers_pass_the_gate(name, pass_):
    from mambench.harness import gate, machine
    from mambench.implementations.workload import build

    peer, device = registry.get(name), machine.detect("cuda")
    for variant in peer.variants(device):
        if variant.unavailable is not None:
            pytest.skip(variant.unavailable)
        case = a_case(name, variant.name, pass_=pass_)
        if peer.unsupported(case, device) is None:
            report = gate.check(build(case, peer, device, seed=0), case, seed=0)
            rounds = variant.name == "fused_chunk" and pass_.needs_grad  # see fla.py
            in_decays = (report.reason or "").startswith(("grad_A", "grad_dt_bias"))
            assert report.passed or (rounds and in_decays), report.reason
