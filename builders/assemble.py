"""A candidate: a bundle's directory as it would be published, made of hard links to what the steps made."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from builders.context import StepInput, StepName
from builders.links import link_or_copy
from builders.source.selection import CONFIG, tokenizer_files
from builders.spec import BuildSpec
from serve.artifacts.manifest import CACHES, CERTIFICATES, MODEL, RUNTIME, TOKENIZER, BundleKind, BundleRuntime

GENERATION = "generation_config.json"
# What tune tells besides its settings, kept beside the certificates.
_TUNING = ("tuning.json", "tuning.png")


def assemble(spec: BuildSpec, inputs: Mapping[StepName, StepInput], target: Path) -> None:
    """Lay out a bundle, as far as the steps have made it.

    Args:
        spec: Of the build.
        inputs: What the steps made; at least the source and what its model is made of.
        target: A directory that does not exist.
    """
    source = inputs[StepName.FETCH]
    names = [str(name) for name in source.result["files"]]
    _lay_model(spec, inputs, names, target / MODEL)
    # config.json comes with the tokenizer: the gateway reads the context's length and the end tokens there.
    sides = {*tokenizer_files(names), *({CONFIG, GENERATION} & set(names))}
    _link(((source.directory / name, name) for name in sorted(sides)), target / TOKENIZER)
    makers = [inputs[step] for step in (StepName.COMPILE, StepName.TUNE) if step in inputs]
    runtime = BundleRuntime(engine={"kind": spec.kind.engine, **spec.engine}).model_dump(mode="json")
    for maker in makers:
        if (maker.directory / RUNTIME).is_file():
            runtime = json.loads((maker.directory / RUNTIME).read_bytes())
        _link(_below(maker.directory / CACHES), target / CACHES)
    (target / RUNTIME).write_text(json.dumps(BundleRuntime.model_validate(runtime).model_dump(mode="json"), indent=2))
    if StepName.VERIFY in inputs:
        _link(_below(inputs[StepName.VERIFY].directory / CERTIFICATES), target / CERTIFICATES)
        tuned = inputs[StepName.TUNE].directory
        _link(((tuned / name, name) for name in _TUNING if (tuned / name).is_file()), target / CERTIFICATES)


def link_tree(source: Path, target: Path) -> None:
    """Give all files of a directory second names in another one, or copy them where file systems differ."""
    _link(_below(source), target)


def _lay_model(spec: BuildSpec, inputs: Mapping[StepName, StepInput], names: list[str], target: Path) -> None:
    source = inputs[StepName.FETCH].directory
    compiled = inputs[StepName.COMPILE].directory / MODEL if StepName.COMPILE in inputs else None
    if compiled is not None and compiled.is_dir():
        _link(_below(compiled), target)
    elif StepName.QUANTIZE in inputs:
        _link(_below(inputs[StepName.QUANTIZE].directory), target)
    else:
        _link(((source / name, name) for name in names), target)
    if spec.kind is not BundleKind.TENSORRT_ENGINE:
        # A checkpoint that any tool can read has its tokenizer beside it.
        sides = (*tokenizer_files(names), *({GENERATION} & set(names)))
        _link(((source / name, name) for name in sides if not (target / name).exists()), target)


def _below(directory: Path) -> Iterable[tuple[Path, str]]:
    if not directory.is_dir():
        return ()
    return ((path, path.relative_to(directory).as_posix()) for path in sorted(directory.rglob("*")) if path.is_file())


def _link(files: Iterable[tuple[Path, str]], target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for source, name in files:
        link_or_copy(source, target / name)
