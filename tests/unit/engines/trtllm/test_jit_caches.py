"""Caches of a bundle: copied for each process, and collected after a start."""

from pathlib import Path

import pytest

from serve.artifacts.node_facts import GpuFacts, NodeFacts
from serve.engines.trtllm.jit_caches import CacheOrigin, cache_environ, collect_caches, origin_of, with_caches
from serve.engines.trtllm.settings import TrtllmSettings

H100 = CacheOrigin("1.4.0", ("NVIDIA H100",))


def test_every_cache_has_a_place_below_one_directory(tmp_path: Path) -> None:
    environ = cache_environ(tmp_path)
    assert environ["TLLM_AUTOTUNER_CACHE_PATH"] == str(tmp_path / "autotuner/tactics.json")
    assert all(Path(place).is_relative_to(tmp_path) for place in environ.values())
    assert (tmp_path / "autotuner").is_dir()  # the library writes the file itself
    assert not (tmp_path / "autotuner/tactics.json").exists()
    assert Path(environ["TRITON_CACHE_DIR"]).is_dir()


def test_what_compilers_left_unfinished_is_not_collected(tmp_path: Path) -> None:
    cache_environ(tmp_path / "caches")
    for name in ("autotuner/tactics.json", "triton/ab12/kernel.cubin", "triton/ab12/kernel.lock", "triton/tmp.1/half"):
        path = tmp_path / "caches" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 10)
    sizes = collect_caches(tmp_path / "caches", tmp_path / "kept", H100)
    assert sizes == {"autotuner": 10, "triton": 10}
    kept = sorted(path.relative_to(tmp_path / "kept").as_posix() for path in (tmp_path / "kept").rglob("*.*"))
    assert kept == ["autotuner/tactics.json", "made_with.json", "triton/ab12/kernel.cubin"]


def test_nothing_left_is_nothing_kept(tmp_path: Path) -> None:
    cache_environ(tmp_path / "caches")
    assert collect_caches(tmp_path / "caches", tmp_path / "kept", H100) == {}
    assert not (tmp_path / "kept").exists()


def make_bundle(directory: Path) -> Path:
    """Make a bundle with a cache of Triton's; return its model's directory."""
    cache_environ(directory / "start")
    (directory / "start/triton/kernel").write_bytes(b"compiled")
    collect_caches(directory / "start", directory / "bundle/caches/jit", H100)
    return directory / "bundle/model"


def test_a_bundle_s_caches_are_copied_and_what_the_operator_set_counts(tmp_path: Path) -> None:
    settings = TrtllmSettings(environment={"TRITON_CACHE_DIR": "/mine", "OTHER": "1"})
    changed = with_caches(settings, make_bundle(tmp_path), lambda: H100, lambda: tmp_path / "copy")
    assert changed.environment["TRITON_CACHE_DIR"] == "/mine"
    assert changed.environment["OTHER"] == "1"
    assert changed.environment["TLLM_AUTOTUNER_CACHE_PATH"] == str(tmp_path / "copy/autotuner/tactics.json")
    assert (tmp_path / "copy/triton/kernel").read_bytes() == b"compiled"


@pytest.mark.parametrize("here", [CacheOrigin("1.4.1", ("NVIDIA H100",)), CacheOrigin("1.4.0", ("NVIDIA H200",))])
def test_caches_of_another_gpu_or_release_are_left(
    tmp_path: Path, here: CacheOrigin, caplog: pytest.LogCaptureFixture
) -> None:
    settings = TrtllmSettings()
    with caplog.at_level("INFO"):
        assert with_caches(settings, make_bundle(tmp_path), lambda: here, lambda: tmp_path / "copy") is settings
    assert "TensorRT-LLM 1.4.0 on NVIDIA H100" in caplog.text
    assert str(here) in caplog.text


def test_an_origin_names_each_gpu_model_once() -> None:
    gpu = GpuFacts(name="NVIDIA H100", compute_capability="9.0", memory_bytes=1)
    assert origin_of("1.4.0", NodeFacts(machine="x86_64", gpus=(gpu, gpu))) == H100


def test_a_checkpoint_without_caches_changes_nothing(tmp_path: Path) -> None:
    settings = TrtllmSettings()
    assert with_caches(settings, tmp_path / "model", lambda: H100, lambda: tmp_path / "copy") is settings
    assert not (tmp_path / "copy").exists()
