"""Fused blocks: against the plain ones in the interpreter and on a GPU, and when they run."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mambench.harness.spec import Family
from mambench.implementations.blocks import fused
from mambench.implementations.blocks.fused import JointGradient, runs_fused
from mambench.implementations.blocks.problem import (
    _Bindable,
    _skeleton,
    _tables,
    block_family,
)

SCRIPT = Path(__file__).with_name("fused_cases.py")
QUICK = Path(__file__).parents[2] / "kernels" / "quick_interpreter.py"


def _cases():
    spec = importlib.util.spec_from_file_location("fused_cases", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = _cases()


def test_fused_blocks_are_the_plain_ones_in_the_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, QUICK, SCRIPT],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}


def test_a_joint_gradient_takes_what_lies_in_place_and_copies_the_rest():
    joint, like = JointGradient((2, 3, 1)), torch.zeros(2, 4, 6)
    first = joint.columns(0, like)
    first.fill_(1.0)
    made = joint.joined((first, torch.full((2, 4, 3), 2.0), None), like)
    assert made.is_contiguous()
    assert made.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    assert made[0, 0].tolist() == [1, 1, 2, 2, 2, 0]
    again = joint.joined((torch.full((2, 4, 2), 3.0), None, None), like)
    assert again.untyped_storage().data_ptr() != made.untyped_storage().data_ptr()
    assert again[1, 3].tolist() == [3, 3, 0, 0, 0, 0]


def test_a_gradient_that_something_was_added_to_is_not_taken_for_what_lies_in_place():
    joint, like = JointGradient((2, 2)), torch.zeros(1, 1, 4)
    place = joint.columns(1, like)
    place.fill_(1.0)
    made = joint.joined((None, place + 1.0), like)
    assert made.flatten().tolist() == [0, 0, 2, 2]


def test_only_a_gpu_runs_fused_unless_told(monkeypatch):
    assert not runs_fused(torch.zeros(1, 1, 1), None)
    assert runs_fused(torch.zeros(1, 1, 1), True)
    monkeypatch.setattr(fused, "_supported", lambda device: True)
    gpu = torch.zeros(1, 1, 1, device="meta").as_subclass(_Claimed)
    assert runs_fused(gpu, None)
    assert not runs_fused(gpu, False)
    assert not runs_fused(gpu.double(), None)
    assert runs_fused(gpu.expand(1, 1, 1 << 14), None)
    assert not runs_fused(gpu.expand(1, 1, (1 << 14) + 1), None)
    monkeypatch.setattr(fused, "_traced", lambda: True)
    assert not runs_fused(gpu, None)


class _Claimed(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def mixer_of(family):
    """The operation that a block is measured around on a GPU."""
    if family is Family.S6:
        from mambench.kernels.s6.triton_scan import selective_scan

        return selective_scan
    if family is Family.SSD:
        from mambench.kernels.ssd.triton_ssd import ssd

        return ssd
    from mambench.implementations.ops.flash_attention import FlashAttention

    return FlashAttention().op(family, "sdpa-flash")


# A backward that begins with a product, on autograd's thread.
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")
@pytest.mark.gpu
@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize(("batch", "seqlen"), [(1, 700), (2, 333), (5, 64), (8, 128)])
def test_fused_blocks_are_the_plain_ones_on_a_gpu(family, batch, seqlen):
    problem = CASES.make_problem(family, batch=batch, seqlen=seqlen, d_model=128)
    mixer = mixer_of(family)
    assert CASES.wrong(problem, mixer, device="cuda", dtype=torch.bfloat16, allowed=2.5) == {}


class _Mixer(torch.autograd.Function):
    """Stands for a mixer: dense results and gradients, and no operation that is seen."""

    @staticmethod
    def forward(ctx, like, *tensors):
        ctx.shapes = [None if t is None else t.shape for t in tensors]
        return like.new_empty(like.shape)

    @staticmethod
    def backward(ctx, grad):
        return None, *(None if shape is None else grad.new_empty(shape) for shape in ctx.shapes)


def dense_mixer(*tensors, **named):
    """Take what any family's mixer takes."""
    given = [t for t in (*tensors, *named.values()) if isinstance(t, torch.Tensor)]
    return _Mixer.apply(given[0].detach(), *given)


class _Large(TorchDispatchMode):
    """Lists the operations that write at least as much as an activation, beside products."""

    PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_")
    NO_WORK = ("empty", "new_empty", "empty_like", "detach", "alias")

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        views = func._schema.returns and any(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        )
        large = isinstance(out, torch.Tensor) and out.numel() >= self.size
        if large and not views and name not in (*self.PRODUCTS, *self.NO_WORK):
            self.found.append(name)
        return out


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", Family)
def test_a_training_step_launches_only_kernels_and_products_on_what_is_large(
    family, batch, monkeypatch
):
    """The launches are left out: what is judged is what torch does between them."""
    pytest.importorskip("triton")
    from mambench.kernels.prepared import Recording

    monkeypatch.setattr(Recording, "launch", lambda recording, *_, **__: recording.refuse())
    problem = CASES.make_problem(family, batch=batch, seqlen=64, d_model=32)
    judge = block_family(problem)
    inputs = judge.make_inputs(problem, dtype=torch.float32, device="cpu", seed=0)
    names, found = judge.differentiable(problem), {}
    leaves = {name: v.requires_grad_(name in names) for name, v in inputs.items()}
    for form in (True, False):
        stack = _Bindable(_skeleton(problem, dense_mixer, torch.float32, fused=form)).bind(leaves)
        grad = torch.zeros_like(leaves["x"])
        with _Large(batch * 64 * 32) as seen:
            y = stack(leaves["x"], *_tables(leaves))
            torch.autograd.grad(y, [leaves[name] for name in names], grad)
        found[form] = seen.found
    assert found[True] == []
    assert len(found[False]) > 20  # the plain form is seen to do much
