"""The two versions that a check compares: trees of a git repository, each built where needed.

The repository is Mambench's own, of which each side then supplies `implementations` and `kernels`,
or any other: then each side supplies its plugin files and what they import.
"""

import hashlib
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mambench import __version__
from mambench.harness.errors import MeasurementError, UsageError
from mambench.harness.workers.pool import Code

WORKTREE = "worktree"
BUILD_LIMIT_S = 3600.0
_OUTPUT_LINES = 15


@dataclass(frozen=True, kw_only=True)
class Side:
    """One version of the code."""

    name: str  # "base" or "head"
    ref: str  # as it was asked for
    root: Path
    code: Code
    plugins: tuple[str, ...] = ()
    version: dict[str, Any] = field(default_factory=dict[str, Any])  # as in a run's manifest

    @property
    def label(self) -> str:
        """The reference and the commit."""
        commit = (self.version.get("commit") or "")[:12]
        changed = " with uncommitted changes" if self.version.get("dirty") else ""
        return f"{self.ref} ({commit}{changed})" if commit else self.ref


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What makes up the sides."""

    repository: Path
    base: str
    head: str = WORKTREE
    build: str | None = None  # shell command, run at the root of each side
    build_base: str | None = None  # instead of `build`
    path: tuple[str, ...] = ()  # folders of a side to import from, relative to its root
    plugins: tuple[str, ...] = ()


def find_repository(start: Path, *references: str) -> Path:
    """Return the root of the checkout that a folder is in.

    Where all references are folders no git is needed, and without it the folder itself is the root.
    Raises UsageError if there is none and it is needed.
    """
    try:
        return Path(_git(start, "rev-parse", "--show-toplevel").strip())
    except UsageError as error:
        if references and all(ref == WORKTREE or is_folder(ref) for ref in references):
            return start.resolve()
        if "not a git repository" not in str(error):
            raise
        raise UsageError(
            f"{start} is in no git repository: run this in the one whose commits are compared, or "
            f"name two folders (--base ./OLD --head ./NEW)."
        ) from error


def is_folder(ref: str) -> bool:
    """Whether a reference is a tree that someone has checked out already."""
    return "/" in ref and Path(ref).is_dir()


@contextmanager
def _terminable() -> Generator[None]:
    """Let SIGTERM end what is inside as Ctrl-C does, so that everything is cleaned up."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def prepared(
    wanted: Wanted, folder: Path, note: Callable[[str], None]
) -> Generator[tuple[Side, Side]]:
    """Check out and build both sides below a temporary folder, and remove them in the end.

    They are removed on SIGTERM too, with which CI cancels a job: SystemExit is raised then.

    Raises UsageError for a reference that is not there, MeasurementError if a build fails.
    """
    made: list[Path] = []
    with _terminable():
        try:
            sides: list[Side] = []
            for name, ref in (("base", wanted.base), ("head", wanted.head)):
                if ref == WORKTREE:
                    root = wanted.repository
                elif is_folder(ref):
                    root = Path(ref).resolve()
                else:
                    root = folder / name
                    made.append(root)
                    _check_out(wanted.repository, ref, root)
                code = version(root)  # before what a build leaves there
                command = (
                    wanted.build_base if name == "base" and wanted.build_base else wanted.build
                )
                if command:
                    note(f"building the {name}: {command}")
                    _build(command, root, name)
                sides.append(replace(_side(name, ref, root, wanted), version=code))
            yield sides[0], sides[1]
        finally:
            for root in made:
                _quietly(wanted.repository, "worktree", "remove", "--force", str(root))
            if made:
                _quietly(wanted.repository, "worktree", "prune")


def is_mambench(root: Path) -> bool:
    """Whether a tree is Mambench's own."""
    names = ("mambench", "harness", "implementations", "kernels")
    return all((root / name / "__init__.py").is_file() for name in names)


def _side(name: str, ref: str, root: Path, wanted: Wanted) -> Side:
    own = is_mambench(root)
    folders = [root / part for part in wanted.path]
    if not own and not wanted.path:
        # As for a script at the root, or a package in src/.
        folders = [f for f in (root / "src", root) if f.is_dir()]
    return Side(
        name=name,
        ref=ref,
        root=root,
        code=Code(root=root if own else None, path=tuple(map(str, folders))),
        plugins=tuple(_plugin(text, root, wanted.repository) for text in wanted.plugins),
    )


def _plugin(text: str, root: Path, repository: Path) -> str:
    """Return a plugin as this side has it: a file of the repository is taken from the side."""
    if not (text.endswith(".py") or "/" in text):
        return text
    path = Path(text).expanduser().resolve()
    if path.is_relative_to(repository.resolve()):
        return str(root / path.relative_to(repository.resolve()))
    return str(path)


def version(root: Path) -> dict[str, Any]:
    """Return what code a tree holds, in the form of a run's manifest; without git nobody knows."""
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
    except UsageError:
        unknown = dict.fromkeys(("commit", "dirty", "diff_digest"))
        return {"id": f"{__version__}+{root.name}", "version": __version__, **unknown}
    changes = _git(root, "status", "--porcelain=v1", "--untracked-files=normal")
    digest = None
    if changes.strip():
        hashed = hashlib.sha256(_git(root, "diff", "HEAD", "--binary").encode())
        names = _git(root, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
        for name in sorted(filter(None, names)):
            hashed.update(name.encode())
            path = root / name
            if path.is_file():
                hashed.update(path.read_bytes())
        digest = hashed.hexdigest()[:12]
    return {
        "id": "+".join(part for part in (__version__, commit[:12], digest) if part),
        "version": __version__,
        "commit": commit,
        "dirty": digest is not None,
        "diff_digest": digest,
    }


def _check_out(repository: Path, ref: str, root: Path) -> None:
    try:
        commit = _git(repository, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}").strip()
    except UsageError as error:
        raise UsageError(
            f"there is no commit '{ref}' in {repository}: name a branch, tag or commit. In a "
            f"shallow clone fetch it first (actions/checkout: fetch-depth: 0)."
        ) from error
    _git(repository, "worktree", "add", "--detach", "--force", str(root), commit)


def _build(command: str, root: Path, name: str) -> None:
    environment = os.environ | {"MAMBENCH_SIDE": name}
    try:
        done = subprocess.run(
            command,
            shell=True,
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=BUILD_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(
            f"building the {name} took over {BUILD_LIMIT_S:.0f} s: {command}"
        ) from error
    if done.returncode:
        tail = "\n".join(done.stdout.decode(errors="replace").splitlines()[-_OUTPUT_LINES:])
        raise MeasurementError(
            f"building the {name} failed with status {done.returncode}: {command}\n{tail}"
        )


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except FileNotFoundError as error:
        raise UsageError("git is not installed, and a check compares two commits.") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        raise UsageError(f"`{shlex.join(command)}` failed: {said or 'no message'}") from error
    return done.stdout.decode(errors="replace")


def _quietly(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False)
