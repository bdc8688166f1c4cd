"""Builds: how long a repeated build takes, and one that is killed in every one of its steps.

    python -m benchmarks.builds

The quickstart model with weights of 8 bits, by `raytrt build` as a user runs it: a new interpreter and a new Ray each
time. Little is measured in its steps, so that what is around them counts.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import Report

REPEATS = 5
STEPS = ("fetch", "reference", "quantize", "tune", "verify", "publish")
SPEC = """
name: quickstart
quantize: int8_weight_only
target: {num_cpus: 0.5}
tune: {search: "off", trial_s: 1, prompt_tokens: 64, output_tokens: 16}
verify: {texts: {samples: 16, max_tokens: 128}, output_tokens: 8, gate: {max_accuracy_drop: 0.05}}
"""


class Builder:
    """`raytrt build` of one file, with a store, a cache and a home of its own.

    Args:
        directory: Of all of it.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / "build.yaml"
        self._file.write_text(SPEC)
        self._store = directory / "store"
        self._environ = {
            **os.environ,
            "RAYTRT_HOME": str(directory / "home"),
            "RAYTRT_BUNDLE_CACHE": str(directory / "cache"),
        }

    def run(self, *options: str) -> float:
        """Run it to its end; returns seconds."""
        began_s = time.monotonic()
        self._finish(self._start("build", str(self._file), *options))
        return time.monotonic() - began_s

    def bundles(self) -> list[str]:
        """Return the fingerprints of what is published, after every byte of it was read and checked."""
        found = json.loads(self._finish(self._start("bundles", "list", "--json")))
        fingerprints = [str(version["fingerprint"]) for version in found]
        for fingerprint in fingerprints:
            self._finish(self._start("bundles", "verify", f"quickstart@sha256:{fingerprint}"))
        return fingerprints

    def run_until(self, line: str) -> float:
        """Run it until it says a line, then kill it; returns seconds until then."""
        began_s = time.monotonic()
        process = self._start("build", str(self._file))
        assert process.stderr is not None
        for said in process.stderr:
            if said.startswith(line):
                break
        else:
            raise RuntimeError(f"it never said {line!r}")
        seconds = time.monotonic() - began_s
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return seconds

    def _start(self, *words: str) -> "subprocess.Popen[str]":
        command = [str(Path(sys.executable).with_name("raytrt")), *words, "--store", str(self._store)]
        return subprocess.Popen(command, env=self._environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def _finish(self, process: "subprocess.Popen[str]") -> str:
        output, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(errors)
        return output


def main() -> None:
    """Measure and report."""
    report = Report("builds", "python -m benchmarks.builds")
    with tempfile.TemporaryDirectory() as directory:
        whole = Path(directory, "whole")
        whole.mkdir()
        builder = Builder(whole)
        first_s = builder.run()
        report.add("first build", first_s, "s")
        repeated = [builder.run() for _ in range(REPEATS)]
        report.add("second build of the same file, median", statistics.median(repeated), "s", "<= 2")
        report.add("second build of the same file, slowest", max(repeated), "s")
        asked = statistics.median(builder.run("--probe") for _ in range(REPEATS))
        report.add("the same, asking the node again", asked, "s")
        report.add("outline (--dry-run)", statistics.median(builder.run("--dry-run") for _ in range(REPEATS)), "s")
        published = builder.bundles()
        broken = Path(directory, "broken")
        broken.mkdir()
        builder = Builder(broken)
        half = 0
        for step in STEPS:
            killed_s = builder.run_until(f"raytrt: {step}: running")
            report.add(f"build until it was killed (-9) in {step}", killed_s, "s")
            half += len(builder.bundles())
        report.add("bundles that were published before their build had ended", half, "", "<= 0")
        report.add("build that went on from there", builder.run(), "s")
        report.add("bundles, the same as without kills", float(builder.bundles() == published), "", ">= 1")
    report.note("The second build asks neither Ray nor a node: its key leads to the bundle.")
    report.note("Each build after a kill begins with the step that was killed: an interpreter, Ray, and that step.")
    report.finish()


if __name__ == "__main__":
    main()
