"""What an operator writes, and what is said to one who mistypes."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.config import AppConfig, parse_app_config
from serve.config_file import read_config_file
from serve.engines.simulated.settings import SimulatedSettings
from serve.engines.transformers.settings import TransformersSettings
from serve.errors import ConfigError
from tools import config_reference

REPOSITORY = Path(__file__).parents[2]


def model(**settings: Any) -> dict[str, Any]:
    return {"models": [{"id": "m", **settings}]}


def test_nothing_at_all_serves_the_built_in_model() -> None:
    config = parse_app_config({})
    assert config == AppConfig()
    config.models[0].check_files()


def test_an_engine_is_a_name_or_a_section() -> None:
    assert parse_app_config(model(engine="simulated")).models[0].engine == SimulatedSettings()
    section = parse_app_config(model(engine={"kind": "transformers", "max_waiting": 7})).models[0].engine
    assert section == TransformersSettings(max_waiting=7)


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (model(replica=2), r"cfg.models\[0\].replica: there is no such setting"),
        (model(replicas=0), r"cfg.models\[0\].replicas: .*greater than 0.*got 0"),
        (model(replicas=1, autoscaling={}), "`replicas` and `autoscaling` exclude each other"),
        (model(autoscaling={"min_replicas": 3, "max_replicas": 2}), "min_replicas=3 exceeds max_replicas=2"),
        (model(engine="vllm"), r"cfg.models\[0\].engine: .*'vllm'.*'transformers'.*'simulated'"),
        (model(engine={"kind": "transformers", "dtyp": "auto"}), r"engine.*dtyp: there is no such setting"),
        (model(resources={"num_gpus": -1}), r"resources.num_gpus: .*got -1"),
        (model(parallel={"pipeline": 2}), r"parallel.pipeline=2: the transformers engine has tensor parallelism only"),
        (model(engine="simulated", parallel={"expert": 1}), "parallel.expert=1: the simulated engine"),
        (model(parallel={"tensor": 2}, resources={"num_gpus": 0.5}), "resources.num_gpus=0.5 is what each of 2 ranks"),
        (model(parallel={"tensor": 4, "gpus_per_node": 2}), "tensor=4 exceeds gpus_per_node=2"),
        (
            model(engine={"kind": "trtllm", "orchestrator": "in_process"}, parallel={"tensor": 2}),
            "use mpi, ray or auto",
        ),
        (
            model(
                engine={"kind": "trtllm", "orchestrator": "ray"}, parallel={"tensor": 2}, resources={"num_cpus": 0.5}
            ),
            "resources.num_cpus=0.5: each of TensorRT-LLM's Ray workers takes a whole CPU core",
        ),
        (model(fallback="transformers"), "fallback: the engine is `transformers` already"),
        (model(engine="trtllm", fallback="simulated"), r"fallback\.kind: .*'transformers'"),
        (model(engine="trtllm", engine_env={}), r"engine_env: give exactly one of py_executable"),
        ({"models": []}, "cfg.models: .*at least 1"),
        ({"models": [{"id": "a/b"}, {"id": "a:b"}]}, "same deployment_name: model-a-b"),
        ({"models": [{"id": "a"}, {"id": "a"}]}, "same id: a"),
        ({"models": [{"id": "white space"}]}, r"models\[0\].id: .*'white space'"),
        ({"gateway": {"limits": {"max_body_bytes": "much"}}}, r"gateway.limits.max_body_bytes: .*got 'much'"),
        (["models"], "cfg: .*"),
    ],
)
def test_a_mistake_is_answered_with_key_value_and_remedy(args: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_app_config(args, "cfg")


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_app_config({"models": [{"id": "m", "replicas": 0, "colour": "red"}], "gatway": {}})
    assert len(str(caught.value).splitlines()) == 3


def test_missing_files_are_named_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"models\[m\].model: .* has no tokenizer.json; give the directory"):
        parse_app_config(model(model=str(tmp_path))).models[0].check_files()
    with pytest.raises(ConfigError, match="there is builtin:quickstart"):
        parse_app_config(model(model="builtin:gpt5")).models[0].check_files()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("applications: [", r"bad.yaml is no YAML: .*line 1"),
        ("- 1", "no list `applications`"),
        ("applications: [{import_path: other:app}]", "no application has `import_path: serve.app:build_app`"),
        ("applications: [{import_path: 'serve.app:build_app', args: {x: 1}}]", r"applications\[0\].args.x"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"(?s){complaint}"):
        read_config_file(path)
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        read_config_file(tmp_path / "absent.yaml")


# The simulator's own files and the builds are read by their tests.
OTHERS = ("builds", "slo", "workloads")
SERVED = [path for path in (REPOSITORY / "configs").glob("**/*.yaml") if path.parent.name not in OTHERS]


@pytest.mark.parametrize("path", sorted(SERVED), ids=lambda path: path.stem)
def test_the_configs_in_the_repository_are_good(path: Path) -> None:
    assert read_config_file(path)


def test_the_reference_is_current() -> None:
    assert config_reference.TARGET.read_text() == config_reference.reference(), "run `make docs`"


def test_the_reference_shows_configs_that_work() -> None:
    blocks = (REPOSITORY / "docs/configuration.md").read_text().split("```yaml\n")[1:]
    documents = [yaml.safe_load(block.split("```")[0]) for block in blocks]
    assert documents
    for document in documents:
        for application in document["applications"]:
            parse_app_config(application["args"])
