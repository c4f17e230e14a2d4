"""Several sequences in one row: equal to the sequences run one by one, forward and backward."""

import random

import pytest
import torch

from mambench.kernels import recurrence_torch, scan_torch
from mambench.kernels.ssd.torch_ssd import ssd
from mambench.kernels.ssd.varlen import sequence_numbers

CHUNK = 16

# Boundaries at, before and after edges of chunks (of 16 tokens here), and sequences of one token.
LENGTHS = [
    [[16, 16, 8]],
    [[15, 17, 8]],
    [[17, 14, 9]],
    [[1, 1, 38]],
    [[38, 1, 1]],
    [[1] * 40],
    [[3, 2, 4, 31]],
    [[40]],
    [[16, 1, 15, 8], [40], [5, 35]],
]


def case_of(lengths, **changes):
    return {
        "lengths": lengths, "batch": len(lengths), "seqlen": sum(lengths[0]), "nheads": 4,
        "ngroups": 2, "chunk_size": CHUNK, "long_memory": True, **changes,
    }  # fmt: skip


def random_case(seed, *, most=300, odd=False, **changes):
    """Draw sizes and options, and sequences of lengths from 1 to the whole row."""
    draw = random.Random(seed)
    batch, seqlen, ngroups = (
        draw.randint(1, 3),
        draw.randint(20, most) | odd,
        draw.choice([1, 2, 4]),
    )
    rows = []
    for _ in range(batch):
        cuts = sorted(draw.sample(range(1, seqlen), draw.randint(0, min(seqlen - 1, 6))))
        rows.append([b - a for a, b in zip([0, *cuts], [*cuts, seqlen], strict=True)])
    return case_of(
        rows, nheads=ngroups * draw.randint(1, 3), ngroups=ngroups, D=draw.randint(0, 2),
        gated=draw.random() < 0.5, start=draw.random() < 0.5, bias=draw.random() < 0.5,
        final=draw.random() < 0.7, headdim=draw.choice([16, 32]), d_state=draw.choice([16, 64]),
        cumulative=batch == 1 and draw.random() < 0.5, seed=seed,
        **changes,
    )  # fmt: skip


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("changes", [{}, {"gated": False, "D": 2, "start": False}], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda rows: str(rows)[:30])
def test_sequences_are_as_if_alone(cases, lengths, changes):
    assert not cases.failures(ssd, {**case_of(lengths, dtype="float64"), **changes})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes(cases, dtype):
    assert not cases.failures(ssd, case_of(LENGTHS[-1], dtype=dtype))


def test_cumulative_lengths_mean_the_same(cases):
    assert not cases.failures(ssd, case_of([[7, 16, 17]], dtype="float64", cumulative=True))


def test_tokens_are_numbered_by_their_sequences():
    x = torch.zeros(1, 6, 1, 1)
    by_ends = sequence_numbers(x, None, torch.tensor([0, 2, 2, 6]), check=True)
    by_changes = sequence_numbers(x, torch.tensor([[4, 4, 1, 1, 4, 4]]), None, check=True)
    assert by_ends.tolist() == [[0, 0, 2, 2, 2, 2]]  # the second one is empty
    assert by_changes.tolist() == [[0, 0, 1, 1, 2, 2]]


@pytest.mark.parametrize("op", [recurrence_torch, scan_torch], ids=lambda op: op.__name__)
def test_the_plain_implementations_reset_too(cases, op):
    given = case_of(LENGTHS[-1], dtype="float64")
    assert not cases.failures(op.state_space_dual, given)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", range(12))
def test_random_sequences(cases, seed):
    assert not cases.failures(ssd, random_case(seed, most=150, dtype="float64"))


