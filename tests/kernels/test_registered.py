"""Our operations under torch.compile, torch.func and checkpointing, as in eager calls."""

import sys
from pathlib import Path

import pytest
import torch

from mambench.kernels import registered

SCRIPT = Path(__file__).with_name("traced_cases.py")
CPU = ("s6_numba", "ssd_torch")
GPU = ("s6_triton", "s6_hopper", "ssd_triton", "ssd_hopper")
WAYS = ("torch.compile", "torch.func.grad", "torch.func.vjp", "torch.func.vmap", "checkpoint")

# PyTorch's own, while it compiles.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


@pytest.fixture(scope="module")
def cases(load_script):
    return load_script(SCRIPT)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", CPU)
def test_gradients_have_the_bits_of_an_eager_call(cases, variant, way):
    call = cases.draw(variant, varied=cases.VARIANTS[variant][2])
    assert cases.same(cases.WAYS[way](call), call.gradients())


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("variant", CPU)
def test_operators_keep_what_they_declare(cases, variant, bare):
    # Without what is optional: a module compiles so for lengths that vary, below.
    checks = cases.CHECKS[:3] if bare else cases.CHECKS
    assert not cases.by_opcheck(cases.draw(variant, bare=bare), checks)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s6_triton:bare", "ssd_triton:varied"])
def test_kernels_of_the_interpreter_keep_what_they_declare(interpret, name):
    assert interpret(SCRIPT, name) == {name: {}}


@pytest.mark.parametrize("variant", CPU)
def test_a_module_compiles_whole_for_lengths_that_vary(cases, variant):
    class Layer(torch.nn.Module):
        def __init__(self, call):
            super().__init__()
            self.call = call
            self.scale = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, *tensors):
            out, _ = self.call(tensors[0] * self.scale, *tensors[1:])
            return torch.tanh(out)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for seqlen in (40, 57, 33, 90):
        call = cases.draw(variant, seqlen=seqlen, bare=True)
        layer = Layer(call)
        compiled = torch.compile(Layer.forward, fullgraph=True, backend=counter, dynamic=True)
        got, want = compiled(layer, *call.tensors), layer(*call.tensors)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        for value in (got, want):
            value.sum().backward()
        assert layer.scale.grad.isfinite()
    assert counter.frame_count <= 2


@pytest.mark.parametrize("variant", CPU)
def test_an_eager_call_takes_the_short_way(cases, variant, monkeypatch):
    call = cases.draw(variant)
    module = sys.modules[cases.VARIANTS[variant][0]]
    monkeypatch.setattr(module, "_traced", None)
    assert len(call.gradients()) == len(call.tensors)
    with torch.no_grad():
        call(*call.tensors)
    with pytest.raises(TypeError, match="NoneType"):
        cases.by_transform(call)


@pytest.mark.parametrize("variant", CPU)
def test_checkpointing_runs_the_forward_again_and_holds_less(cases, variant, monkeypatch):
    call = cases.draw(variant, seqlen=100)
    module = sys.modules[cases.VARIANTS[variant][0]]
    forward, runs, held = module._forward, [], []
    monkeypatch.setattr(module, "_forward", lambda *a, **k: runs.append(1) or forward(*a, **k))

    def pack(tensor):
        held.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call.gradients()
    plain = sum(held)
    assert len(runs) == 1
    held.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        cases.by_checkpoint(call)
    assert len(runs) == 3
    assert sum(held) < plain


@pytest.mark.parametrize("variant", CPU)
def test_vmap_maps_any_axis_and_is_differentiated(cases, variant):
    # An ensemble: the weights are mapped, the first input is not.
    call = cases.draw(variant, varied=cases.VARIANTS[variant][2])
    first, *rest = call.tensors
    rows = [[t, 0.9 * t, 1.1 * t] for t in rest]
    mapped = [torch.stack(row, dim=-1).requires_grad_() for row in rows]
    ensemble = torch.func.vmap(call.loss, in_dims=(None, *(-1 for _ in rest)))
    got = torch.autograd.grad(ensemble(first, *mapped).sum(), mapped)
    for i in range(3):
        leaves = [row[i].detach().requires_grad_() for row in rows]
        want = torch.autograd.grad(call.loss(first, *leaves), leaves)
        assert cases.same([gradient[..., i] for gradient in got], want)


