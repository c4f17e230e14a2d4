"""What /proc and /sys tell, on trees made for the purpose."""

from pathlib import Path

import pytest

from mambench.harness.host_state import HostState, busy

CPUINFO = "processor\t: 0\nmicrocode\t: 0x2b\nflags\t\t: fpu avx2 fma avx512f{extra}\n"


def tree(root: Path, files: dict[str, str]) -> HostState:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return HostState(root)


def test_a_processor(tmp_path: Path):
    cpu = "sys/devices/system/cpu"
    host = tree(
        tmp_path,
        {
            "proc/cpuinfo": CPUINFO.format(extra=" amx_bf16"),
            f"{cpu}/cpu0/cpufreq/scaling_governor": "powersave\n",
            f"{cpu}/intel_pstate/no_turbo": "1\n",
            f"{cpu}/smt/active": "0\n",
            f"{cpu}/cpu0/cache/index0/type": "Data",
            f"{cpu}/cpu0/cache/index0/level": "1",
            f"{cpu}/cpu0/cache/index0/size": "48K",
            f"{cpu}/cpu0/cache/index1/type": "Instruction",
            f"{cpu}/cpu0/cache/index1/level": "1",
            f"{cpu}/cpu0/cache/index1/size": "32K",
            f"{cpu}/cpu0/cache/index2/type": "Unified",
            f"{cpu}/cpu0/cache/index2/level": "2",
            f"{cpu}/cpu0/cache/index2/size": "2048K",
            "sys/devices/system/node/node0/cpulist": "0-3",
            "sys/devices/system/node/node1/cpulist": "4-7",
        },
    )
    found = host.cpu()
    assert found["governor"] == "powersave"
    assert found["turbo"] is False
    assert found["smt"] is False
    assert found["microcode"] == "0x2b"
    assert found["numa_nodes"] == 2
    assert found["cache_bytes"] == {"L1d": 48 << 10, "L2": 2 << 20}
    assert found["instructions"] == ["avx2", "fma", "avx512f", "amx_bf16"]
    assert found["frequency_driver"] is None
    assert "scaling_driver" in host.missing["cpu.frequency_driver"]
    assert "cpu.governor" not in host.missing


def test_an_empty_system_has_reasons(tmp_path: Path):
    host = HostState(tmp_path)
    found = host.cpu()
    for name in ("governor", "turbo", "smt", "numa_nodes", "cache_bytes"):
        assert found[name] is None
        assert host.missing[f"cpu.{name}"]
    assert found["instructions"] is None
    assert host.system()["virtualisation"] is None
    assert host.missing["system.virtualisation"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/cpuinfo": CPUINFO.format(extra="")}, "none"),
        ({"proc/cpuinfo": CPUINFO.format(extra=" hypervisor")}, "virtual machine"),
        (
            {
                "proc/cpuinfo": CPUINFO.format(extra=" hypervisor"),
                "sys/class/dmi/id/sys_vendor": "QEMU\n",
            },
            "virtual machine (QEMU)",
        ),
        ({"sys/hypervisor/type": "xen"}, "xen"),
    ],
)
def test_virtualisation(tmp_path: Path, files: dict[str, str], expected: str):
    assert tree(tmp_path, files).system()["virtualisation"] == expected


def test_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("KUBERNETES_SERVICE_HOST", "container"):
        monkeypatch.delenv(name, raising=False)
    assert HostState(tmp_path).container() is None
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert HostState(tmp_path).container() == "kubernetes"
    assert tree(tmp_path, {"run/.containerenv": ""}).container() == "podman"
    assert tree(tmp_path, {".dockerenv": ""}).container() == "docker"


def test_a_processor_that_was_busy_before_the_run():
    def said(load: float, kind: str = "cpu") -> str | None:
        cores = {"load_average": [load, 0.1, 0.1], "usable_cores": 4}
        return busy({"kind": kind}, {"cpu": cores})

    assert said(3.9) is None
    assert "load 4.2 on 4 cores" in (said(4.2) or "")
    assert said(40.0, "cuda") is None  # its times are the GPU's
    unknown = {"load_average": None, "usable_cores": 4}
    assert busy({"kind": "cpu"}, {"cpu": unknown}) is None
    assert busy({"kind": "cpu"}, {}) is None


def test_a_distribution(tmp_path: Path):
    host = tree(
        tmp_path,
        {
            "etc/os-release": 'NAME="D"\nPRETTY_NAME="Debian GNU/Linux 13"\n',
            "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        },
    )
    found = host.system()
    assert found["distribution"] == "Debian GNU/Linux 13"
    assert found["huge_pages"] == "madvise"
