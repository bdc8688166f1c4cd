"""The library's own argument models (their doubles, typed by the signatures) take every call that settings lead to."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from serve.engines.trtllm.arguments import EnginePlan
from serve.engines.trtllm.call import make
from serve.engines.trtllm.line import Backend, Line, detect
from serve.engines.trtllm.signature_data import check_names
from tests.doubles.install import LineName, installed
from tests.unit.engines.trtllm.test_arguments_exhaustive import CASES, SETTINGS, Case, outcome

NAMES: dict[Line, LineName] = {Line.V1_2: "1.2.x", Line.NEWEST: "newest"}
MODELS = {Backend.PYTORCH: "TorchLlmArgs", Backend.TENSORRT: "TrtLlmArgs"}


@pytest.fixture(params=list(Line))
def line(request: pytest.FixtureRequest) -> Iterator[Line]:
    line: Line = request.param
    with installed(NAMES[line]):
        yield line


def plans(case: Case) -> Iterator[EnginePlan]:
    for setting in SETTINGS:
        plan = outcome(setting.document(), case)
        if isinstance(plan, EnginePlan):
            yield plan


def test_the_double_is_detected_as_its_line(line: Line) -> None:
    found = detect()
    assert (found.line, found.tensorrt) == (line, line is Line.V1_2)


def test_every_call_is_accepted_name_by_name_and_value_by_value(line: Line) -> None:
    for case in CASES:
        if case.line is line:
            for plan in plans(case):
                check_names(plan.call, line, installed=True)
                arguments = make(replace(plan.call, target=f"trtllm_double.configs:{MODELS[plan.backend]}"))
                assert arguments.model == "/models/one"
