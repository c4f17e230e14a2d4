"""The notation of axes: what it expands to, and what each slip is answered with."""

import pytest

from mambench.harness.axes import MAX_VALUES, AxisError, parse_axis, parse_values


@pytest.mark.parametrize(
    ("written", "values"),
    [
        (512, (512,)),
        ("512", (512,)),
        ([1, 2], (1, 2)),
        ("1,2,4", (1, 2, 4)),
        ("1, 2 ,4", (1, 2, 4)),
        ("2^9..2^12", (512, 1024, 2048, 4096)),
        ("3^1..3^3", (3, 9, 27)),
        ("2^10", (1024,)),
        ("512..4096:x2", (512, 1024, 2048, 4096)),
        ("100..10000:x10", (100, 1000, 10000)),
        ("16..64:+16", (16, 32, 48, 64)),
        ("2^4..64:+16", (16, 32, 48, 64)),
        ("1,16..32:+16,64", (1, 16, 32, 64)),
        ([1, "2^1..2^2"], (1, 2, 4)),
        ([4, 2, 4, 2], (4, 2)),
        ("7..7:x2", (7,)),
    ],
)
def test_sizes(written: object, values: tuple[int, ...]):
    assert parse_values("seqlen", written) == values


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("", "'' is not a whole number"),
        ("12k", "'12k' is not a whole number"),
        ("1.5", "'1.5' is not a whole number"),
        ("-4", "'-4' is not a whole number"),
        (0, "0 is not a size"),
        (-1, "-1 is not a size"),
        ("0..4:+1", "0 is not a size"),
        (1.5, "expected a whole number or a range"),
        (True, "expected a whole number or a range"),
        (None, "expected a whole number or a range"),
        ([], "no values"),
        ("1,,2", "'' is not a whole number"),
        ("512..131072", "needs a step: 512..131072:x2 doubles, 512..131072:+512 adds 512"),
        ("2^9..1000", "needs a step"),
        ("2^12..2^9", "runs backwards (4096 to 512)"),
        ("512..2048:x1", "never arrives"),
        ("512..2048:+0", "never arrives"),
        ("512..3000:x2", "never reaches 3000; write its last value, 2048"),
        ("16..40:+16", "never reaches 40; write its last value, 32"),
        ("512..2048:*2", "cannot read"),
        ("1..2..3:x2", "cannot read"),
        ("2^99", "too large"),
        (2**70, "is not a size"),
        (f"1..{MAX_VALUES + 2}:+1", f"over {MAX_VALUES} values"),
    ],
)
def test_a_slip_is_named(written: object, says: str):
    with pytest.raises(AxisError) as caught:
        parse_values("seqlen", written)
    assert says in str(caught.value)
    assert str(caught.value).startswith("axis seqlen: ")


@pytest.mark.parametrize(
    ("written", "values"),
    [
        (True, (True,)),
        ("true,false", (True, False)),
        ("no", (False,)),
        ([False, True], (False, True)),
    ],
)
def test_gated_takes_booleans(written: object, values: tuple[bool, ...]):
    parsed = parse_values("gated", written)
    assert parsed == values
    assert all(isinstance(value, bool) for value in parsed)


def test_gated_refuses_a_size():
    with pytest.raises(AxisError, match="'2' is not one of true, false"):
        parse_values("gated", 2)


def test_parse_axis():
    assert parse_axis("seqlen=2^9..2^10") == ("seqlen", (512, 1024))
    assert parse_axis(" d_state = 16") == ("d_state", (16,))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seqln=4", "unknown axis 'seqln'. Did you mean 'seqlen'?"),
        ("dstate=4", "Did you mean 'd_state'?"),
        ("seqlen", "has no values: write NAME=VALUES"),
        ("=4", "unknown axis ''"),
    ],
)
def test_a_misspelt_axis(text: str, says: str):
    with pytest.raises(AxisError) as caught:
        parse_axis(text)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2
