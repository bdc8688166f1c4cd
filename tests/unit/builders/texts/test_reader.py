"""Texts: which samples are drawn, how they are encoded, and what is said about a mistake in a file."""

import json
from pathlib import Path

import pytest
from blake3 import blake3

import builders.texts
from builders.settings.quantize import TextsSettings
from builders.texts.encoder import PromptEncoder
from builders.texts.package import Purpose, package_texts_digest
from builders.texts.reader import read_texts
from serve.errors import ConfigError

_PURPOSES: tuple[Purpose, ...] = ("calibration", "evaluation")
TEXTS = Path(builders.texts.__path__[0]) / "data"
QUICKSTART = Path(__file__).resolve().parents[4] / "serve" / "models" / "quickstart"


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(QUICKSTART)


@pytest.fixture(scope="module")
def without_template(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    directory = tmp_path_factory.mktemp("base_model")
    (directory / "tokenizer.json").write_bytes((QUICKSTART / "tokenizer.json").read_bytes())
    return PromptEncoder(directory)


def write(directory: Path, *lines: object, name: str = "texts.jsonl") -> dict[str, Path]:
    path = directory / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: path}


def settings(**values: object) -> TextsSettings:
    return TextsSettings.model_validate({"file": "texts.jsonl", **values})


def test_package_texts_serve_every_purpose_without_sharing_a_sample(encoder: PromptEncoder) -> None:
    every = TextsSettings(samples=10_000, max_tokens=4096)
    calibration, evaluation = ({s.text for s in read_texts(every, {}, encoder, p)} for p in _PURPOSES)
    assert min(len(calibration), len(evaluation)) >= 100
    assert not calibration & evaluation


def test_package_texts_do_for_a_model_without_chat_template(without_template: PromptEncoder) -> None:
    assert len(read_texts(TextsSettings(samples=100), {}, without_template, "evaluation")) == 100


def test_same_seed_draws_the_same_samples_and_another_seed_others(encoder: PromptEncoder) -> None:
    drawn = [read_texts(TextsSettings(samples=16, seed=seed), {}, encoder, "evaluation") for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_digest_of_the_package_texts_is_that_of_their_files() -> None:
    content = b"".join((TEXTS / f"{purpose}.jsonl").read_bytes() for purpose in _PURPOSES)
    assert package_texts_digest() == blake3(content).hexdigest()


def test_long_texts_are_cut_and_beginnings_fit_their_kind(encoder: PromptEncoder, tmp_path: Path) -> None:
    files = write(
        tmp_path,
        {"text": "What is a KV block? " * 200},
        {"prompt": "What is a KV block?"},
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day to you."}]},
        {"messages": [{"role": "user", "content": "Hello"}]},
    )
    samples = read_texts(settings(max_tokens=64), files, encoder, "evaluation")
    asked, prompt, answered, passage = sorted(samples, key=lambda sample: len(sample.tokens))
    assert (len(passage.tokens), passage.prompt_tokens) == (64, 32)
    assert prompt.prompt == prompt.tokens == encoder.encode("What is a KV block?").tokens
    assert asked.prompt == asked.tokens == answered.prompt
    assert encoder.decode(answered.tokens[answered.prompt_tokens :]) == "Good day to you."


def test_plain_text_has_a_sample_between_blank_lines(encoder: PromptEncoder, tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("\nFirst text,\nsecond line.\n\n\nSecond text.\n")
    samples = read_texts(settings(file="texts.txt"), {"texts.txt": path}, encoder, "calibration")
    assert {s.text for s in samples} == {"First text,\nsecond line.", "Second text."}


def test_line_separators_inside_json_end_no_line(encoder: PromptEncoder, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two words here"}, ensure_ascii=False), encoding="utf-8")
    (sample,) = read_texts(settings(), {"texts.jsonl": path}, encoder, "calibration")
    assert sample.text == "one\u2028two words here"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"txt": "x"}, "exactly one of text, prompt and messages (got none of them, but txt)"),
        ({"text": "x", "prompt": "y"}, "exactly one of text, prompt and messages (got text and prompt)"),
        ({"text": "  "}, "text: '  ' is no text"),
        ({"prompt": 7}, "prompt: 7 is no text"),
        ({"messages": []}, "the list is empty"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "write them as for /v1/chat/completions"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "there is an answer and no question"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "role 'tool' is not supported"),
        ([1], "is no JSON object"),
    ],
)
def test_mistakes_name_file_and_line(encoder: PromptEncoder, tmp_path: Path, line: object, said: str) -> None:
    files = write(tmp_path, {"text": "a good line"}, line)
    with pytest.raises(ConfigError) as caught:
        read_texts(settings(), files, encoder, "calibration")
    assert str(caught.value).startswith("texts.jsonl, line 2: ")
    assert said in str(caught.value)


def test_broken_json_names_file_and_line(encoder: PromptEncoder, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "good"}\n\n{"text": \n')
    with pytest.raises(ConfigError, match=r"^texts\.jsonl, line 3: "):
        read_texts(settings(), {"texts.jsonl": path}, encoder, "calibration")


def test_files_that_hold_nothing_or_are_missing_are_refused(encoder: PromptEncoder, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    files = {name: tmp_path / name for name in ("empty.jsonl", "bytes.txt")}
    for name, said in (("empty.jsonl", "no sample"), ("bytes.txt", "UTF-8"), ("missing.jsonl", "no such file")):
        with pytest.raises(ConfigError, match=said):
            read_texts(settings(file=name), files, encoder, "calibration")


def test_messages_of_a_user_need_a_chat_template(without_template: PromptEncoder, tmp_path: Path) -> None:
    files = write(tmp_path, {"messages": [{"role": "user", "content": "Hello"}]})
    with pytest.raises(ConfigError, match="line 1: This model has no chat template"):
        read_texts(settings(), files, without_template, "calibration")
