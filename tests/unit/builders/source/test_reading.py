"""Sources of all kinds: what is listed, what is fetched, and what is refused. The hub is a server of this test."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

import serve
from builders.settings.source import SourceSettings
from builders.source.checkpoint import check_checkpoint
from builders.source.location import UrlLocation
from builders.source.reading import fetch_source, list_source, pinned_source
from builders.source.url import fetch_url, list_url
from builders.source.weights import count_parameters
from builders.spec import BuildSpec, parse_spec
from serve.artifacts.digests import DigestCache
from serve.errors import ConfigError

QUICKSTART = Path(serve.__path__[0], "models/quickstart")
FILES = sorted(path.name for path in QUICKSTART.iterdir())


def spec(location: str, **changes: Any) -> BuildSpec:
    return parse_spec({"name": "m", "source": {"location": location, **changes}})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    shutil.copytree(QUICKSTART, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_directory_is_known_by_its_content(checkpoint: Path) -> None:
    here = list_source(spec(str(checkpoint)), DigestCache())
    there = list_source(spec("builtin:quickstart"), DigestCache())
    assert here.digest == there.digest
    assert sorted(here.files) == FILES
    (checkpoint / "config.json").write_text("{}")
    assert list_source(spec(str(checkpoint)), DigestCache()).digest != here.digest


def test_a_readme_changes_nothing(checkpoint: Path) -> None:
    before = list_source(spec(str(checkpoint)), DigestCache()).digest
    (checkpoint / "README.md").write_text("a model")
    assert list_source(spec(str(checkpoint)), DigestCache()).digest == before


def test_a_directory_is_not_copied(checkpoint: Path, tmp_path: Path) -> None:
    build = spec(str(checkpoint))
    output = tmp_path / "output"
    output.mkdir()
    assert fetch_source(build, list_source(build, DigestCache()), output, lambda *_: None) == checkpoint
    assert not list(output.iterdir())


def test_relative_paths_are_made_absolute_for_the_nodes(checkpoint: Path) -> None:
    build = spec("./checkpoint")
    listing = list_source(build, DigestCache(), checkpoint.parent)
    assert pinned_source(build.source, listing, checkpoint.parent) == SourceSettings(location=str(checkpoint))


def test_a_model_of_the_package_is_told_by_its_name() -> None:
    assert list_source(spec("builtin:quickstart"), DigestCache()).where == "builtin:quickstart"


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{tmp_path}/none is no directory on"):
        list_source(spec(f"{tmp_path}/none"), DigestCache())


@pytest.mark.parametrize("damage", ["cut", "longer", "header", "empty"])
def test_a_damaged_file_of_weights_is_named(checkpoint: Path, damage: str) -> None:
    weights = checkpoint / "model.safetensors"
    content = weights.read_bytes()
    changed = {
        "cut": content[:-1],
        "longer": content + b"x",
        "header": struct.pack("<Q", 10) + content[8:],
        "empty": b"",
    }
    weights.write_bytes(changed[damage])
    with pytest.raises(ConfigError, match=r"model.safetensors of here is no whole safetensors file.*fetch it again"):
        check_checkpoint(checkpoint, tuple(FILES), "here")


def test_weights_are_counted() -> None:
    found = check_checkpoint(QUICKSTART, tuple(FILES), "here")
    assert found.architecture == "LlamaForCausalLM"
    # Embedding 3072 x 256; 4 layers: attention (256 x 512 x 2 + 256 x 256 x 2), MLP (3 x 256 x 512), norms; last norm.
    assert found.parameters == 3072 * 256 + 4 * (2 * 256 * 512 + 2 * 256 * 256 + 3 * 256 * 512 + 2 * 256) + 256
    assert found.parameters == count_parameters([QUICKSTART / "model.safetensors"], "here")


def test_a_checkpoint_without_a_fast_tokenizer_is_refused(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer.json does not exist"):
        check_checkpoint(checkpoint, tuple(FILES), "here")


@pytest.mark.parametrize(
    ("content", "message"), [("[]", "no JSON object"), ("{", "cannot be read"), ("{}", "architect")]
)
def test_a_broken_configuration_is_refused(checkpoint: Path, content: str, message: str) -> None:
    (checkpoint / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        check_checkpoint(checkpoint, tuple(FILES), "here")


def test_a_url_is_listed_and_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYTRT_BUNDLE_CACHE", str(tmp_path / "cache"))
    storage = fsspec.filesystem("memory")
    for name in FILES:
        storage.pipe_file(f"/models/quick/{name}", (QUICKSTART / name).read_bytes())
    storage.pipe_file("/models/quick/original/consolidated.pth", b"x")
    build = spec("memory://models/quick")
    listing = list_source(build, DigestCache())
    assert sorted(listing.files) == FILES
    output = tmp_path / "output"
    output.mkdir()
    told: list[int] = []
    assert fetch_source(build, listing, output, lambda done, _name: told.append(done)) == output
    assert told[-1] == listing.size_bytes
    assert {path.name: path.read_bytes() for path in output.iterdir()} == {
        name: (QUICKSTART / name).read_bytes() for name in FILES
    }
    assert not list((tmp_path / "cache/work").iterdir())
    storage.pipe_file("/models/quick/config.json", b"{ }")
    assert list_source(build, DigestCache()).digest != listing.digest


def test_a_download_goes_on_with_what_there_is(tmp_path: Path) -> None:
    storage = fsspec.filesystem("memory")
    for name in ("config.json", "model.safetensors"):
        storage.pipe_file(f"/models/other/{name}", b"whole")
    location = UrlLocation("memory://models/other")
    listing = list_url(location, allow_pickle=False, allow_code=False)
    (tmp_path / "config.json").write_bytes(b"here!")  # of this size, from an earlier try
    (tmp_path / "model.safetensors.part").write_bytes(b"wh")
    fetch_url(location, listing, tmp_path, lambda *_: None)
    assert (tmp_path / "config.json").read_bytes() == b"here!"
    assert (tmp_path / "model.safetensors").read_bytes() == b"whole"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_url_with_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is nothing at memory://none/there"):
        list_source(spec("memory://none/there"), DigestCache())
    with pytest.raises(ConfigError, match="use a URL that fsspec knows"):
        list_source(spec("nosuchprotocol://x/y"), DigestCache())


COMMIT = "c0ffee" + "0" * 34


class Hub(BaseHTTPRequestHandler):
    """As much of a Hugging Face hub as a download takes."""

    files: Mapping[str, bytes] = {}

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path in (
            "/api/models/org/model",
            f"/api/models/org/model/revision/{COMMIT}",
            "/api/models/org/model/revision/main",
        ):
            siblings = [
                {"rfilename": name, "size": len(content), "blobId": _blob(content)}
                for name, content in self.files.items()
            ]
            self._send(json.dumps({"id": "org/model", "sha": COMMIT, "siblings": siblings}).encode(), {}, body)
        elif path.startswith(f"/org/model/resolve/{COMMIT}/"):
            content = self.files[path.rsplit("/", 1)[-1]]
            self._send(content, {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": COMMIT}, body)
        else:
            code = "RevisionNotFound" if "/org/model/" in path else "RepoNotFound"
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, content: bytes, headers: Mapping[str, str], body: bool) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.files = {name: (QUICKSTART / name).read_bytes() for name in FILES} | {"README.md": b"a model", "x.bin": b"p"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def with_hub(program: str, endpoint: str, home: Path) -> Any:
    """Run a program in a process of its own: the library reads its variables when it is imported."""
    environ = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environ.pop("HF_HUB_OFFLINE", None)
    lines = [
        "import json, sys; from pathlib import Path",
        "from builders.source.reading import *; from builders.spec import parse_spec",
        "from serve.errors import ConfigError",
        "from serve.artifacts.digests import DigestCache",
        "spec = lambda location: parse_spec({'name': 'm', 'source': location})",
        program,
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


FETCH = """
found = []
for location in ("hf://org/model", "org/model@main"):
    listing = list_source(spec(location), DigestCache())
    found.append(listing.digest)
