"""What torch.compile is told: nothing is compiled here."""

import pytest
import torch
import torch._dynamo.config as dynamo
import torch._functorch.config as functorch

from mambench.kernels.compiled import compiled


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Record what is asked of torch.compile; options are as before afterwards."""
    calls: dict = {}

    def compile_(function, **options):
        calls.update(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    with functorch.patch(donated_buffer=True), dynamo.patch(recompile_limit=8):
        yield calls


@pytest.mark.parametrize("dynamic", [True, False])
def test_backwards_may_be_repeated_and_lengths_are_many(asked, dynamic):
    assert compiled(torch.sin, dynamic=dynamic) is torch.sin
    assert asked == {"dynamic": dynamic}
    assert functorch.donated_buffer is False
    assert dynamo.recompile_limit >= 64


def test_a_higher_limit_is_kept(asked):
    with dynamo.patch(recompile_limit=1000):
        compiled(torch.sin)
        assert dynamo.recompile_limit == 1000
