import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from serve.core.request import pack_tokens
from serve.errors import ConfigError, RequestError
from serve.ingress.models import load_model
from serve.ingress.openai import UserMessage
from tests.unit.ingress.tiny_model import write_json


@pytest.fixture
def directory(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def test_a_model_is_read_from_its_files(directory: Path) -> None:
    model = load_model("m", directory, created=5, owned_by="us")
    assert (model.id, model.created, model.owned_by) == ("m", 5, "us")
    assert model.context_tokens == 512
    assert model.vocab_size == 512
    assert model.text.eos_token_ids == (2, 4)
    assert model.text.render([UserMessage("Hi")]) == "<|bos|><|user|>Hi<|eos|><|assistant|>"


def test_the_configured_context_wins(directory: Path) -> None:
    assert load_model("m", directory, context_tokens=100).context_tokens == 100


def test_the_numbers_of_a_model_with_other_senses_are_nested(directory: Path) -> None:
    write_json(directory / "config.json", {"text_config": {"max_position_embeddings": 99, "vocab_size": 1000}})
    model = load_model("m", directory)
    assert (model.context_tokens, model.vocab_size) == (99, 1000)


def test_a_context_that_no_file_tells_is_an_error(directory: Path) -> None:
    write_json(directory / "config.json", {})
    edit(directory / "tokenizer_config.json", model_max_length=10**30)
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        load_model("m", directory)
    edit(directory / "tokenizer_config.json", model_max_length=77)
    assert load_model("m", directory).context_tokens == 77


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 4}, {}, (2, 4)),
        ({"eos_token_id": [4, 5]}, {"eos_token_id": 6}, (2, 4, 5)),
        ({}, {"eos_token_id": 6}, (2, 6)),
        ({}, {}, (2,)),
    ],
)
def test_every_end_of_text_is_known(
    directory: Path, generation: dict[str, Any], config: dict[str, Any], expected: tuple[int, ...]
) -> None:
    write_json(directory / "generation_config.json", generation)
    write_json(directory / "config.json", {"max_position_embeddings": 512} | config)
    assert load_model("m", directory).text.eos_token_ids == expected


def test_a_template_of_its_own_file_wins(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("own: {{ messages[0].content }}")
    assert load_model("m", directory).text.render([UserMessage("Hi")]) == "own: Hi"


def test_named_templates_have_a_default(directory: Path) -> None:
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    edit(directory / "tokenizer_config.json", chat_template=templates)
    assert load_model("m", directory).text.render([UserMessage("Hi")]) == "yes"


def test_a_model_without_template_completes_only(directory: Path) -> None:
    edit(directory / "tokenizer_config.json", chat_template=None)
    with pytest.raises(RequestError, match="/v1/completions"):
        load_model("m", directory).text.render([UserMessage("Hi")])


@pytest.mark.parametrize(("add_bos", "has_bos"), [(None, True), (True, True), (False, False)])
def test_add_bos_token_wins_over_the_post_processor(directory: Path, add_bos: bool | None, has_bos: bool) -> None:
    edit(directory / "tokenizer_config.json", add_bos_token=add_bos)
    text = load_model("m", directory).text
    packed = text.encode("hello", add_special_tokens=True, room=100, param="prompt")
    bare = text.encode("hello", add_special_tokens=False, room=100, param="prompt")
    assert packed == (pack_tokens([1]) + bare if has_bos else bare)


def test_bos_is_added_where_the_tokenizer_does_not(directory: Path) -> None:
    edit(directory / "tokenizer.json", post_processor=None)
    assert load_model("m", directory).text.encode("", add_special_tokens=True, room=9, param="p") == b""
    edit(directory / "tokenizer_config.json", add_bos_token=True)
    packed = load_model("m", directory).text.encode("", add_special_tokens=True, room=9, param="p")
    assert memoryview(packed).cast("I").tolist() == [1]


def test_truncation_in_the_file_never_cuts_a_prompt(directory: Path) -> None:
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    edit(directory / "tokenizer.json", truncation=truncation)
    packed = load_model("m", directory).text.encode("hello " * 50, add_special_tokens=True, room=500, param="prompt")
    assert len(packed) > 4 * 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "AutoTokenizer"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("tokenizer_config.json", "{", "tokenizer_config.json"),
        ("config.json", "[]", "config.json"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template"),
        ("tokenizer_config.json", '{"chat_template": "{% for %}"}', "key chat_template, line 1"),
    ],
)
def test_a_broken_file_is_named(directory: Path, name: str, content: str | None, message: str) -> None:
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_model("m", directory)
    assert str(directory) in str(caught.value)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        load_model("m", tmp_path / "nowhere")
