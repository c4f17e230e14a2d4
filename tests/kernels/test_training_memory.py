"""What a training step holds and launches: checkpoints instead of states over time, few kernels."""

import importlib

import pytest
import torch

from mambench.kernels.s6 import numba_config
from mambench.kernels.ssd import torch_config

# A training step may launch a third of what mamba_ssm's SSD launches: 5 forward and 36 backward.
MOST_LAUNCHES = (5 + 36) // 3

S6 = {"batch": 2, "d_inner": 32, "d_state": 16, "ngroups": 1}
SSD = {"batch": 2, "nheads": 4, "headdim": 16, "ngroups": 2, "d_state": 32}


def s6_inputs(seqlen, *, batch, d_inner, d_state, ngroups, device="cpu", dtype=torch.float32):
    shared = (batch, ngroups, d_state, seqlen)
    shapes = {
        "u": (batch, d_inner, seqlen), "delta": (batch, d_inner, seqlen), "B": shared, "C": shared,
        "z": (batch, d_inner, seqlen), "A": (d_inner, d_state), "D": (d_inner,),
        "delta_bias": (d_inner,),
    }  # fmt: skip
    return leaves(shapes, device, dtype) | {"delta_softplus": True}


def ssd_inputs(
    seqlen, *, batch, nheads, headdim, ngroups, d_state, device="cpu", dtype=torch.float32
):
    shared, tokens = (batch, seqlen, ngroups, d_state), (batch, seqlen, nheads)
    shapes = {
        "x": (*tokens, headdim), "dt": tokens, "B": shared, "C": shared, "z": (*tokens, headdim),
        "A": (nheads,), "D": (nheads,), "dt_bias": (nheads,),
    }  # fmt: skip
    return leaves(shapes, device, dtype) | {"dt_softplus": True, "chunk_size": 64}


def leaves(shapes, device, dtype):
    made = {}
    for name, shape in shapes.items():
        wide = torch.float32 if name in ("A", "D", "delta_bias", "dt_bias") else dtype
        value = torch.zeros(shape, device=device, dtype=wide)
        made[name] = (value - 0.5 if name == "A" else value).requires_grad_()
    return made


def held_bytes(op, inputs):
    """Return the bytes that a call saves for its backward beside its inputs."""
    given = {t.untyped_storage().data_ptr() for t in inputs.values() if isinstance(t, torch.Tensor)}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = op(**inputs)
    assert out.requires_grad
    return sum(held.values())


