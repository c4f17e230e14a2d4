from pathlib import Path

import pytest

from mambench.harness.errors import DeviceBusyError
from mambench.harness.lock import device_lock


def test_second_run_on_a_device_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with (
        device_lock("cpu", holder="runs/first", folder=tmp_path),
        pytest.raises(DeviceBusyError, match="runs/first"),
        device_lock("cpu", holder="runs/second", folder=tmp_path),
    ):
        pass


def test_devices_are_independent_and_free_again(tmp_path: Path) -> None:
    with (
        device_lock("cpu", holder="a", folder=tmp_path),
        device_lock("GPU-1/2", holder="b", folder=tmp_path),
    ):
        pass
    with device_lock("cpu", holder="c", folder=tmp_path):
        pass


def test_waiting_takes_the_device_when_it_is_free(tmp_path: Path) -> None:
    first = device_lock("cpu", holder="runs/first", folder=tmp_path)
    first.__enter__()
    told: list[str] = []

    def release(seconds: float) -> None:
        assert len(told) == 1
        first.__exit__(None, None, None)

    with device_lock(
        "cpu",
        holder="second",
        wait=True,
        folder=tmp_path,
        on_wait=told.append,
        pause=release,
    ):
        assert "runs/first" in told[0]
        with (
            pytest.raises(DeviceBusyError, match="second"),
            device_lock("cpu", holder="x", folder=tmp_path),
        ):
            pass
