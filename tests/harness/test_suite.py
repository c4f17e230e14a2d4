"""Reading suites: what a file becomes, and where each error is said to be."""

from pathlib import Path

import pytest

from mambench.harness import suite
from mambench.harness.errors import SuiteError, UsageError
from mambench.harness.spec import DeviceKind, DType, Family, Level, Pass

GOOD = """\
title: Two scans
question: Which is faster?
settings: {target_s: 0.5, max_samples: 20}
sweeps:
  - implementations: [ssd, "flash_attention:*"]
    families: [ssd, attention]
    passes: {cpu: forward, cuda: [forward, training]}
    dtype: {cuda: bf16}
    axes:
      seqlen: {cpu: 128, cuda: "2^9..2^10"}
      d_state: {s6: 16, ssd: {cpu: 32, cuda: [64, 128]}}
      headdim: 64
      gated: [true, false]
  - implementations: naive_recurrence
    level: block
    passes: [backward]
    dtype: fp32
    axes: {seqlen: 64, d_model: 128}
"""
PATH = Path("some/two-scans.yaml")


def parse(text: str) -> suite.Suite:
    return suite.parse(text, PATH)


def test_a_file_becomes_a_suite():
    found = parse(GOOD)
    assert (found.name, found.title, found.question) == (
        "two-scans",
        "Two scans",
        "Which is faster?",
    )
    assert found.settings == {"target_s": 0.5, "max_samples": 20}
    first, second = found.sweeps
    assert first.implementations == ("ssd", "flash_attention:*")
    assert first.families == (Family.SSD, Family.ATTENTION)
    assert first.level is Level.OP
    assert first.passes[DeviceKind.CPU] == (Pass.FORWARD,)
    assert first.passes[DeviceKind.CUDA] == (Pass.FORWARD, Pass.TRAINING)
    assert first.dtypes == {DeviceKind.CUDA: (DType.BF16,)}
    assert second.level is Level.BLOCK
    assert second.implementations == ("naive_recurrence",)
    assert second.dtypes[DeviceKind.CPU] == second.dtypes[DeviceKind.CUDA] == (DType.FP32,)


