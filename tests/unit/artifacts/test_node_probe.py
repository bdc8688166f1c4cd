"""What a process tells about its node."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from serve.artifacts.node_facts import NodeFacts
from serve.artifacts.node_probe import installed_libraries, probe_node

H100 = ("NVIDIA H100 80GB HBM3", (9, 0), 85_520_809_984)
L4 = ("NVIDIA L4", (8, 9), 24_152_899_584)
CARDS = {"GPU-aaa1": H100, "GPU-bbb2": L4, "MIG-ccc3": ("NVIDIA L4 MIG 1g.6gb", None, 6_000_000_000)}


class NvmlError(Exception):
    pass


class FakeNvml(ModuleType):
    """A driver with two GPUs, the second one cut in parts."""

    NVMLError = NvmlError

    def __init__(self, has_driver: bool = True) -> None:
        super().__init__("pynvml")
        self.has_driver = has_driver
        self.open = 0

    def nvmlInit(self) -> None:
        if not self.has_driver:
            raise NvmlError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 12090

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"575.57.08"

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return ("GPU-aaa1", "GPU-bbb2")[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in CARDS:
            raise NvmlError("Not Found")
        return uuid

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetName(self, handle: str) -> str:
        return CARDS[handle][0]

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(total=CARDS[handle][2])

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:
        found = CARDS[handle][1]
        if found is None:
            raise NvmlError("Not Supported")
        return found

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        return "GPU-bbb2"


@contextmanager
def driver(nvml: FakeNvml, visible: str | None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pynvml", nvml)
        if visible is None:
            patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            patch.setenv("CUDA_VISIBLE_DEVICES", visible)
        yield
    assert nvml.open == 0


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, [H100[0], L4[0]]),
        ("", []),
        ("-1", []),
        ("1", [L4[0]]),
        ("1,0", [L4[0], H100[0]]),
        ("0,-1,1", [H100[0]]),
        ("GPU-bbb2", [L4[0]]),
        ("GPU-b", [L4[0]]),
        ("MIG-ccc3", ["NVIDIA L4 MIG 1g.6gb"]),
    ],
)
def test_the_gpus_are_those_that_the_process_may_use(visible: str | None, names: list[str]) -> None:
    with driver(FakeNvml(), visible):
        facts = probe_node()
    assert [gpu.name for gpu in facts.gpus] == names


def test_a_gpu_is_described_by_its_driver() -> None:
    with driver(FakeNvml(), "0,MIG-ccc3"):
        facts = probe_node()
    assert facts.driver == "575.57.08"
    assert facts.cuda == "12.9"
    assert facts.gpus[0].compute_capability == "9.0"
    assert facts.gpus[0].memory_bytes == H100[2]
    assert facts.gpus[1].compute_capability == "8.9"  # its parent's


def test_all_gpus_are_seen_if_asked_for() -> None:
    with driver(FakeNvml(), ""):
        assert len(probe_node(all_gpus=True).gpus) == 2


def test_a_machine_without_a_driver_has_no_gpus() -> None:
    with driver(FakeNvml(has_driver=False), None):
        facts = probe_node()
    assert facts == NodeFacts(machine=platform.machine(), libraries=facts.libraries)


def test_only_installed_libraries_are_told() -> None:
    assert installed_libraries(("tokenizers", "no-such-library")) == {"tokenizers": version("tokenizers")}


def test_tensorrt_llm_tells_its_version_without_being_imported(tmp_path: Path) -> None:
    package = tmp_path / "tensorrt_llm"
    package.mkdir()
    (package / "version.py").write_text('__version__ = "1.2.1"\n')
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    answer = subprocess.run(
        [sys.executable, "-m", "serve.artifacts.node_probe"], env=environ, capture_output=True, text=True, check=True
    )
    assert json.loads(answer.stdout)["libraries"]["tensorrt_llm"] == "1.2.1"


def test_no_library_that_takes_gpus_is_imported() -> None:
    program = (
        "import sys; from serve.artifacts.node_probe import probe_node; probe_node(); "
        "sys.exit(bool({'torch', 'tensorrt_llm', 'ray'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
