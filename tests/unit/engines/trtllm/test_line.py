from pathlib import Path

import pytest

from serve.engines.trtllm.line import Installation, Line, detect, line_of
from serve.errors import ConfigError


@pytest.mark.parametrize(
    ("version", "line"),
    [
        ("1.2.0", Line.V1_2),
        ("1.2.1", Line.V1_2),
        ("1.2.0rc7", Line.V1_2),
        ("1.3.0rc29", Line.NEWEST),
        ("1.4.0rc1", Line.NEWEST),
        ("2.0.0", Line.NEWEST),
    ],
)
def test_each_version_has_a_line(version: str, line: Line) -> None:
    assert line_of(version) is line


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0rc2", "0.21.0"])
def test_older_versions_are_refused_with_a_remedy(version: str) -> None:
    with pytest.raises(ConfigError, match=rf"{version} is too old.*install 1\.2\.1"):
        line_of(version)


def test_an_unreadable_version_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        line_of("main")


def test_without_the_library_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(ConfigError, match="needs TensorRT-LLM, which is not installed"):
        detect()


@pytest.mark.parametrize(("version", "tensorrt"), [("1.2.1", True), ("1.2.1", False), ("1.3.0rc29", False)])
def test_trap_7_1_1_the_installed_line_is_found_without_importing_it(
    version: str, tensorrt: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "tensorrt_llm"
    package.mkdir()
    package.joinpath("__init__.py").write_text("raise AssertionError('importing initialises MPI and CUDA')\n")
    package.joinpath("version.py").write_text(f'__version__ = "{version}"\n')
    if tensorrt:
        package.joinpath("_tensorrt_engine").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert detect() == Installation(version, line_of(version), tensorrt)


def test_a_version_newer_than_known_is_used_like_the_newest_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    package = tmp_path / "tensorrt_llm"
    package.mkdir()
    package.joinpath("__init__.py").write_text('__version__ = "1.9.0"\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert detect().line is Line.NEWEST
    assert "1.9.0 is newer than what this release knows" in caplog.text
