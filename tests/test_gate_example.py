"""docs/ci.md as a new user follows it: a repository of their own, measured for real.

Slow (`-m slow`): a check is some thirty processes that each import torch.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
