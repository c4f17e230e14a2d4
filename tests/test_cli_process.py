"""The command line as a process: where its output goes, and a Python that lacks what it needs."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("env", "error: cannot write: No space left on device.\n"),
        ("report {run} -f csv -o /dev/full", "error: cannot write: No space left on device.\n"),
        ("report {run} -f csv -o {run}/there/x.csv", "/there/x.csv: No such file or directory.\n"),
        ("report {run} -f csv -o {run}", "run: Is a directory.\n"),
    ],
)
def test_what_cannot_be_written_is_no_traceback(tmp_path: Path, arguments: str, says: str):
    run = tmp_path / "run"
    shutil.copytree(ROOT / "published" / "cpu-machines", run)
    words = shlex.split(arguments.format(run=run))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(ROOT / "run_bench.py"), *words],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 5
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_is_no_traceback():
    command = [sys.executable, str(ROOT / "run_bench.py"), "list"]
    script = f"{shlex.join(command)} | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.parametrize("module", ["click", "psutil"])
def test_a_python_without_the_dependencies_is_told_how_to_get_them(module):
    script = (
        "import runpy, sys\n"
        "sys.modules[sys.argv[1]] = None  # as if it were not installed\n"
        "sys.argv[:] = ['run_bench.py', 'plan', '-s', 'quick', '--device', 'cpu']\n"
        f"runpy.run_path({str(ROOT / 'run_bench.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, module], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {module} is not installed for this Python")
    assert "Traceback" not in done.stderr
