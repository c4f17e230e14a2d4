"""docs/ci.md is what works: its files are the example's, its commands exist, its steps are run."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "tests" / "gate_example"
DOCUMENT = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", DOCUMENT, re.S)


def without_comments(text: str) -> str:
    """Leave out docstrings and comments, which the document says in prose."""
    text = re.sub(r'^[ ]*""".*?"""\n?', "", text, flags=re.S | re.M)
    lines = [re.sub(r"\s*#.*", "", line).rstrip() for line in text.splitlines()]
    return "\n".join(line for line in lines if line.strip())


@pytest.mark.parametrize("number", [i for i, (kind, _) in enumerate(BLOCKS) if kind == "python"])
def test_python_in_the_document_is_a_file_of_the_example(number):
    files = [without_comments(path.read_text()) for path in EXAMPLE.glob("*.py")]
    assert without_comments(BLOCKS[number][1]) in files


def commands() -> list[str]:
    """Return every command line of the document, continued lines joined."""
    joined = DOCUMENT.replace("\\\n", " ")
    found = re.findall(r"^\s*(?:- run: )?(mambench [a-z].*)$", joined, re.M)
    return list(dict.fromkeys(line.split("  #")[0].strip() for line in found))


@pytest.fixture(scope="module")
def program():
    """Return the command line's root command."""
    code = (ROOT / "run_bench.py").read_text()
    scope = {"__name__": "run_bench", "__file__": str(ROOT / "run_bench.py")}
    exec(compile(code, str(ROOT / "run_bench.py"), "exec"), scope)
    return scope["cli"]


@pytest.mark.parametrize("line", commands())
def test_every_command_exists_with_its_options(program, line):
    words = shlex.split(re.sub(r"\$\{\{.*?\}\}", "x", line))[1:]
    command = program
    while isinstance(command, click.Group):
        name = words.pop(0)
        command = command.commands[name]
    command.make_context("mambench", words)  # parses, runs nothing


def test_an_option_that_is_not_there_is_noticed(program):
    with pytest.raises(click.NoSuchOption):
        program.commands["check"].make_context("mambench", ["--statik"])


def test_the_commands_are_found():
    assert len(commands()) >= 9
    assert sum("--static" in line for line in commands()) >= 2


def test_the_workflows_are_yaml_with_jobs_and_steps():
    found = [yaml.safe_load(text) for kind, text in BLOCKS if kind == "yaml" and "jobs:" in text]
    assert len(found) == 2
    for workflow in found:
        for job in workflow["jobs"].values():
            assert job["runs-on"]
            assert all("uses" in step or "run" in step for step in job["steps"])
            assert job["steps"][0]["with"] == {"fetch-depth": 0}


def test_budgets_of_the_document_and_of_the_example_are_valid(tmp_path):
    from mambench.harness.check import budgets

    (text,) = [text for kind, text in BLOCKS if text.startswith("budgets:")]
    path = tmp_path / "budgets.yaml"
    path.write_text(text)
    assert len(budgets.read(path)) == 2
    assert len(budgets.read(EXAMPLE / "budgets.yaml")) == 1


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """Return a user's repository with the example's files."""
    root = tmp_path_factory.mktemp("user") / "repository"
    shutil.copytree(EXAMPLE, root, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.example"]
    for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "Begin"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    return root


def call(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GITHUB_")}
    environment["PYTHONPATH"] = str(root)  # as if the user's package were installed
    return subprocess.run(
        [sys.executable, str(ROOT / "run_bench.py"), *words],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_the_static_step_catches_a_barrier_and_passes_what_is_unchanged(repository, tmp_path):
    pytest.importorskip("triton")
    step = (
        *("check", "--static", "--base", "main", "--inventory", "kernel_inventory.py"),
        *("--static-cache", str(tmp_path / "cache"), "-o", str(tmp_path / "static")),
    )
    done = call(repository, *step)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kernels have the same machine code on both sides." in done.stdout
    kernel = repository / "centre.py"
    text = kernel.read_text()
    kernel.write_text(text.replace("    mean =", "    tl.debug_barrier()\n    mean ="))
    done = call(repository, *step)
    kernel.write_text(text)
    assert done.returncode == 1
    # The base came from the cache.
    assert "Compiled 2 kernels of the head and 0 of the base" in done.stdout
    assert "REGRESSED  centre bf16 / _centre sm_80 [barriers]" in done.stdout
    again = re.findall(r"reproduce: \S+ \S+ (check .*)", done.stdout)
    assert again == [
        "check --static --base main --head worktree --inventory kernel_inventory.py "
        f"--entries 'centre bf16' --arch {architecture}"
        for architecture in (80, 90)
    ]
    kept = json.loads((tmp_path / "static" / "static.json").read_text())
    assert (kept["compiled"], len(kept["kernels"])) == (2, 2)
    assert "barriers" in (tmp_path / "static" / "summary.md").read_text()
    figures = json.loads((tmp_path / "static" / "check.json").read_text())
    assert {p["metric"] for p in figures["points"] if p["verdict"] == "regressed"} == {"barriers"}


def test_a_run_is_held_to_the_budget_and_added_to_the_history(repository, tmp_path):
    run = str(tmp_path / "run")
    done = call(
        repository, "run", "-s", "gate.yaml", "--plugin", "bench_plugin.py", "--device", "cpu",
        "--target-time", "0.02", "--no-report", "-o", run,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    done = call(repository, "check", "--budgets", "budgets.yaml", "--run", run)
    assert (done.returncode, "1 same" in done.stdout) == (0, True), done.stdout + done.stderr
    broken = repository / "broken.yaml"
    broken.write_text((EXAMPLE / "budgets.yaml").read_text().replace("1.0e9", "1.0"))
    done = call(repository, "check", "--budgets", "broken.yaml", "--run", run)
    assert done.returncode == 1
    assert "promised at most 1" in done.stdout
    store = str(tmp_path / "history")
    assert call(repository, "history", "add", run, "--store", store).returncode == 0
    assert "1 run, now" in call(repository, "history", "show", "--store", store).stdout


@pytest.mark.parametrize(
    ("static", "timing", "code"),
    [(0, 0, 0), (1, 0, 1), (4, 0, 1), (0, 1, 1), (0, 3, 0), (0, 4, 0), (0, 124, 0)],
)
def test_our_own_gate_fails_for_what_regressed_alone(tmp_path, static, timing, code):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.example"]
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / "kernels").mkdir()
    subprocess.run([*git, "init", "-q"], check=True)
    for text in ("one", "two"):
        (tmp_path / "kernels" / "k.py").write_text(text)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", text], check=True)
    stands_for_python = tmp_path / "python"
    stands_for_python.write_text(
        f'#!/bin/sh\ncase "$*" in *--static*) exit {static};; esac\nexit {timing}\n'
    )
    stands_for_python.chmod(0o755)
    command = [str(tmp_path / ".ci" / "gate"), str(stands_for_python)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("no verdict" in done.stdout) is (timing in (3, 4, 124))
    assert ("stopped after" in done.stdout) is (timing == 124)
    assert ("nothing has regressed" in done.stdout) is (code == 0)
    shallow = {**os.environ, "GATE_BASE": "HEAD~9"}
    done = subprocess.run(command, capture_output=True, text=True, env=shallow)
    assert (done.returncode, "nothing to compare" in done.stdout) == (0, True)
