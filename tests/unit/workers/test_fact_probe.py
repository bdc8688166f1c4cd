"""The probe runs in engines' environments, which have little besides Ray and TensorRT-LLM."""

import subprocess
import sys


def test_the_probe_needs_nothing_that_an_engines_environment_may_lack() -> None:
    lacking = {"blake3", "fsspec", "fastapi", "starlette", "tokenizers", "torch", "ray.serve", "rich"}
    script = f"import sys, serve.workers.fact_probe; print({lacking!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
