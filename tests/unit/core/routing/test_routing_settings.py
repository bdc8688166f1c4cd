"""Settings of the policies: names, sections, defaults, mistakes."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from serve.core.routing.policies.dynamo import DynamoPolicy
from serve.core.routing.policies.predictive import PredictivePolicy
from serve.core.routing.settings import POLICY_NAMES, PolicySettings, make_policy, parse_policy


class Config(BaseModel):
    routing: PolicySettings


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_bare_name_is_the_policy_with_its_defaults(name: str) -> None:
    policy = make_policy(Config.model_validate({"routing": name}).routing)
    assert policy.name == name
    assert policy == type(policy)()  # the settings have the policy's defaults


def test_auto_is_predictive_and_the_default() -> None:
    assert isinstance(make_policy(parse_policy("auto")), PredictivePolicy)
    assert isinstance(make_policy(parse_policy({})), PredictivePolicy)


def test_a_section_changes_parameters() -> None:
    policy = make_policy(parse_policy({"policy": "dynamo", "prefill_load_scale": 2.5, "temperature": 0.1}))
    assert policy == DynamoPolicy(prefill_load_scale=2.5, temperature=0.1)


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("dynamoo", "did you mean dynamo"),
        ({"policy": "dynamo", "overlap_credit": 1.5}, "less than or equal to 1"),
        ({"policy": "dynamo", "homes": 2}, "Extra inputs"),
        ({"policy": "lora_affinity", "homes": 0}, "greater than 0"),
        ({"policy": "session_affinity", "overload_factor": 0.5}, "greater than or equal to 1"),
        (3, "give the name of a policy"),
    ],
)
def test_mistakes_are_told(section: Any, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        parse_policy(section)
