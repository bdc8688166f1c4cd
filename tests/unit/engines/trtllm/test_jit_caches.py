"""Caches of a bundle: copied for each process, and collected after a start."""

from pathlib import Path

from serve.engines.trtllm.jit_caches import cache_environ, collect_caches, with_caches
from serve.engines.trtllm.settings import TrtllmSettings


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
    sizes = collect_caches(tmp_path / "caches", tmp_path / "kept")
    assert sizes == {"autotuner": 10, "triton": 10}
    kept = sorted(path.relative_to(tmp_path / "kept").as_posix() for path in (tmp_path / "kept").rglob("*.*"))
    assert kept == ["autotuner/tactics.json", "triton/ab12/kernel.cubin"]


def test_nothing_left_is_nothing_kept(tmp_path: Path) -> None:
    cache_environ(tmp_path / "caches")
    assert collect_caches(tmp_path / "caches", tmp_path / "kept") == {}
    assert not (tmp_path / "kept").exists()


def test_a_bundle_s_caches_are_copied_and_what_the_operator_set_counts(tmp_path: Path) -> None:
    kept = tmp_path / "bundle/caches/jit/triton"
    kept.mkdir(parents=True)
    (kept / "kernel").write_bytes(b"compiled")
    settings = TrtllmSettings(environment={"TRITON_CACHE_DIR": "/mine", "OTHER": "1"})
    changed = with_caches(settings, tmp_path / "bundle/model", lambda: tmp_path / "copy")
    assert changed.environment["TRITON_CACHE_DIR"] == "/mine"
    assert changed.environment["OTHER"] == "1"
    assert changed.environment["TLLM_AUTOTUNER_CACHE_PATH"] == str(tmp_path / "copy/autotuner/tactics.json")
    assert (tmp_path / "copy/triton/kernel").read_bytes() == b"compiled"


def test_a_checkpoint_without_caches_changes_nothing(tmp_path: Path) -> None:
    settings = TrtllmSettings()
    assert with_caches(settings, tmp_path / "model", lambda: tmp_path / "copy") is settings
    assert not (tmp_path / "copy").exists()