def test_axes_differ_by_device_and_family():
    axes = parse(GOOD).sweeps[0].axes
    cpu, cuda = DeviceKind.CPU, DeviceKind.CUDA
    assert axes["seqlen"].resolve(cpu, Family.S6) == (128,)
    assert axes["seqlen"].resolve(cuda, Family.ATTENTION) == (512, 1024)
    assert axes["d_state"].resolve(cpu, Family.S6) == (16,)
    assert axes["d_state"].resolve(cpu, Family.SSD) == (32,)
    assert axes["d_state"].resolve(cuda, Family.SSD) == (64, 128)
    assert axes["d_state"].resolve(cuda, Family.ATTENTION) == ()
    assert axes["headdim"].resolve(cpu, Family.SSD) == (64,)
    assert axes["gated"].resolve(cpu, Family.SSD) == (True, False)


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("title: Two scans", "titel: Two scans", 1, "titel: unknown field 'titel'. Did you mean"),
        ("title: Two scans", "title: 3", 1, "title: expected text, got 3"),
        ("target_s: 0.5", "target: 0.5", 3, "settings.target: unknown field 'target'. Did you"),
        ("target_s: 0.5", "target_s: fast", 3, "settings.target_s: setting target_s: expected a"),
        ("max_samples: 20", "max_samples: 2.5", 3, "expected a whole number above 0, got 2.5"),
        ("target_s: 0.5", "target_s: 0", 3, "expected a number above 0, got 0"),
        ("target_s: 0.5", "target_s: .inf", 3, "expected a number above 0, got inf"),
        ("[ssd, attention]", "[ssd, attn]", 6, "sweeps[0].families[1]: unknown family 'attn'."),
        ("cuda: [forward, training]", "cuda: [forward, train]", 7, "Did you mean 'training'?"),
        ("{cuda: bf16}", "{cuda: bf61}", 8, "sweeps[0].dtype.cuda: unknown dtype 'bf61'. Did"),
        ("{cuda: bf16}", "{gpu: bf16}", 8, "sweeps[0].dtype: unknown key 'gpu'"),
        ("seqlen: {cpu", "seqln: {cpu", 10, "sweeps[0].axes.seqln: unknown field 'seqln'. Did"),
        ("2^9..2^10", "2^10..2^9", 10, "sweeps[0].axes.seqlen.cuda: axis seqlen: the range"),
        ("{s6: 16, ssd", "{cpu: 16, ssd", 11, "mixes devices and families"),
        ("headdim: 64", "headdim: wide", 12, "sweeps[0].axes.headdim: axis headdim: 'wide' is"),
        ("headdim: 64", "headdim: []", 12, "sweeps[0].axes.headdim: is an empty list"),
        ("headdim: 64", "headdim: {}", 12, "sweeps[0].axes.headdim: is an empty mapping"),
        ("[true, false]", "[true, 3]", 13, "sweeps[0].axes.gated[1]: axis gated: '3' is not"),
        ("      headdim: 64", "      seqlen: 64", 12, "sweeps[0].axes.seqlen: is given twice"),
        ("      headdim: 64", "      d_model: 64", 12, "axes.d_model: does not apply to level op"),
        ("level: block", "level: blok", 15, "sweeps[1].level: unknown level 'blok'. Did you mean"),
        ("passes: [backward]", "passes: []", 16, "sweeps[1].passes: is an empty list"),
        ("{seqlen: 64, d_model", "{d_model", 18, "sweeps[1].axes: lacks the field 'seqlen'"),
        ("d_model: 128}", "d_inner: 128}", 18, "axes.d_inner: does not apply to level block"),
        ("    dtype: fp32\n", "", 14, "sweeps[1]: lacks the field 'dtype'"),
        ("axes: {seqlen: 64, d_model: 128}", "axes: 3", 18, "axes: expected a mapping, got '3'"),
    ],
)
def test_an_error_names_file_line_and_field(old: str, new: str, line: int, says: str):
    assert GOOD.count(old) == 1
    with pytest.raises(SuiteError) as caught:
        parse(GOOD.replace(old, new))
    assert str(caught.value).startswith(f"{PATH}:{line}: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("a: [1", "two-scans.yaml:1: not YAML"),
        ("a: b\nc: d: e", "two-scans.yaml:2: not YAML"),
        ("- 1", "two-scans.yaml:1: the file: expected a mapping, got a list"),
        ("title: x", "the file: lacks the field 'sweeps'"),
        ("title: x\nsweeps: []", "two-scans.yaml:2: sweeps: has no sweep"),
        ("title: x\x00", "not YAML"),
    ],
)
def test_what_is_not_a_suite(text: str, says: str):
    with pytest.raises(SuiteError) as caught:
        parse(text)
    assert says in str(caught.value)


def test_yaml_tags_execute_nothing():
    with pytest.raises(SuiteError):
        parse("title: !!python/object/apply:os.getcwd []\nsweeps: []")


def test_find(tmp_path: Path):
    assert suite.find("quick").name == "quick"
    with pytest.raises(UsageError, match=r"unknown suite 'quik'\. Did you mean 'quick'"):
        suite.find("quik")
    with pytest.raises(SuiteError, match="cannot be read"):
        suite.find(str(tmp_path / "absent.yaml"))
    (tmp_path / "two-scans.yaml").write_text(GOOD)
    assert suite.find(str(tmp_path / "two-scans.yaml")) == parse(GOOD)


def test_a_file_that_is_not_text(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SuiteError, match="cannot be read"):
        suite.read(path)


@pytest.mark.parametrize("name", suite.names())
def test_every_suite_that_comes_along_is_valid(name: str):
    found = suite.find(name)
    assert found.question.endswith(("?", "."))


@pytest.mark.parametrize(
    ("text", "value"), [("0.25", 0.25), ("7", 7), ("7.0", None), ("x", None), ("-1", None)]
)
def test_a_setting_of_the_command_line(text: str, value: object):
    if value is None:
        with pytest.raises(UsageError, match="min_samples"):
            suite.parse_setting("min_samples", text)
    else:
        name = "min_samples" if isinstance(value, int) else "relative_error"
        assert suite.parse_setting(name, text) == value


def test_an_unknown_setting():
    with pytest.raises(UsageError, match="Did you mean 'min_samples'"):
        suite.parse_setting("min_sample", "3")