def test_a_loud_sequence_leaves_no_rounding_in_a_quiet_one(cases):
    """All in one chunk: the gradient of dt of a quiet one is as accurate as where it is alone."""
    inputs = cases.cast(cases.draw(seqlen=30, long_memory=True, start=False), torch.float32, "cpu")
    inputs = {name: value.detach() for name, value in inputs.items()}
    inputs["x"][:, 10:20] *= 1e6
    timed = ("x", "dt", "B", "C", "z")

    def gradient(span, seq_idx):
        part = {k: v[:, span] if k in timed else v for k, v in inputs.items()}
        part["dt"] = part["dt"].clone().requires_grad_()
        ssd(**part, chunk_size=64, dt_softplus=True, seq_idx=seq_idx).square().sum().backward()
        return part["dt"].grad

    together = gradient(slice(0, 30), torch.arange(30)[None] // 10)
    for first in (0, 20):
        span = slice(first, first + 10)
        error = cases.relative_error(together[:, span], gradient(span, None).double())
        assert error < cases.tolerance("float32")


def test_a_boundary_that_is_forgotten_is_noticed(cases):
    def forgetful(seq_idx, **given):
        seq_idx = seq_idx.clone()
        seq_idx[:, CHUNK:] = seq_idx[:, CHUNK - 1 : CHUNK]  # as if only the first chunk had any
        return ssd(**given, seq_idx=seq_idx)

    wrong = cases.failures(forgetful, case_of([[16, 24]], dtype="float64"))
    assert {"out", "grad_x", "grad_dt", "grad_B", "grad_C", "grad_initial_states"} <= set(wrong)
    assert {"out", "grad_x"} <= set(cases.failures(forgetful, case_of([[3, 29, 8]])))


def test_gradients_agree_with_finite_differences(cases):
    inputs = cases.draw(seqlen=6, headdim=2, d_state=2, nheads=2, D=2, dtype="float64")
    names, seq_idx = list(inputs), torch.tensor([[0, 0, 1, 2, 2, 2]])

    def function(*values):
        given = dict(zip(names, values, strict=True))
        return ssd(
            **given, chunk_size=2, dt_softplus=True, return_final_states=True, seq_idx=seq_idx
        )

    values = [value.requires_grad_() for value in inputs.values()]
    assert torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seq_idx": torch.zeros(1, 7, dtype=torch.int32)}, r"seq_idx: expected shape \(1, 8\)"),
        ({"seq_idx": torch.zeros(1, 8)}, "seq_idx: expected integers on cpu, got torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"cu_seqlens: expected 0 to 8, ascending"),
        ({"cu_seqlens": torch.tensor([0, 9, 8])}, r"cu_seqlens: expected 0 to 8, ascending"),
        ({"cu_seqlens": torch.tensor([[0, 8]])}, r"expected shape \(sequences \+ 1,\)"),
        (
            {"cu_seqlens": torch.tensor([0, 8]), "seq_idx": torch.zeros(1, 8, dtype=torch.int32)},
            "seq_idx or cu_seqlens, got both",
        ),
    ],
)
def test_wrong_sequences_are_refused(cases, given, message):
    with pytest.raises(ValueError, match=message):
        ssd(**cases.draw(seqlen=8), chunk_size=4, **given)


def triton_op():
    pytest.importorskip("triton")
    from mambench.kernels.ssd.triton_ssd import ssd as op

    return op


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("segments", [1, 3])
def test_sequences_are_as_if_alone_on_the_gpu(cases, dtype, segments):
    chunk = 16 if dtype == "float32" else 64  # of the kernels
    for lengths in LENGTHS:
        rows = [[*row[:-1], row[-1] + 4 * chunk] for row in lengths]
        rows += [[2 * chunk - 1, 1, sum(rows[0]) - 2 * chunk]]
        rows += [[2 * chunk, 1, sum(rows[0]) - 2 * chunk - 1]]
        given = case_of(rows, dtype=dtype, headdim=64, d_state=128)
        assert not cases.failures(triton_op(), given, device="cuda", segments=segments), rows


# On a GPU: each form is compiled for; the sequences are free.
FORMS = (
    {"dtype": "bfloat16", "headdim": 32, "d_state": 64, "nheads": 4, "ngroups": 2, "D": 1,
     "gated": True, "start": True, "bias": True, "final": True},
    {"dtype": "float16", "headdim": 16, "d_state": 16, "nheads": 3, "ngroups": 1, "D": 2,
     "gated": False, "start": True, "bias": False, "final": True},
    {"dtype": "float32", "headdim": 32, "d_state": 16, "nheads": 4, "ngroups": 4, "D": 0,
     "gated": True, "start": False, "bias": True, "final": False},
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
def test_random_sequences_on_the_gpu(cases):
    wrong = {}
    for seed in range(60):
        given = {**random_case(seed, odd=True), **FORMS[seed % len(FORMS)]}
        segments = (None, 1, 5)[seed // len(FORMS) % 3]
        found = cases.failures(triton_op(), given, device="cuda", segments=segments)
        if found:
            wrong[seed] = (given["lengths"], given["dtype"], segments, found)
    assert not wrong
