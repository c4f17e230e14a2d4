"""The rotation and the gated product, in Triton's interpreter and on a GPU."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def interpreted(interpret):
    return interpret(Path(__file__).with_name("elementwise_cases.py"))


def test_both_agree_with_float64_in_the_interpreter(interpreted):
    assert interpreted["wrong"] == {}


def test_every_planted_fault_is_noticed(interpreted):
    assert interpreted["unnoticed"] == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_agree_with_float64_on_a_gpu(cases, dtype):
    assert cases.wrong("cuda", (dtype,)) == {}
    assert cases.rotation("cuda", dtype, seqlen=300, nheads=16, headdim=128) == {}
    assert cases.product("cuda", dtype, rows=333, width=5440) == {}
