"""Make the virtual environment of an engine that cannot live in its replica's: `python -m tools.make_engine_env`.

The environment is made again when its requirements have changed, and left alone otherwise.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
REQUIREMENTS = REPOSITORY / "configs/environments/trtllm-1.2.1-cpu.txt"
DIRECTORY = REPOSITORY / ".venv-trtllm-1.2"


def make_engine_env(directory: Path = DIRECTORY, requirements: Path = REQUIREMENTS) -> Path:
    """Make the environment unless it is there; returns its Python. Takes a minute or two.

    Raises:
        subprocess.CalledProcessError: A package cannot be installed.
    """
    python = directory / "bin/python"
    stamp = directory / ".made-from"
    wanted = hashlib.sha256(f"{sys.version_info[:2]}{directory}".encode() + requirements.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(directory, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    # Not compiled: of all these modules few are ever imported.
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", str(requirements)], check=True)
    # Without what `raytrt` itself depends on: that is Ray Serve, with the libraries that cannot be had here.
    subprocess.run([*pip, "--no-deps", "-e", str(REPOSITORY)], check=True)
    stamp.write_text(wanted)
    return python


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Make an engine's own Python environment.")
    parser.add_argument("--directory", type=Path, default=DIRECTORY)
    parser.add_argument("--requirements", type=Path, default=REQUIREMENTS)
    options = parser.parse_args()
    print(make_engine_env(options.directory.resolve(), options.requirements.resolve()))


if __name__ == "__main__":
    main()