@pytest.mark.parametrize("variant", CPU)
def test_a_jacobian_has_a_row_for_each_result(cases, variant):
    call = cases.draw(variant, seqlen=3)
    names = call.names.index("A")

    def outputs(A):
        return call(*call.tensors[:names], A, *call.tensors[names + 1 :])[0]

    A = call.tensors[names].detach().requires_grad_()
    out, jacobian = outputs(A), torch.func.jacrev(outputs)(A.detach())
    assert jacobian.shape == (*out.shape, *A.shape)
    rows = jacobian.flatten(0, out.ndim - 1)
    for i in range(0, out.numel(), 37):
        (want,) = torch.autograd.grad(out.flatten()[i], A, retain_graph=True)
        torch.testing.assert_close(rows[i], want)
    assert rows.abs().sum() > 0


@pytest.mark.parametrize("variant", CPU)
def test_what_is_not_served_raises(cases, variant):
    call = cases.draw(variant, bare=True)
    twice = torch.func.grad(lambda t: torch.func.grad(call.loss)(t, *call.tensors[1:]).sum())
    with pytest.raises(RuntimeError, match="expected to be differentiated once"):
        twice(call.tensors[0])
    leaves = [t.detach().requires_grad_() for t in call.tensors]
    first = torch.autograd.grad(call.loss(*leaves), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[0].sum().backward()


def test_a_backward_s_results_are_differentiated_no_more():
    modes = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @registered.differentiated_once
        def backward(ctx, grad):
            modes.append(torch.is_grad_enabled())
            return 2 * ctx.saved_tensors[0] * grad

    x = torch.tensor([3.0], requires_grad=True)
    (first,) = torch.autograd.grad(Square.apply(x) ** 2, x)
    (again,) = torch.autograd.grad(Square.apply(x) ** 2, x, create_graph=True)
    assert (first, again) == (108, 108)
    assert modes == [False, False]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        again.backward()


def planted(name, **changes):
    """Register y = 2 x, s = sum of x, with a fault."""
    parts = {
        "forward": lambda t, o, keep: (2 * t[0], t[0].sum()[None], t[0].new_empty(0)),
        "shapes": lambda t, o, keep: tuple(t[0].new_empty(n) for n in (t[0].shape[0], 1, 0)),
        "backward": lambda g, s, kept, t, o: [torch.ones_like(t[0])],
    }  # fmt: skip
    operation = registered.Operation(
        name=name, tensors=("Tensor x",), options=(), **parts | changes
    )
    registered.register(operation)
    return getattr(torch.ops.mambench, name).default


def test_a_wrong_declaration_is_noticed():
    x = torch.randn(5, requires_grad=True)
    torch.library.opcheck(planted("planted_right"), (x, True))
    short = planted(
        "planted_short",
        shapes=lambda t, o, keep: tuple(t[0].new_empty(n) for n in (4, 1, 0)),
    )
    with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError):
        torch.library.opcheck(short, (x, True))


def test_a_gradient_without_what_it_needs_is_refused():
    x = torch.randn(5, requires_grad=True)
    with pytest.raises(RuntimeError, match="expected keep=True"):
        planted("planted_unkept")(x, False)


def test_gradients_that_share_memory_are_copied():
    both = torch.arange(6.0).view(2, 3)
    apart = registered._separate([both[0], both[1]])
    assert apart[0].data_ptr() == both.data_ptr()
    assert torch.equal(apart[1], both[1])
    assert apart[1].untyped_storage().data_ptr() != both.untyped_storage().data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", GPU)
def test_gradients_have_the_bits_of_an_eager_call_on_the_gpu(cases, variant, way):
    varied = cases.VARIANTS[variant][2]
    call = cases.draw(variant, device="cuda", dtype=torch.bfloat16, seqlen=300, varied=varied)
    assert cases.same(cases.WAYS[way](call), call.gradients())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.parametrize("variant", ["s6_hopper", "ssd_hopper"])
def test_inductor_takes_them_on_the_gpu(cases, variant):
    call = cases.draw(variant, device="cuda", dtype=torch.bfloat16, seqlen=300)
    got = cases.by_compiler(call, backend="inductor")
    for name, a, b in zip(call.names, got, call.gradients(), strict=True):
        # The compiler may round the loss's gradient elsewhere.
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error < 2e-2, name


@pytest.mark.gpu
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("variant", GPU)
def test_operators_keep_what_they_declare_on_the_gpu(cases, variant, bare):
    call = cases.draw(variant, device="cuda", dtype=torch.bfloat16, seqlen=300, bare=bare)
    assert not cases.by_opcheck(call)