@pytest.mark.parametrize("seqlen", [1, 64, 65, 1000, 4096])
def test_the_numba_scan_holds_a_state_every_chunk(seqlen):
    from mambench.kernels.s6.numba_scan import selective_scan

    held = held_bytes(selective_scan, s6_inputs(seqlen, **S6))
    states = S6["batch"] * S6["d_inner"] * S6["d_state"] * 4
    assert held == states * -(-seqlen // numba_config.CHUNK)
    assert held < states * seqlen / 32 or seqlen <= 64


@pytest.mark.parametrize("seqlen", [1, 512, 513, 4096])
def test_the_torch_ssd_holds_a_state_every_few_chunks(seqlen):
    from mambench.kernels.ssd.torch_ssd import ssd

    held = held_bytes(ssd, ssd_inputs(seqlen, **SSD))
    states = SSD["batch"] * SSD["nheads"] * SSD["headdim"] * SSD["d_state"] * 4
    every = torch_config.LARGEST_CHUNK * torch_config.KEEP
    assert held == states * -(-seqlen // every)


def test_states_over_time_are_noticed():
    from mambench.kernels.scan_torch import selective_scan

    seqlen, states = 256, S6["batch"] * S6["d_inner"] * S6["d_state"] * 4
    assert held_bytes(selective_scan, s6_inputs(seqlen, **S6)) > states * seqlen


@pytest.mark.parametrize("d_state", [16, 64, 256])
@pytest.mark.parametrize("variant", ["s6_triton", "s6_hopper"])
def test_what_the_scans_on_a_gpu_keep_is_a_state_now_and_then(variant, d_state):
    """Shapes alone, as the fake kernels give them: 1M tokens of 2048 channels."""
    pytest.importorskip("triton.experimental.gluon")
    module = {"s6_triton": "triton_scan", "s6_hopper": "hopper_op"}[variant]
    importlib.import_module(f"mambench.kernels.s6.{module}")
    seqlen, sizes = 1 << 20, {"batch": 1, "d_inner": 2048, "d_state": d_state, "ngroups": 1}
    given = s6_inputs(seqlen, **sizes, device="meta", dtype=torch.bfloat16)
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    state = (None,) if variant == "s6_triton" else ()
    operator = getattr(torch.ops.mambench, variant).default
    _, _, kept = operator(*(given[name].detach() for name in order), *state, True, True)
    beyond_16 = {"s6_triton": 128, "s6_hopper": 2 * d_state}[variant]
    steps = 64 if d_state <= 16 else beyond_16  # from one to the next
    assert kept.nbytes == 4 * 2048 * d_state * seqlen // steps


@pytest.mark.parametrize("variant", ["ssd_triton", "ssd_hopper"])
def test_what_the_ssd_on_a_gpu_keeps_is_the_segments_states(variant):
    pytest.importorskip("triton.experimental.gluon")
    module = {"ssd_triton": "triton_ssd", "ssd_hopper": "hopper_op"}[variant]
    importlib.import_module(f"mambench.kernels.ssd.{module}")
    sizes = {"batch": 1, "nheads": 32, "headdim": 64, "ngroups": 1, "d_state": 128}
    given = ssd_inputs(1 << 20, **sizes, device="meta", dtype=torch.bfloat16)
    order = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    tensors = (given[name].detach() for name in order)
    limits = (0.0, float("inf"))
    operator = getattr(torch.ops.mambench, variant).default
    for segments in (1, 7):
        absent = (None,) * (2 if variant == "ssd_triton" else 1)
        _, _, kept = operator(*tensors, *absent, True, *limits, segments, True)
        assert kept.nbytes == (4 * 32 * 64 * 128 * segments if segments > 1 else 0)
        tensors = (given[name].detach() for name in order)


OPERATIONS = {
    "s6 triton": ("mambench.kernels.s6.triton_scan", "selective_scan"),
    "s6 hopper": ("mambench.kernels.s6.hopper_op", "selective_scan"),
    "ssd triton": ("mambench.kernels.ssd.triton_ssd", "ssd"),
    "ssd hopper": ("mambench.kernels.ssd.hopper_op", "ssd"),
}


def on_the_gpu(name, seqlen, *, batch=1):
    """Return an operation and its inputs at the sizes that training is measured at, in bf16."""
    module, function = OPERATIONS[name]
    options = {"device": "cuda", "dtype": torch.bfloat16}
    if name.startswith("s6"):
        sizes = {"batch": batch, "d_inner": 2048, "d_state": 16, "ngroups": 1}
        inputs = s6_inputs(seqlen, **sizes, **options)
    else:
        sizes = {"batch": batch, "nheads": 32, "headdim": 64, "ngroups": 1, "d_state": 128}
        inputs = ssd_inputs(seqlen, **sizes, **options)
    return getattr(importlib.import_module(module), function), inputs


def step(op, inputs, grad):
    tensors = [t for t in inputs.values() if isinstance(t, torch.Tensor)]
    torch.autograd.grad(op(**inputs), tensors, grad)


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_training_step_launches_few_kernels(name, batch):
    op, inputs = on_the_gpu(name, 2048, batch=batch)
    grad = torch.ones_like(inputs["u" if name.startswith("s6") else "x"])
    step(op, inputs, grad)
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
    ) as profile:
        step(op, inputs, grad)
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    launched = [event.name for event in profile.events() if event.device_type == device]
    assert 2 <= len(launched) <= MOST_LAUNCHES, launched


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("name", OPERATIONS)
def test_memory_of_a_training_step_does_not_hold_states_over_time(name):
    seqlen = 1 << 15
    op, inputs = on_the_gpu(name, seqlen)
    width = inputs["u"].shape[1] if name.startswith("s6") else 2048
    grad = torch.ones_like(inputs["u" if name.startswith("s6") else "x"])
    step(op, inputs, grad)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(op, inputs, grad)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    d_state = 16 if name.startswith("s6") else 128
    assert extra < 4 * seqlen * width * d_state / 2


@pytest.mark.gpu
@pytest.mark.alone
def test_a_million_tokens_train_on_one_gpu():
    """2048 channels, 16 states, bf16: what the peer's peak memory leaves no room for."""
    total = torch.cuda.get_device_properties(0).total_memory
    if total < 75e9 or torch.cuda.mem_get_info()[0] < 0.9 * total:
        pytest.skip("needs a free GPU of 80 GB")
    for name in ("s6 hopper", "s6 triton"):
        op, inputs = on_the_gpu(name, 1_000_000)
        out = op(**inputs)
        tensors = [t for t in inputs.values() if isinstance(t, torch.Tensor)]
        gradients = torch.autograd.grad(out, tensors, out.detach())
        assert all(g.isfinite().all() for g in gradients[-3:])
        assert torch.cuda.max_memory_allocated() < 80e9
        del op, inputs, out, tensors, gradients
        torch.cuda.empty_cache()
