import errno
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mambench.harness.errors import RunFolderError
from mambench.harness.records import Observation
from mambench.harness.spec import Case, DType, Family, Outcome, Pass, Problem
from mambench.harness.store import MANIFEST_KEYS, RunFolder, new_run

MANIFEST = {
    key: {str: "x", int: 1, list: [], dict: {}}[kind] for key, kind in MANIFEST_KEYS.items()
}


def observation(
    seqlen: int = 16, *, measurement: str = "time", outcome: Outcome = Outcome.OK
) -> Observation:
    problem = Problem(family=Family.ATTENTION, batch=1, seqlen=seqlen, d_inner=16, headdim=8)
    return Observation(
        case=Case(
            implementation="good",
            variant="v",
            problem=problem,
            pass_=Pass.FORWARD,
            dtype=DType.FP32,
        ),
        measurement=measurement,
        outcome=outcome,
        reason=None if outcome is Outcome.OK else "because",
        observation_id=f"{seqlen}-{measurement}",
        started_at="2026-01-01T00:00:00+00:00",
        duration_s=0.5,
        values={"time_s": 0.25},
        samples_s=(0.25, 0.5),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of three observations."""
    path = tmp_path / "run"
    with RunFolder.create(path, MANIFEST) as run:
        for seqlen in (1, 2, 3):
            run.append(observation(seqlen))
    return path


def raising(error: Exception) -> Callable[[int], None]:
    def fail(_: int) -> None:
        raise error

    return fail


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_appended_is_read_back(folder: Path) -> None:
    run = RunFolder.open(folder)
    assert run.observations() == [observation(seqlen) for seqlen in (1, 2, 3)]
    assert run.manifest == MANIFEST
    assert run.warnings == []


def test_appending_goes_on_after_what_is_there(folder: Path) -> None:
    with RunFolder.open(folder, for_append=True) as run:
        run.append(observation(4))
    assert [o.case.problem.seqlen for o in RunFolder.open(folder).observations()] == [1, 2, 3, 4]


def test_a_run_that_goes_on_elsewhere_says_so(folder: Path) -> None:
    with RunFolder.open(folder, for_append=True) as run:
        run.continued("0.1+abc", "GPU-1")
        run.continued("0.1+def", None)
        run.append(observation(4))
    read = RunFolder.open(folder)
    assert [entry["code"] for entry in read.manifest["resumed"]] == ["0.1+abc", "0.1+def"]
    assert [text.partition(" with ")[2] for text in read.warnings] == [
        "code version 0.1+abc on the GPU GPU-1",
        "code version 0.1+def",
    ]
    assert len(read.observations()) == 4


def test_newest_observation_wins_and_skipped_ones_are_not_finished(folder: Path) -> None:
    skipped = observation(3, outcome=Outcome.SKIPPED)
    with RunFolder.open(folder, for_append=True) as run:
        run.append(observation(2, outcome=Outcome.OOM))
        run.append(skipped)
        key = (observation(2).case.case_id, "time", 0)
        assert run.newest()[key].outcome is Outcome.OOM
        assert run.finished() == {(observation(n).case.case_id, "time", 0) for n in (1, 2)}


@pytest.mark.parametrize("kept", [1, 40])
def test_torn_last_line_is_dropped_and_removed_only_for_append(folder: Path, kept: int) -> None:
    results = folder / "results.jsonl"
    sound = results.read_bytes()
    results.write_bytes(sound + observation(4).to_line().encode()[:kept])
    torn = content(folder)

    reading = RunFolder.open(folder)
    assert len(reading.observations()) == 3
    assert "line 4" in reading.warnings[0]
    assert content(folder) == torn

    with RunFolder.open(folder, for_append=True) as appending:
        assert "line 4" in appending.warnings[0]
        assert results.read_bytes() == sound
        appending.append(observation(5))
    assert len(RunFolder.open(folder).observations()) == 4


def test_kill_within_a_multibyte_character_is_a_torn_line_too(folder: Path) -> None:
    with (folder / "results.jsonl").open("ab") as file:
        file.write('{"reason":"µ'.encode()[:-1])
    assert len(RunFolder.open(folder).observations()) == 3


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"schema":1,', "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[]", "not a JSON object"),
        (b"", "not JSON"),
        (observation().to_line().replace('"schema":1', '"schema":2').encode(), "schema version 2"),
        (observation().to_line().replace('"outcome":"ok"', '"outcome":"fine"').encode(), "fine"),
    ],
)
@pytest.mark.parametrize("for_append", [False, True])
def test_broken_inner_line_is_refused_by_number(
    folder: Path, line: bytes, says: str, for_append: bool
) -> None:
    results = folder / "results.jsonl"
    lines = results.read_bytes().split(b"\n")
    # A torn last line as well: even that must not be repaired in a folder that is refused.
    results.write_bytes(b"\n".join([lines[0], line, *lines[2:]]) + b'{"torn')
    before = content(folder)
    with pytest.raises(RunFolderError, match=r"results\.jsonl, line 2") as caught:
        RunFolder.open(folder, for_append=for_append)
    assert says in str(caught.value)
    assert content(folder) == before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"schema": 1,\n oops', "line 2"),
        ("[]", "not a JSON object"),
        (json.dumps({**MANIFEST, "schema": 99}), "schema version 99"),
        (json.dumps({k: v for k, v in MANIFEST.items() if k != "plan"}), "lacks plan"),
        (json.dumps({**MANIFEST, "plan": "all"}), "'plan'"),
    ],
)
def test_broken_manifest_is_refused(folder: Path, text: str, says: str) -> None:
    (folder / "manifest.json").write_text(text)
    before = content(folder)
    with pytest.raises(RunFolderError, match=r"manifest\.json") as caught:
        RunFolder.open(folder, for_append=True)
    assert says in str(caught.value)
    assert content(folder) == before


def test_what_is_not_a_run_is_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    before = content(tmp_path)
    for path in (tmp_path / "absent", tmp_path / "other", folder / "manifest.json"):
        with pytest.raises(RunFolderError, match=path.name):
            RunFolder.open(path, for_append=True)
    with pytest.raises(RunFolderError, match="not empty"):
        RunFolder.create(tmp_path / "other", MANIFEST)
    assert content(tmp_path) == before


def test_missing_results_file_is_refused(folder: Path) -> None:
    (folder / "results.jsonl").unlink()
    for for_append in (False, True):
        with pytest.raises(RunFolderError, match=r"results\.jsonl"):
            RunFolder.open(folder, for_append=for_append)


@pytest.fixture
def full_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the disk take so many more bytes of results."""
    write = os.write

    def begin(left: int) -> None:
        def written(descriptor: int, data: bytes) -> int:
            nonlocal left
            if left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            count = write(descriptor, data[:left])
            left -= count
            return count

        monkeypatch.setattr(os, "write", written)

    return begin


def test_a_full_disk_keeps_what_was_measured(
    folder: Path, full_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunFolder.open(folder, for_append=True) as run:
        full_after(20)
        with pytest.raises(RunFolderError, match=r"results.jsonl .*: No space.* --resume"):
            run.append(observation(4))
    monkeypatch.undo()
    with RunFolder.open(folder, for_append=True) as run:
        assert len(run.observations()) == 3
        run.append(observation(4))
    assert len(RunFolder.open(folder).observations()) == 4


def test_a_full_disk_leaves_nothing_of_a_run_that_did_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(RunFolderError, match="run cannot be written: No space left"):
        RunFolder.create(tmp_path / "run", MANIFEST)
    assert not list((tmp_path / "run").iterdir())
    monkeypatch.undo()
    RunFolder.create(tmp_path / "run", MANIFEST).close()


def test_a_full_disk_leaves_the_manifest_of_a_run_that_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(folder)
    with RunFolder.open(folder, for_append=True) as run:
        monkeypatch.setattr(os, "fsync", raising(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(RunFolderError, match="cannot be written: No space left"):
            run.continued("abc", None)
    assert content(folder) == before


def test_two_writers_are_refused_and_a_reader_is_not(folder: Path) -> None:
    with RunFolder.open(folder, for_append=True):
        with pytest.raises(RunFolderError, match="being written"):
            RunFolder.open(folder, for_append=True)
        assert len(RunFolder.open(folder).observations()) == 3
    RunFolder.open(folder, for_append=True).close()


def test_reader_cannot_append(folder: Path) -> None:
    with pytest.raises(RunFolderError, match="reading only"):
        RunFolder.open(folder).append(observation(4))


def test_incomplete_manifest_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="lacks"):
        RunFolder.create(tmp_path / "run", {"schema": 1})
    assert not (tmp_path / "run").exists()


def test_new_run_names_folder_by_time_suite_and_id(tmp_path: Path) -> None:
    now = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
    path, run_id, created_at = new_run(tmp_path, "quick", now=now)
    assert path == tmp_path / f"20260304T050607Z-quick-{run_id}"
    assert created_at == "2026-03-04T05:06:07+00:00"
    assert new_run(tmp_path, "quick", now=now)[0] != path
