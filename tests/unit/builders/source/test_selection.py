"""Which files of a checkpoint are taken, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.source.selection import check_shards, is_pickle, select_files, tokenizer_files
from serve.errors import ConfigError

SIDES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


def select(*names: str, allow_pickle: bool = False, allow_code: bool = False) -> set[str]:
    taken = select_files(names, allow_pickle=allow_pickle, allow_code=allow_code, where="here")
    assert list(taken) == sorted(taken)
    return set(taken)


def test_weights_are_taken_once_in_the_safest_format() -> None:
    found = select(
        *SIDES, "model.safetensors", "pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors",
        "model.gguf", "onnx/model.onnx", "README.md", ".gitattributes", "training_args.bin", "optimizer.pt",
    )  # fmt: skip
    assert found == {*SIDES, "model.safetensors"}


def test_shards_come_with_their_index() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    found = select(*SIDES, *shards, "model.safetensors.index.json", "pytorch_model.bin.index.json")
    assert found == {*SIDES, *shards, "model.safetensors.index.json"}


def test_templates_and_other_tokenizers_are_taken() -> None:
    extra = ["chat_template.jinja", "tokenizer.model", "additional_chat_templates/tool.jinja", "merges.txt"]
    assert select(*SIDES, "model.safetensors", *extra) >= set(extra)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.ckpt"])
def test_pickles_alone_are_refused_unless_they_are_allowed(name: str) -> None:
    if name.startswith("consolidated"):
        with pytest.raises(ConfigError, match="no weights"):
            select(*SIDES, name)
        return
    with pytest.raises(
        ConfigError, match=rf"source.allow_pickle: here has its weights as Python pickles only \({name}"
    ):
        select(*SIDES, name)
    assert select(*SIDES, name, allow_pickle=True) == {*SIDES, name}


def test_code_is_taken_only_if_the_engine_may_run_it() -> None:
    names = [*SIDES, "model.safetensors", "modeling_own.py"]
    assert "modeling_own.py" not in select(*names)
    assert "modeling_own.py" in select(*names, allow_code=True)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.safetensors"], "holds no config.json"),
        (["model.gguf"], "GGUF files"),
        (SIDES, "holds no weights"),
    ],
)
def test_what_is_no_checkpoint_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(*names)


def test_a_missing_shard_is_named() -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"}}
    with pytest.raises(
        ConfigError, match=r"lacks 2 of the 3 weight files .*: model-2.safetensors, model-3.safetensors"
    ):
        check_shards({"model-1.safetensors"}, index, "model.safetensors.index.json", "here")
    check_shards({f"model-{number}.safetensors" for number in (1, 2, 3)}, index, "index", "here")
    with pytest.raises(ConfigError, match="no weight_map"):
        check_shards(set(), {}, "index", "here")


def test_the_tokenizer_is_what_the_gateway_reads() -> None:
    assert tokenizer_files([*SIDES, "model.safetensors", "chat_template.jinja"]) == (
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    )  # fmt: skip


NAMES = st.sampled_from(
    [*SIDES, "model.safetensors", "a.safetensors", "pytorch_model.bin", "x.pt", "code.py", "sub/y.bin", "sub/z.json"]
)


@given(st.sets(NAMES), st.booleans(), st.booleans())
def test_nothing_that_runs_is_taken_unasked(names: set[str], allow_pickle: bool, allow_code: bool) -> None:
    try:
        found = select(*names, allow_pickle=allow_pickle, allow_code=allow_code)
    except ConfigError:
        return
    assert found <= names
    assert allow_pickle or not any(map(is_pickle, found))
    assert allow_code or not any(name.endswith(".py") for name in found)
    assert any(name.endswith(".safetensors") for name in found) != any(map(is_pickle, found))
