"""Both sides of a check in a real git repository."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from mambench.harness.check import side_plan, sides
from mambench.harness.check.sides import Side, Wanted
from mambench.harness.errors import MeasurementError, UsageError
from mambench.harness.workers.pool import Code

ROOT = Path(__file__).resolve().parents[3]


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    root.mkdir()
    git(root, "init", "-q", "-b", "main")
    (root / "bench.py").write_text("one\n")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "one")
    (root / "bench.py").write_text("two\n")
    git(root, "commit", "-q", "-a", "-m", "two")
    (root / "bench.py").write_text("three\n")
    return root


def prepared(wanted: Wanted, folder: Path):
    folder.mkdir()
    return sides.prepared(wanted, folder, lambda text: None)


def test_each_side_has_its_own_files_and_nothing_is_left(repository: Path, tmp_path: Path):
    wanted = Wanted(repository=repository, base="HEAD~1", plugins=(str(repository / "bench.py"),))
    with prepared(wanted, tmp_path / "t") as (base, head):
        assert Path(base.plugins[0]).read_text() == "one\n"
        assert Path(head.plugins[0]).read_text() == "three\n"
        assert base.version["commit"] == git(repository, "rev-parse", "HEAD~1").strip()
        assert (base.version["dirty"], head.version["dirty"]) == (False, True)
        assert base.version["id"] != head.version["id"]
        assert base.code.path == (str(base.root),)
        root = base.root
    assert not root.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_a_side_is_removed_when_the_job_is_cancelled(repository: Path, tmp_path: Path):
    before = signal.getsignal(signal.SIGTERM)

    def cancelled() -> None:
        wanted = Wanted(repository=repository, base="HEAD~1")
        with prepared(wanted, tmp_path / "t") as (base, _):
            assert base.root.exists()
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as raised:
        cancelled()
    assert raised.value.code == 143
    assert not (tmp_path / "t/base").exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_side_is_removed_when_something_fails(repository: Path, tmp_path: Path):
    wanted = Wanted(repository=repository, base="HEAD~1", build="echo broken; exit 3")
    with (
        pytest.raises(MeasurementError, match="building the base failed with status 3") as raised,
        prepared(wanted, tmp_path / "t"),
    ):
        pass
    assert "broken" in str(raised.value)
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_a_build_runs_on_each_side_and_may_differ_for_the_base(repository: Path, tmp_path: Path):
    wanted = Wanted(
        repository=repository,
        base="HEAD~1",
        head="HEAD",
        build='cp bench.py "$MAMBENCH_SIDE".txt',
        build_base="echo other > base.txt",
        path=("lib",),
    )
    with prepared(wanted, tmp_path / "t") as (base, head):
        assert (base.root / "base.txt").read_text() == "other\n"
        assert (head.root / "head.txt").read_text() == "two\n"
        assert head.code.path == (str(head.root / "lib"),)


def test_what_a_build_leaves_is_no_change_of_the_code(repository: Path, tmp_path: Path):
    wanted = Wanted(repository=repository, base="main", head="main~1", build="touch built")
    with prepared(wanted, tmp_path / "t") as both:
        assert all((one.root / "built").exists() for one in both)
        assert [one.version["dirty"] for one in both] == [False, False]


def test_a_commit_that_is_not_there(repository: Path, tmp_path: Path):
    wanted = Wanted(repository=repository, base="no-such-branch")
    with (
        pytest.raises(UsageError, match=r"no commit 'no-such-branch'.*fetch-depth"),
        prepared(wanted, tmp_path / "t"),
    ):
        pass


def test_folders_need_no_git(tmp_path: Path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "bench.py").write_text(name)
    base = str(tmp_path / "old")
    repository = sides.find_repository(tmp_path / "new", base, sides.WORKTREE)
    plugin = str(tmp_path / "new/bench.py")
    wanted = Wanted(repository=repository, base=base, plugins=(plugin,))
    with prepared(wanted, tmp_path / "t") as both:
        assert [Path(side.plugins[0]).read_text() for side in both] == ["old", "new"]
        assert [side.version["commit"] for side in both] == [None, None]
    assert (tmp_path / "old/bench.py").is_file()


def test_outside_of_a_repository(tmp_path: Path):
    with pytest.raises(UsageError, match=r"is in no git repository.*name two folders"):
        sides.find_repository(tmp_path, "main", "worktree")


def copied(tmp_path: Path) -> Path:
    """Return another checkout: its implementations and kernels, whose ssd has another variant."""
    root = tmp_path / "other"
    for name in ("implementations", "kernels"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = root / "implementations/ops/ssd.py"
    text = path.read_text()
    assert '"torch"' in text
    path.write_text(text.replace('"torch"', '"planted"'))
    return root


ASKED = {
    "suite": "gate-cpu",
    "device": "cpu",
    "implementations": ("ssd",),
    "axes": ("seqlen=64",),
    "filters": (),
    "settings": (),
    **dict.fromkeys(("dtype", "pass_", "target_s", "time_limit_s", "seed", "threads")),
}


def test_a_side_is_planned_with_its_own_code_by_this_harness(tmp_path: Path):
    def side(name: str, root: Path | None) -> Side:
        return Side(name=name, ref=name, root=tmp_path, code=Code(root=root))

    ours = side_plan.ask(side("head", None), ASKED)
    theirs = side_plan.ask(side("base", copied(tmp_path)), ASKED)
    assert {p.case.variant for p in ours.runnable} == {"torch"}
    assert {p.case.variant for p in theirs.runnable} == {"planted"}
    assert ours.settings.min_samples == side_plan.SAMPLING["min_samples"]


def test_what_a_side_does_not_have_is_said_with_its_name(tmp_path: Path):
    side = Side(name="base", ref="main", root=tmp_path, code=Code())
    with pytest.raises(UsageError, match="the base: unknown implementation 'no_such'"):
        side_plan.ask(side, {**ASKED, "implementations": ("no_such",)})


PLUGIN = """
from mambench.harness.spec import Family
from mambench.implementations.base import Implementation, Variant
import fastmix

class FastMix(Implementation):
    name = "fastmix"
    families = (Family.ATTENTION,)
    summary = "of a user's repository"

    def variants(self, device):
        return (Variant(name=fastmix.VARIANT),)

    def op(self, family, variant):
        return fastmix.attention
"""


def test_another_repository_supplies_its_plugin_and_what_it_imports(
    repository: Path, tmp_path: Path
):
    def write(variant: str) -> None:
        (repository / "src/fastmix").mkdir(parents=True, exist_ok=True)
        (repository / "src/fastmix/__init__.py").write_text(f"VARIANT = '{variant}'\n")
        (repository / "bench.py").write_text(PLUGIN)

    write("old")
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "three")
    write("new")
    wanted = Wanted(repository=repository, base="HEAD", plugins=(str(repository / "bench.py"),))
    asked = {
        **ASKED,
        "suite": "custom",
        "implementations": ("fastmix",),
        "filters": ("level=op",),
    }
    with prepared(wanted, tmp_path / "t") as both:
        plans = [side_plan.ask(side, asked) for side in both]
    assert [p.case.variant for plan in plans for p in plan.runnable] == ["old", "new"]
