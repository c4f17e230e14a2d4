import pytest
import torch

from mambench.kernels.ssd import torch_ssd
from mambench.kernels.ssd.torch_ssd import ssd

FEATURES = [
    {"seqlen": 1},
    {"seqlen": 5, "D": 0, "gated": False, "bias": False, "start": False},
    {"seqlen": 63, "chunk_size": 16, "D": 2},
    {"seqlen": 130, "chunk_size": 64, "nheads": 4, "ngroups": 2, "batch": 2},
    {"seqlen": 130, "chunk_size": 7, "headdim": 5, "d_state": 3, "nheads": 3},
    {"seqlen": 90, "chunk_size": 32, "dt_limit": (0.05, 0.3)},
    {"seqlen": 90, "chunk_size": 32, "dt_softplus": False, "bias": False},
    {"seqlen": 90, "chunk_size": 32, "gated": False, "final": False},
    {"seqlen": 700, "chunk_size": 32, "long_memory": True, "start": False},
    {"seqlen": 150, "chunk_size": 64, "jolt": 70},
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_agrees_with_the_loop(cases, case, dtype):
    assert not cases.failures(ssd, {**case, "dtype": dtype})


def test_chunk_size_does_not_change_the_result(cases):
    case = {"seqlen": 100, "dtype": "float64", "nheads": 4, "ngroups": 2}
    for chunk_size in (1, 3, 64, 256):
        assert not cases.failures(ssd, {**case, "chunk_size": chunk_size})


def test_two_halves_with_the_state_passed_are_the_whole(cases):
    inputs = cases.draw(seqlen=101, nheads=4, ngroups=2, D=2)
    timed = ("x", "dt", "B", "C", "z")
    whole, final = ssd(**inputs, chunk_size=32, dt_softplus=True, return_final_states=True)
    state, parts = inputs.pop("initial_states"), []
    for part in (slice(0, 37), slice(37, 101)):
        given = {k: v[:, part] if k in timed else v for k, v in inputs.items()}
        out, state = ssd(
            **given, chunk_size=32, dt_softplus=True, initial_states=state, return_final_states=True
        )
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_an_operation_that_drops_the_state_between_chunks_is_caught(cases):
    def forgetful(x, dt, A, B, C, chunk_size, z=None, initial_states=None, **keywords):
        pieces = [
            ssd(x[:, t], dt[:, t], A, B[:, t], C[:, t], 64, z=z[:, t], **keywords)
            for t in (slice(0, 96), slice(96, 192))
        ]
        return torch.cat([out for out, _ in pieces], 1), pieces[-1][1]

    case = {"seqlen": 192, "long_memory": True, "start": False}
    assert not cases.failures(ssd, case)
    assert {"out", "grad_x", "grad_B", "grad_C"} <= set(cases.failures(forgetful, case))


def test_gradients_agree_with_finite_differences(cases):
    inputs = cases.draw(seqlen=5, headdim=2, d_state=2, nheads=2, D=2, dtype="float64")
    names = list(inputs)

    def function(*values):
        given = dict(zip(names, values, strict=True))
        return ssd(
            **given, chunk_size=2, dt_softplus=True, dt_limit=(0.01, 1.0), return_final_states=True
        )

    values = [value.requires_grad_() for value in inputs.values()]
    assert torch.autograd.gradcheck(function, values, fast_mode=False)


def test_views_are_read_in_place(cases):
    inputs = cases.draw(seqlen=40, headdim=16, d_state=16, gated=False, start=False, D=0)
    x, B, C = inputs["x"], inputs["B"], inputs["C"]
    packed = torch.cat([x.flatten(2), B.flatten(2), C.flatten(2)], 2)
    x_view, B_view, C_view = packed.split([32, 16, 16], 2)
    views = {"x": x_view.unflatten(2, (2, 16)), "B": B_view[:, :, None], "C": C_view[:, :, None]}
    torch.testing.assert_close(
        ssd(**{**inputs, **views}, chunk_size=16), ssd(**inputs, chunk_size=16)
    )


def test_very_strong_decay_neither_overflows_nor_loses_the_gradient(cases):
    inputs = cases.cast(cases.draw(seqlen=80, D=0, gated=False), torch.float32, "cpu")
    inputs["A"] = torch.tensor([-1e4, -1e-6], requires_grad=True)
    out = ssd(**inputs, chunk_size=64, dt_softplus=True)
    out.square().sum().backward()
    assert all(value.grad.isfinite().all() for value in inputs.values())


def test_same_bits_on_every_run(cases):
    inputs = cases.cast(cases.draw(seqlen=150, nheads=4, ngroups=2, batch=2), torch.float32, "cpu")

    def run():
        out, final = ssd(**inputs, chunk_size=32, dt_softplus=True, return_final_states=True)
        loss = out.square().sum() + final.sum()
        return out, final, *torch.autograd.grad(loss, tuple(inputs.values()))

    first = run()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, run(), strict=True))


def test_without_gradients_no_states_are_kept(cases, monkeypatch):
    kept = []
    forward = torch_ssd._forward
    monkeypatch.setattr(
        torch_ssd, "_forward", lambda *a, **k: kept.append(k["keep"]) or forward(*a, **k)
    )
    inputs = cases.cast(cases.draw(seqlen=4), torch.float32, "cpu")
    with torch.no_grad():
        ssd(**inputs, chunk_size=2)
    ssd(**inputs, chunk_size=2)
    assert kept == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": (1, 8, 3)}, r"dt has shape \(1, 8, 2\), got \(1, 8, 3\)"),
        ({"B": (1, 8, 3, 16)}, "ngroups divides nheads, got 3 groups and 2 heads"),
        ({"D": (2, 5)}, r"D has shape \(2, 16\), got \(2, 5\)"),
        ({"x": (8, 2, 16)}, r"x is \(B, L, H, P\)"),
        ({"x": (1, 0, 2, 16)}, "no size may be 0"),
        ({"initial_states": (1, 2, 16, 4)}, r"initial_states has shape \(1, 2, 16, 16\)"),
    ],
)
def test_wrong_shapes_are_named(cases, change, message):
    inputs = cases.draw(seqlen=8) | {name: torch.zeros(shape) for name, shape in change.items()}
    if "x" not in change and "B" not in change:
        inputs = {k: v.double() for k, v in inputs.items()}
    with pytest.raises(ValueError, match=message):
        ssd(**inputs, chunk_size=4)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"chunk_size": 0}, "chunk_size is at least 1, got 0"),
        ({"chunk_size": 4, "dt_limit": (-1.0, 2.0)}, "dt_limit is 0 <= lowest <= highest"),
        ({"chunk_size": 4, "dt_limit": (2.0, 1.0)}, "dt_limit is 0 <= lowest <= highest"),
    ],
)
def test_wrong_options_are_named(cases, keywords, message):
    with pytest.raises(ValueError, match=message):
        ssd(**cases.draw(seqlen=8), **keywords)


def test_wrong_dtypes_are_named(cases):
    inputs = cases.draw(seqlen=8)
    with pytest.raises(ValueError, match="B has x's dtype"):
        ssd(**{**inputs, "B": inputs["B"].float()}, chunk_size=4)
    with pytest.raises(ValueError, match="x has one of the dtypes"):
        ssd(**{**inputs, "x": inputs["x"].int()}, chunk_size=4)
