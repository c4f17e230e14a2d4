"""The command line: wiring, messages, exit codes, and commands that ask a case again."""

import functools
import json
import runpy
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mambench.harness import machine, plan, registry, reproduce, runner, suite
from mambench.harness.cli import begin
from mambench.harness.errors import DeviceBusyError, UsageError
from mambench.harness.profilers import catalog
from mambench.harness.records import Observation, observation_id
from mambench.harness.spec import Case, Device, DeviceKind, Outcome
from mambench.harness.store import RunFolder

ROOT = Path(__file__).resolve().parent.parent
GIB = 1024**3
CPU = Device(kind=DeviceKind.CPU, name="a processor", memory_bytes=16 * GIB)
GPU = Device(kind=DeviceKind.CUDA, name="a GPU", compute_capability=(9, 0), memory_bytes=80 * GIB)
DEVICES = {"cpu": CPU, "cuda:0": GPU}


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    path = list(sys.path)
    try:
        return runpy.run_path(str(ROOT / "run_bench.py"))
    finally:
        sys.path[:] = path


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Plan for a processor unless asked otherwise, in an empty working directory."""
    detect = machine.detect

    def planted(name: str | None = None) -> Device:
        return CPU if name is None else DEVICES.get(name) or detect(name)

    monkeypatch.setattr(machine, "detect", planted)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def call(
    program: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def run(*arguments: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["run_bench.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            program["main"]()
        captured = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code, out=captured.out, err=captured.err)

    return run


VALUES = {"time_s": 0.00125, "peak_memory_bytes": 2048}


def fake_run(outcome: Outcome, *, interrupted: bool = False):
    """Return a runner that gives every runnable case one outcome."""

    def run(made: plan.Plan, folder: RunFolder, **options: Any) -> runner.RunSummary:
        left = [p.case for p in made.runnable]
        options["listener"].on_plan(len(made.cases), len(left))
        for case in left:
            identity = observation_id(
                case, measurement="time", round=0, code_version="c", device="d", settings={}
            )
            observation = Observation(
                case=case,
                measurement="time",
                outcome=outcome,
                reason=None if outcome is Outcome.OK else "planted",
                observation_id=identity,
                started_at="2026-01-01T00:00:00+00:00",
                duration_s=0.5,
                method="planted",
                values={"time_s": 0.00125, "peak_memory_bytes": 2048}
                if outcome is Outcome.OK
                else {},
                samples_s=(0.00125, 0.0013),
                details={"gate": "passed"},
            )
            folder.append(observation)
            options["listener"].on_case_end(case, [observation])
        return runner.RunSummary(counts={outcome: len(left)}, interrupted=interrupted, wall_s=1.5)

    return run


ONE = ("run", "-s", "custom", "-i", "flash_attention", "-a", "seqlen=128", "--filter", "level=op")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("paln", "unknown command 'paln'. Did you mean 'plan'?"),
        ("plan -s quik", "unknown suite 'quik'. Did you mean 'quick'?"),
        ("plan -s absent.yaml", "absent.yaml: cannot be read: No such file or directory\n"),
        ("plan -i flash_atention", "Did you mean 'flash_attention'?"),
        ("plan -i flash_attention:sdpaflash", "Did you mean 'sdpa-flash'?"),
        ("plan -a seqln=4", "unknown axis 'seqln'. Did you mean 'seqlen'?"),
        ("plan -a seqlen=2^9..", "axis seqlen: cannot read '2^9..'"),
        ("plan --dtype bf61", "unknown dtype 'bf61'. Did you mean 'bf16'?"),
        ("plan --pass foward", "unknown pass 'foward'. Did you mean 'forward'?"),
        ("plan --device cdua", "unknown device 'cdua'. Did you mean 'cuda'?"),
        ("plan --filter seqln>3", "Did you mean 'seqlen'?"),
        ("plan --filter nothing-has-this", "no case of suite 'quick' passes the filter"),
        ("plan --set min_sample=3", "Did you mean 'min_samples'?"),
        ("plan --time-budget soon", "'soon' is not a duration; write 90, 90s, 5m or 1h30m"),
        (
            "plan --threads 0",
            "error: Invalid value for '--threads': 0 is not in the range",
        ),
        ("plan --suit quick", "'--suite'"),
        ("compare a", "error: Missing argument 'RUN_B'. See `"),
        ("plan --plugin ./absent.py", "absent.py' is not a file"),
        ("plan -a", "error: Option '-a' requires an argument.\n"),
        ("plan extra", "extra"),
        ("run --retry-failed", "--retry-failed goes with --resume"),
        ("run --resume here -s quick", "leave out --suite"),
        ("run --resume here -i ssd", "leave out --implementation"),
        ("run --resume here --set min_samples=3", "leave out --set"),
        ("run --resume here -o there", "leave out --output"),
        ("show 1", "there is no run in runs/"),
        ("completion powershell", "unknown shell 'powershell'. Valid: bash, fish, zsh."),
    ],
)
def test_a_mistake_is_answered_without_a_traceback(call: Any, arguments: str, says: str):
    done = call(*shlex.split(arguments))
    assert done.code == 2
    assert says in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    assert not Path("runs").exists()


def test_a_suite_file_with_an_error(call: Any, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("title: T\nsweeps:\n  - implementation: ssd\n")
    done = call("plan", "-s", "mine.yaml")
    assert done.code == 2
    assert "mine.yaml:3: sweeps[0].implementation: unknown field 'implementation'" in done.err


@pytest.mark.parametrize("command", ["run --resume", "show 1 --run", "report"])
def test_a_folder_that_is_no_run_is_refused_untouched(call: Any, tmp_path: Path, command: str):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    done = call(*command.split(), "folder")
    assert done.code == 3
    assert "is not a run" in done.err
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["mine.txt"]


def test_calibration_is_asked_for_as_a_suite_too(call: Any, monkeypatch: pytest.MonkeyPatch):
    from mambench.harness.instruments import ceilings

    asked: list[tuple[str, int]] = []
    found = SimpleNamespace(text=lambda: "copy 1 TB/s", to_dict=dict)
    monkeypatch.setattr(
        ceilings, "measure", lambda d, count: asked.append((d.name, count)) or found
    )
    monkeypatch.setattr(ceilings, "save", lambda found, device: None)
    done = call("run", "--suite", "calibration", "--threads", "1")
    assert (done.code, asked) == (0, [(CPU.name, 1)])
    assert "copy 1 TB/s" in done.out
    assert "calibration" in call("list").out


def test_list_shows_everything(call: Any):
    done = call("list", "--device", "cpu")
    assert done.code == 0
    for word in (
        "naive_recurrence",
        "flash_attention",
        "sdpa-math",
        "unavailable",
        "quick",
        "time_s",
    ):
        assert word in done.out


def test_plan_as_text_and_as_json(call: Any):
    text = call("plan", "-s", "scan-vs-attention", "--device", "cuda:0")
    assert text.code == 0
    made = plan.Plan.from_dict(
        json.loads(call("plan", "-s", "scan-vs-attention", "--device", "cuda:0", "--json").out)
    )
    assert made.device == GPU
    for planned in made.cases:
        assert planned.case.case_id in text.out
    assert f"{len(made.cases)} cases" in text.out


def test_plan_with_a_budget_says_what_is_left_out(call: Any):
    done = call("plan", "-s", "scan-vs-attention", "--time-budget", "3s")
    assert "skipped: time budget of 3 s" in done.out
    assert "note: the time budget of 3 s leaves out" in done.out


def test_a_run_writes_a_manifest_and_names_its_folder(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runner, "run", fake_run(Outcome.OK))
    done = call(*ONE, "-o", "mine", "--no-report", "--target-time", "2s", "--threads", "1")
    assert done.code == 0, done.err
    assert f"results: {tmp_path / 'mine'}" in done.out
    assert "1 ok in 1.5 s" in done.out
    assert "[1/1] ok" in done.err
    manifest = json.loads((tmp_path / "mine" / "manifest.json").read_text())
    assert manifest["settings"]["target_s"] == 2
    assert manifest["settings"]["threads"] == 1
    assert manifest["command"][-2:] == ["--threads", "1"]
    assert manifest["environment"]["python"]
    assert manifest["code"]["id"]
    assert plan.Plan.from_dict(manifest).plan_hash == manifest["plan_hash"]
    again = call(*ONE, "-o", "mine")
    assert again.code == 3
    assert "exists and is not empty" in again.err


@pytest.mark.parametrize(
    ("outcome", "interrupted", "code"),
    [
        (Outcome.OK, False, 0),
        (Outcome.SKIPPED, False, 0),
        (Outcome.UNSUPPORTED, False, 0),
        (Outcome.WRONG, False, 1),
        (Outcome.CRASHED, False, 1),
        (Outcome.OK, True, 130),
    ],
)
def test_exit_codes_of_a_run(
    call: Any, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, interrupted: bool, code: int
):
    monkeypatch.setattr(runner, "run", fake_run(outcome, interrupted=interrupted))
    assert call(*ONE, "--no-report").code == code


def test_a_busy_device(call: Any, monkeypatch: pytest.MonkeyPatch):
    def busy(*_: Any, **__: Any):
        raise DeviceBusyError("another run holds it")

    monkeypatch.setattr(runner, "run", busy)
    done = call(*ONE)
    assert done.code == 4
    assert "another run holds it" in done.err
    assert list(Path("runs").iterdir()) == []  # a run that never began leaves no folder


def test_ctrl_c_while_planning(call: Any, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: Any, **__: Any):
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "make_plan", interrupt)
    done = call("plan")
    assert done.code == 130
    assert "Traceback" not in done.err


def test_the_report_is_named_last(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mambench import reports

    def build(folders: list[Path], output: Path) -> Path:
        output.write_text(f"report of {len(folders)}")
        return output

    monkeypatch.setattr(runner, "run", fake_run(Outcome.OK))
    monkeypatch.setattr(reports, "build", build)
    done = call(*ONE, "-o", "mine", "-q")
    assert done.out.splitlines()[-1] == f"report: {tmp_path / 'mine' / 'report.html'}"
    assert "\x1b" not in done.out  # a link only on a terminal
    assert done.err == ""
    done = call("report", "mine", "mine", "-o", "both.html")
    assert (tmp_path / "both.html").read_text() == "report of 2"
    assert done.out == f"report: {tmp_path / 'both.html'}\n"


def test_resume_takes_the_runs_own_plan(call: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner, "run", fake_run(Outcome.OK))
    assert call(*ONE, "-o", "mine", "--no-report", "--seed", "5").code == 0
    seen: list[tuple[plan.Plan, dict[str, Any]]] = []

    def again(made: plan.Plan, folder: RunFolder, **options: Any) -> runner.RunSummary:
        seen.append((made, options))
        return runner.RunSummary(counts={}, interrupted=False, wall_s=0)

    monkeypatch.setattr(runner, "run", again)
    done = call("run", "--resume", "mine", "--retry-failed", "--time-budget", "5m", "--no-report")
    assert done.code == 0, done.err
    ((made, options),) = seen
    assert made.settings.seed == 5
    assert options["retry_failed"] is True
    assert options["time_budget_s"] == 300
    assert "resumed" not in RunFolder.open(Path("mine")).manifest  # the same code and machine
    monkeypatch.setattr(machine, "code_version", lambda: {"id": "other"})
    assert call("run", "--resume", "mine", "--no-report").code == 0
    (entry,) = RunFolder.open(Path("mine")).manifest["resumed"]
    assert entry["code"] == "other"
    monkeypatch.setitem(DEVICES, "cpu", replace(CPU, name="another processor"))
    done = call("run", "--resume", "mine")
    assert done.code == 2
    assert "the run was made on a processor, this machine has another processor" in done.err


def test_show_tells_everything_about_a_case(call: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner, "run", fake_run(Outcome.OK))
    assert call(*ONE, "-o", "runs/mine", "--no-report").code == 0
    by_number = call("show", "1")
    assert by_number.code == 0, by_number.err
    for word in ("flash_attention, variant sdpa-", "1.25 ms", "2.0 KiB (2,048 bytes)", "passed"):
        assert word in by_number.out
    case_id = plan.Plan.from_dict(RunFolder.open(Path("runs/mine")).manifest).cases[0].case.case_id
    assert call("show", case_id[:6]).out == by_number.out
    assert call("show", "zzz").code == 2


def test_a_case_is_found_by_number_or_prefix():
    made = plan.make_plan(suite.find("quick"), CPU)
    first = made.cases[0]
    assert reproduce.find_case(made, "1") == (1, first)
    assert reproduce.find_case(made, str(len(made.cases)))[1] is made.cases[-1]
    for number, planned in enumerate(made.cases, start=1):
        assert reproduce.find_case(made, planned.case.case_id) == (number, planned)
    with pytest.raises(UsageError, match=r"begins \d+ case_ids"):
        reproduce.find_case(made, "")
    with pytest.raises(UsageError, match=f"from 1 to {len(made.cases)}"):
        reproduce.find_case(made, "0000000000001")


def one_of_a_kind(cases: list[Case]) -> list[Case]:
    """Return cases with every variant in every pass and dtype, and of every size but the length."""
    seen: set[Any] = set()
    found: list[Case] = []
    for case in cases:
        asked = (case.implementation, case.variant, case.pass_, case.dtype)
        size = replace(case.problem, seqlen=1)
        new = {(size.family, size.level, *asked), size} - seen
        if new:
            seen |= new
            found.append(case)
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", suite.names())
def test_the_printed_command_asks_exactly_that_case(
    program: dict[str, Any], name: str, device: str, monkeypatch: pytest.MonkeyPatch
):
    for module, function in ((suite, "find"), (registry, "load"), (catalog, "load")):
        # What each of hundreds of commands would read again.
        monkeypatch.setattr(module, function, functools.cache(getattr(module, function)))
    # The widths of `coverage` suit one family each, so that no other can join its sweeps.
    picks = None if name == "coverage" else ["*:*"]
    made = plan.make_plan(suite.find(name), DEVICES[device], implementations=picks)
    for case in one_of_a_kind([p.case for p in made.cases]):
        words = shlex.split(reproduce.command(case, made, program=["python", "run_bench.py"]))
        assert words[:3] == ["python", "run_bench.py", "run"]
        context = program["run"].make_context("run", words[3:])
        asked = {
            key: value
            for key, value in context.params.items()
            if key not in ("resume", "retry_failed", "output", "no_report", "wait", "quiet")
        }
        again = begin.plan_of(asked)
        assert [p.case for p in again.cases] == [case]
        assert again.settings == made.settings
        assert again.device == made.device


def test_the_command_carries_settings_and_plugins():
    made = plan.make_plan(
        suite.find("custom"),
        CPU,
        implementations=["flash_attention"],
        settings={"threads": 1, "min_samples": 7, "time_limit_s": 9.5},
    )
    made = replace(made, plugins=("/a b/plugin.py",))
    words = shlex.split(reproduce.command(made.cases[0].case, made, program=["mambench"]))
    for option, value in (
        ("--threads", "1"),
        ("--set", "min_samples=7"),
        ("--time-limit", "9.5"),
        ("--plugin", "/a b/plugin.py"),
    ):
        assert words[words.index(option) + 1] == value


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(call: Any, shell: str):
    done = call("completion", shell)
    assert done.code == 0
    assert "_RUN_BENCH_PY_COMPLETE" in done.out


def test_measurements_are_named_on_the_command_line(call: Any):
    done = call("plan", "--json", "-m", "time,memory", "--measure", "energy")
    settings = json.loads(done.out)["settings"]
    assert settings["measurements"] == ["time", "memory", "energy"]
    assert "of which to measure: time " in call("plan", "-m", "time").out
    wrong = call("plan", "-m", "time,enrgy")
    assert wrong.code == 2
    assert "unknown measurement 'enrgy'. Did you mean 'energy'?" in wrong.err
    listed = call("list")
    assert "cold_time  " in listed.out
    assert "[unavailable: launches is measured on cuda only]" in listed.out


def test_help_of_every_command_fits_its_line(call: Any):
    done = call("--help")
    listed = done.out.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert len(listed) == 15
    assert not [line for line in listed if line.endswith("...")]
    for line in listed:
        name = line.split()[0]
        assert f" {name} [OPTIONS]" in call(name, "--help").out.splitlines()[0]
