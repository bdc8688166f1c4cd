"""What is thought of a rollout, from what Serve tells."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.rollout import AppSight, DeploymentSight, RolloutLimits, RolloutState, Stage, judge

LIMITS = RolloutLimits(timeout_s=100.0, unhealthy_s=20.0)
TRACEBACK = """Failed to update the deployments ['m'].
ray::ServeReplica.initialize()
  File "replica.py", line 1, in __init__
    raise exc
serve.errors.BundleMismatch: node abc: bundle tiny cannot be loaded here"""


def app(status: str, message: str = "", **deployments: str) -> AppSight:
    return AppSight(status, message, {name: DeploymentSight(state) for name, state in deployments.items()})


@pytest.mark.parametrize(
    ("sight", "stage"),
    [
        (None, Stage.UNDER_WAY),
        (app("DEPLOYING"), Stage.UNDER_WAY),
        (app("NOT_STARTED"), Stage.UNDER_WAY),
        (app("DEPLOYING", m="UPDATING", gateway="HEALTHY"), Stage.UNDER_WAY),
        (app("RUNNING", m="UPDATING"), Stage.UNDER_WAY),
        (app("RUNNING", m="HEALTHY", gateway="HEALTHY"), Stage.DONE),
        (app("RUNNING", m="UPSCALING", gateway="DOWNSCALING"), Stage.DONE),
        (app("DEPLOY_FAILED"), Stage.FAILED),
        (app("DEPLOYING", m="DEPLOY_FAILED"), Stage.FAILED),
        (app("UNHEALTHY", m="UNHEALTHY"), Stage.UNDER_WAY),
    ],
)
def test_an_applications_status_says_how_far_it_is(sight: AppSight | None, stage: Stage) -> None:
    assert judge(RolloutState(), {"llm": sight}, 1.0, LIMITS).stage is stage


def test_one_application_that_fails_is_enough_and_one_that_is_done_is_not() -> None:
    done = app("RUNNING", m="HEALTHY")
    assert judge(RolloutState(), {"a": done, "b": app("DEPLOY_FAILED")}, 1.0, LIMITS).stage is Stage.FAILED
    assert judge(RolloutState(), {"a": done, "b": app("DEPLOYING")}, 1.0, LIMITS).stage is Stage.UNDER_WAY


def test_unhealthy_is_failed_only_if_it_lasts() -> None:
    sick, state = {"llm": app("UNHEALTHY", m="UNHEALTHY")}, RolloutState()
    for now_s in (10.0, 29.0):
        verdict = judge(state, sick, now_s, LIMITS)
        assert verdict.stage is Stage.UNDER_WAY
        state = verdict.state
    state = judge(state, {"llm": app("DEPLOYING")}, 29.5, LIMITS).state
    state = judge(state, sick, 31.0, LIMITS).state
    assert judge(state, sick, 50.0, LIMITS).stage is Stage.UNDER_WAY
    assert judge(state, sick, 51.0, LIMITS).stage is Stage.FAILED


@given(st.floats(100.0, 1e6), st.sampled_from(["DEPLOYING", "NOT_STARTED", "DELETING"]))
def test_no_rollout_goes_on_for_ever(elapsed_s: float, status: str) -> None:
    verdict = judge(RolloutState(), {"llm": app(status)}, elapsed_s, LIMITS)
    assert verdict.stage is Stage.FAILED
    assert "not done after 100 s" in verdict.text


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (TRACEBACK, "llm: serve.errors.BundleMismatch: node abc: bundle tiny cannot be loaded here"),
        ("The deployment failed to start 3 times.\nSee the log.", "llm: The deployment failed to start 3 times."),
        ("", "llm: DEPLOY_FAILED"),
    ],
)
def test_the_reason_is_the_line_that_says_most(message: str, shown: str) -> None:
    assert judge(RolloutState(), {"llm": app("DEPLOY_FAILED", message)}, 1.0, LIMITS).text == shown


def test_what_goes_on_is_told_by_the_deployments_that_change() -> None:
    deployments = {
        "m": DeploymentSight("UPDATING", replicas={"RUNNING": 1, "STARTING": 2}),
        "gateway": DeploymentSight("HEALTHY", replicas={"RUNNING": 1}),
    }
    verdict = judge(RolloutState(), {"llm": AppSight("DEPLOYING", deployments=deployments), "x": None}, 1.0, LIMITS)
    assert verdict.text == "llm: m: 1 running, 2 starting; x: not there yet"
