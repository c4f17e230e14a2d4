"""docs/ci.md as a new user follows it: a repository of their own, measured for real.

Slow (`-m slow`): a check is some thirty processes that each import torch.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "tests/gate_example"
# Five times the work: much less would be found, but this test must also pass on a machine that is
# busy with others.
SLOWER = "return sdpa(q, k, v, is_causal=True).transpose(1, 2)"
PLANTED = "[sdpa(q, k, v, is_causal=True) for _ in range(4)]\n    " + SLOWER


def git(root: Path, *arguments: str) -> None:
    command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "fastmix"
    shutil.copytree(EXAMPLE, root, ignore=shutil.ignore_patterns("__pycache__"))
    git(root, "init", "-q", "-b", "main")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "Begin")
    return root


def run(root: Path, *options: str) -> tuple[int, dict[str, object], Path]:
    output = root.parent / "check"
    command = [
        *(sys.executable, str(ROOT / "run_bench.py"), "check", "--base", "main"),
        *("--suite", "gate.yaml", "--plugin", "bench_plugin.py", "--device", "cpu"),
        *("--rounds", "3", "--confirm-rounds", "3", "--target-time", "0.05"),
        *("--store", str(root.parent / "store"), "-o", str(output), *options),
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GITHUB_")}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    assert (output / "check.json").is_file(), done.stderr
    return done.returncode, json.loads((output / "check.json").read_text()), output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_planted_slowdown_in_a_users_repository_is_found(repository: Path):
    path = repository / "fastmix.py"
    text = path.read_text()
    assert SLOWER in text
    path.write_text(text.replace(SLOWER, PLANTED))
    code, found, output = run(repository)
    points = found["points"]
    assert isinstance(points, list)
    assert code == 1, found["conclusion"]
    worst = points[0]
    assert worst["verdict"] == "regressed"
    assert "fastmix:sdpa" in worst["name"]
    assert "--plugin" in (worst["command"] or "--plugin")
    assert "REGRESSED" in (output / "junit.xml").read_text().upper()
    assert "🔴" in (output / "summary.md").read_text()
    assert (output / "head/results.jsonl").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_unchanged_code_never_regresses(repository: Path):
    code, found, _ = run(repository)
    assert code in (0, 3), found["conclusion"]
    counts = found["counts"]
    assert isinstance(counts, dict)
    assert counts["regressed"] == 0


BUDGET = re.compile(r"--time-budget \d+m")


def steps() -> list[tuple[str, str]]:
    """Return the job and the command of each step of the document's whole workflow."""
    text = (ROOT / "docs/ci.md").read_text(encoding="utf-8")
    found = [
        yaml.safe_load(b) for b in re.findall(r"```yaml\n(.*?)```", text, re.S) if "jobs:" in b
    ]
    jobs = found[-1]["jobs"]
    return [(name, step["run"]) for name in jobs for step in jobs[name]["steps"] if "run" in step]


@pytest.fixture
def pull_request(repository: Path) -> Path:
    """Return a clone as a runner has it: a branch, with main known as origin/main only."""
    clone = repository.parent / "clone"
    git(repository.parent, "clone", "-q", str(repository), str(clone))
    git(clone, "checkout", "-q", "-b", "faster")
    git(clone, "branch", "-q", "-D", "main")
    kernel = clone / "centre.py"
    text = kernel.read_text()
    assert "    mean =" in text
    kernel.write_text(text.replace("    mean =", "    tl.debug_barrier()\n    mean ="))
    git(clone, "commit", "-q", "-a", "-m", "Wait where nothing waits for")
    return clone


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_workflow_of_the_document_step_by_step(pull_request: Path, tmp_path: Path):
    """All steps of both jobs as they are written; only what installs is left out."""
    program = tmp_path / "bin/mambench"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "run_bench.py"}" "$@"\n')
    program.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GITHUB_")}
    environment |= {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "GITHUB_ACTIONS": "true"}
    environment |= {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
    codes: dict[str, int] = {}
    said: dict[str, str] = {}
    for job, written in steps():
        checkout = tmp_path / job  # each job has its own
        if not checkout.exists():
            shutil.copytree(pull_request, checkout)
        if written == "pip install mambench":
            continue
        command = BUDGET.sub("--time-budget 2m", written.replace("${{ github.base_ref }}", "main"))
        done = subprocess.run(
            ["bash", "-e", "-c", command],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
        )
        what = f"{job} {'static' if '--static' in written else written.split()[1]}"
        codes[what], said[what] = done.returncode, done.stdout + done.stderr
    assert list(codes) == [
        "static-and-cpu static",
        "static-and-cpu check",
        "gpu check",
        "gpu history",
    ]
    # The barrier is exact; nothing else has changed, and a busy machine may not see that.
    assert codes["static-and-cpu static"] == 1, said
    assert "::error title=REGRESSED::" in said["static-and-cpu static"]
    assert codes["static-and-cpu check"] in (0, 3), said["static-and-cpu check"]
    assert codes["gpu check"] in (0, 3), said["gpu check"]
    assert codes["gpu history"] == 0, said["gpu history"]
    assert (tmp_path / "summary.md").read_text().count("## ") == 3
    assert list((tmp_path / "gpu/history").iterdir())
