"""Filters of the command line: comparisons, globs, text, and what they are answered with."""

import pytest

from mambench.harness.errors import UsageError
from mambench.harness.filters import compile_filter
from mambench.harness.spec import Case, DType, Family, Pass, Problem

SSD = Case(
    implementation="ssd",
    variant="triton",
    problem=Problem(
        family=Family.SSD, batch=1, seqlen=4096, d_inner=256, d_state=64, headdim=64, ngroups=1
    ),
    pass_=Pass.FORWARD,
    dtype=DType.BF16,
)
ATTENTION = Case(
    implementation="flash_attention",
    variant="sdpa-flash",
    problem=Problem(family=Family.ATTENTION, batch=1, seqlen=512, d_inner=256, headdim=64),
    pass_=Pass.TRAINING,
    dtype=DType.BF16,
)


@pytest.mark.parametrize(
    ("text", "ssd", "attention"),
    [
        ("seqlen>=4096", True, False),
        ("seqlen > 4096", False, False),
        ("seqlen<4096", False, True),
        ("seqlen<=2^9", False, True),
        ("seqlen=512", False, True),
        ("seqlen==512,4096", True, True),
        ("seqlen!=512", True, False),
        ("d_state>=128", False, True),  # attention has none and stays, as the reference
        ("gated=true", False, False),
        ("gated=false", True, True),
        ("family=ssd", True, False),
        ("family=s*", True, False),
        ("level=op", True, True),
        ("pass!=training", True, False),
        ("implementation=flash*", False, True),
        ("variant=sdpa-*", False, True),
        ("variant!=sdpa-*", True, False),
        ("SSD:TRI", True, False),
        ("L=512", False, True),
        ("N>=64", True, True),
        ("D<256", False, False),
        ("no such text", False, False),
    ],
)
def test_what_a_filter_keeps(text: str, ssd: bool, attention: bool):
    keep = compile_filter(text)
    assert (keep(SSD), keep(ATTENTION)) == (ssd, attention)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "an empty filter"),
        ("seqln>=4", "unknown name 'seqln'. Did you mean 'seqlen'?"),
        ("seqlen>=long", "'long' is not a whole number"),
        ("seqlen>=1,2", "'>=' compares with one value"),
        ("variant>=fa", "variant can only be compared with = and !="),
        ("dtype=bf17", "unknown dtype 'bf17'. Did you mean 'bf16'?"),
        ("family=attn", "unknown family 'attn'"),
    ],
)
def test_a_wrong_filter(text: str, says: str):
    with pytest.raises(UsageError) as caught:
        compile_filter(text)
    assert says in str(caught.value)
