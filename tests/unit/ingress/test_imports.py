import subprocess
import sys


def test_the_gateway_needs_no_gpu_library_and_no_web_framework() -> None:
    """It starts in half a second and 55 MB, and on machines whose TensorRT-LLM pins other versions of these."""
    heavy = {"torch", "transformers", "ray", "fastapi", "starlette"}
    script = f"import sys, serve.ingress.api, serve.ingress.models; print({heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
