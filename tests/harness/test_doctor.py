"""What `doctor` finds, with each lack planted."""

from pathlib import Path

import pytest

from mambench.harness import doctor, machine, registry
from mambench.harness.cli import views as cli_views
from mambench.harness.doctor import Check
from mambench.harness.spec import Device, DeviceKind, Family
from mambench.implementations.base import Implementation, Variant


class Peer(Implementation):
    name = "peer"
    families = (Family.S6,)
    summary = "somebody's"

    def variants(self, device: Device) -> tuple[Variant, ...]:
        return (Variant(name="here"), Variant(name="there", unavailable="pip install there"))

    def op(self, family: Family, variant: str):
        raise NotImplementedError


class Update(Peer):
    """Computes one token and no sequence."""

    name = "update"
    lack: str | None = None

    def variants(self, device: Device) -> tuple[Variant, ...]:
        return (Variant(name="own", unavailable="computes one token, not a sequence"),)

    def decode_variants(self, device: Device) -> tuple[Variant, ...]:
        return (Variant(name="own", unavailable=self.lack),)


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_every_lack_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    problem = machine.GpuAccess(problem="no driver")
    monkeypatch.setattr(machine, "gpus", lambda: problem)
    found = by_name(doctor.examine({"peer": Peer()}))
    assert {name for name, check in found.items() if check.ok is False} >= {
        "torch",
        "triton",
        "numba",
    }
    assert found["GPU"].fix == "no driver"
    assert found["counters"].fix is not None
    assert found["counters"].ok is None
    assert "no C compiler" in found["triton"].found
    assert "install gcc" in (found["triton"].fix or "")
    assert found["peer"].ok is True
    assert found["peer"].fix == "there: pip install there"
    text = cli_views.checks(list(found.values()))
    assert "to enable: there: pip install there" in text
    assert "to enable: pip install numba" in text


def test_what_only_decodes_can_run(monkeypatch: pytest.MonkeyPatch):
    update = Update()
    found = by_name(doctor.examine({"update": update}))["update"]
    assert (found.ok, found.found, found.fix) == (True, "own (decode)", None)
    device = Device(kind=DeviceKind.CPU, name="a processor", memory_bytes=1 << 30)
    assert "      decode  own\n" in cli_views.listing({"update": update}, [], {}, device)
    monkeypatch.setattr(update, "lack", "pip install own")
    found = by_name(doctor.examine({"update": update}))["update"]
    assert (found.ok, found.found, found.fix) == (
        False,
        "no variant can run",
        "own: pip install own",
    )
    listed = cli_views.listing({"update": update}, [], {}, device)
    assert "      decode  unavailable: pip install own\n" in listed


def test_what_is_there_needs_no_advice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0")
    text = cli_views.checks([doctor.examine({})[3]])
    assert text.startswith("ok  torch")
    assert "to enable" not in text


@pytest.mark.parametrize(
    ("text", "restricted"),
    [
        ("RmProfilingAdminOnly: 1\n", True),
        ("Other: 3\nRmProfilingAdminOnly: 0\n", False),
        ("Other: 1\n", None),
    ],
)
def test_permission_of_counters(tmp_path: Path, text: str, restricted: bool | None):
    (tmp_path / "params").write_text(text)
    assert doctor.counters_restricted(tmp_path / "params") is restricted
    assert doctor.counters_restricted(tmp_path / "absent") is None


def test_it_runs_on_this_machine():
    found = by_name(doctor.examine(registry.load()))
    assert found["mamba_ssm_scan"].ok in (True, None)  # nothing is amiss without a peer
    assert found["processor"].ok is True
    assert set(registry.BUILT_IN) <= set(found)