output = Path({output!r})
output.mkdir()
fetch_source(spec("hf://org/model"), listing, output, lambda *_: None)
pinned = pinned_source(spec("org/model").source, listing, Path("/"))
print(json.dumps([found, listing.revision, pinned.location, pinned.revision]))
"""
REFUSED = """
def reason(location):
    try:
        list_source(spec(location), DigestCache())
    except ConfigError as exc:
        return str(exc)
print(json.dumps([reason("hf://org/none"), reason("hf://org/model@none")]))
"""
OFFLINE = """
listing = list_source(spec("hf://org/model"), DigestCache())
try:
    list_source(spec("hf://org/other"), DigestCache())
    reason = ""
except ConfigError as exc:
    reason = str(exc)
print(json.dumps([listing.digest, listing.revision, reason]))
"""


def test_a_model_of_a_hub_is_listed_fetched_and_found_without_a_network(hub: str, tmp_path: Path) -> None:
    output = tmp_path / "output"
    digests, revision, location, pinned = with_hub(FETCH.replace("{output!r}", repr(str(output))), hub, tmp_path / "hf")
    assert digests[0] == digests[1]
    assert (revision, location, pinned) == (COMMIT, "hf://org/model", COMMIT)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == {
        name: (QUICKSTART / name).read_bytes() for name in FILES
    }
    nowhere = "http://127.0.0.1:9"
    digest, again, reason = with_hub(OFFLINE, nowhere, tmp_path / "hf")
    assert (digest, again) == (digests[0], COMMIT)
    assert "the hub cannot be asked for hf://org/other" in reason
    assert "hf download" in reason


def test_a_hub_without_such_a_model_is_told(hub: str, tmp_path: Path) -> None:
    no_model, no_revision = with_hub(REFUSED, hub, tmp_path / "hf")
    assert "the hub has no model 'org/none'" in no_model
    assert "org/model has no revision 'none'" in no_revision
