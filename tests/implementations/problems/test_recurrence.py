import pytest
import torch

from mambench.implementations.problems.recurrence import by_doubling, by_rows, solve


@pytest.mark.parametrize("solver", [by_rows, by_doubling])
@pytest.mark.parametrize("seqlen", [1, 2, 31, 32, 33, 64, 1025])
def test_solvers_equal_the_recurrence(solver, seqlen, assert_close):
    decay, x = torch.rand(2, 3, seqlen, 2).double(), torch.randn(2, 3, seqlen, 2).double()
    kept = decay.clone(), x.clone()
    expected = x.clone()
    for t in range(1, seqlen):
        expected[..., t, :] = decay[..., t, :] * expected[..., t - 1, :] + x[..., t, :]
    assert_close(solver(decay, x), expected, 1e-14)
    assert torch.equal(decay, kept[0])
    assert torch.equal(x, kept[1])


@pytest.mark.parametrize("solver", [by_rows, by_doubling])
def test_adjoint_is_the_derivative(solver):
    decay = torch.rand(2, 40, 2).double().requires_grad_()
    x = torch.randn(2, 40, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: solve(a, b, solver), (decay, x))
