"""The Hopper SSD as a differentiable operation: when it makes a graph, and its gradients."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from mambench.kernels.ssd import hopper_op

SHAPE = {"headdim": 64, "d_state": 128, "nheads": 4}
GPU = {
    "one token": {**SHAPE, "seqlen": 1},
    "nothing optional": {
        **SHAPE, "seqlen": 192, "D": 0, "gated": False, "bias": False, "start": False,
    },
    "ragged, groups, D (H, P), segments": {
        **SHAPE, "seqlen": 333, "ngroups": 2, "nheads": 6, "D": 2, "segments": 3, "batch": 2,
    },
    "one segment, no gradient of the final state": {
        **SHAPE, "seqlen": 130, "final": False, "segments": 1,
    },
    "odd heads of groups, padded P and N": {
        "seqlen": 200, "nheads": 3, "ngroups": 3, "headdim": 40, "d_state": 24, "segments": 2,
        "dt_limit": (0.05, 0.3),
    },
    "two blocks of channels, long memory": {
        "seqlen": 450, "nheads": 4, "ngroups": 2, "headdim": 128, "d_state": 64,
        "long_memory": True, "start": False, "segments": 4,
    },
    "as planned": {**SHAPE, "seqlen": 1000, "nheads": 8, "gated": False},
}  # fmt: skip


@pytest.fixture
def recorded(monkeypatch):
    """Replace the kernels by nothing, and record what they are asked for."""
    calls = []

    def run_forward(recording, plan, tensors, *, return_final_states, keep):
        calls.append((plan.nsegments, return_final_states, keep))
        final = torch.zeros(plan.batch, plan.nheads, plan.headdim, plan.d_state)
        return torch.zeros_like(tensors.x), final if return_final_states else None, None

    monkeypatch.setattr(hopper_op, "run_forward", run_forward)
    return calls


def inputs_of(cases, case, device):
    dtype = getattr(torch, case["dtype"])
    return cases.cast(cases.draw(**case), dtype, device)


def test_a_graph_node_is_made_only_for_a_gradient(cases, recorded):
    inputs = inputs_of(cases, {**SHAPE, "seqlen": 300, "dtype": "bfloat16"}, "cpu")
    with torch.no_grad():
        assert hopper_op.ssd(**inputs, chunk_size=64).grad_fn is None
    detached = {name: value.detach() for name, value in inputs.items()}
    assert hopper_op.ssd(**detached, chunk_size=64, segments=5).grad_fn is None
    out, final = hopper_op.ssd(**inputs, chunk_size=64, return_final_states=True, segments=2)
    assert out.requires_grad
    assert final.dtype is torch.float32
    assert recorded[1:] == [(5, False, False), (2, True, True)]


def test_what_is_beyond_it_is_refused(cases, recorded):
    good = {**SHAPE, "seqlen": 10, "dtype": "bfloat16"}
    for change, words in (
        ({"dtype": "float32"}, "float32"),
        ({"headdim": 60}, "headdim 60"),
        ({"d_state": 256}, "d_state 256"),
    ):
        with pytest.raises(ValueError, match=words):
            hopper_op.ssd(**inputs_of(cases, good | change, "cpu"), chunk_size=64)
    inputs = inputs_of(cases, good, "cpu")
    with pytest.raises(ValueError, match="B has shape"):
        hopper_op.ssd(**inputs | {"B": inputs["B"][:, 1:]}, chunk_size=64)
    assert recorded == []


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "bfloat16") for name in GPU), *((name, "float16") for name in list(GPU)[2:5:2])],
)
def test_outputs_and_gradients_agree_with_the_loop_on_the_gpu(cases, name, dtype):
    case = {**GPU[name], "dtype": dtype}
    segments = case.pop("segments", None)
    assert not cases.failures(hopper_op.ssd, case, device="cuda", segments=segments)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
def test_repeated_calls_are_bitwise_equal_on_the_gpu(cases):
    """Also while memory moves about: what is kept between calls must not outlive its address."""
    case = {**SHAPE, "seqlen": 2048, "dtype": "bfloat16", "long_memory": True}
    inputs = {name: value.detach() for name, value in inputs_of(cases, case, "cuda").items()}
    with torch.no_grad():
        first = hopper_op.ssd(**inputs, chunk_size=64, return_final_states=True)
        held = []
        for repeat in range(20):
            moved = {name: value.clone() for name, value in inputs.items()}
            again = hopper_op.ssd(**moved, chunk_size=64, return_final_states=True)
            assert all(map(torch.equal, first, again))
            held.append((moved, again)[repeat % 2])


@pytest.mark.gpu
def test_views_of_one_tensor_are_read_in_place_on_the_gpu(cases):
    case = {**SHAPE, "seqlen": 500, "dtype": "bfloat16", "gated": False}
    inputs = {name: value.detach() for name, value in inputs_of(cases, case, "cuda").items()}
    want = hopper_op.ssd(**inputs, chunk_size=64)
    packed = torch.cat([inputs[name].flatten(2) for name in ("x", "B", "C")], 2)
    x, B, C = packed.split([256, 128, 128], 2)
    views = {"x": x.unflatten(2, (4, 64)), "B": B[:, :, None], "C": C[:, :, None]}
    assert torch.equal(hopper_op.ssd(**inputs | views, chunk_size=64), want)
