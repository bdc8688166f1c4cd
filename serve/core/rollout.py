"""Rollout: from what Serve says of an application, whether a deployment of it is under way, done, or has failed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Stage(StrEnum):
    """How far a rollout is."""

    UNDER_WAY = "under way"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class DeploymentSight:
    """One deployment, as Serve tells it.

    Attributes:
        status: HEALTHY, UPDATING, UNHEALTHY, DEPLOY_FAILED, UPSCALING or DOWNSCALING.
        message: Serve's, of any length.
        replicas: How many are in each state: RUNNING, STARTING, STOPPING, ...
    """

    status: str
    message: str = ""
    replicas: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class AppSight:
    """One application, as Serve tells it.

    Attributes:
        status: RUNNING, DEPLOYING, DEPLOY_FAILED, UNHEALTHY, NOT_STARTED or DELETING.
        message: Serve's, of any length.
        deployments: By name.
    """

    status: str
    message: str = ""
    deployments: Mapping[str, DeploymentSight] = field(default_factory=dict)


@dataclass(frozen=True)
class RolloutState:
    """What a rollout has to remember.

    Attributes:
        unhealthy_since_s: Since when some application has been unhealthy without a break; None: it is not.
    """

    unhealthy_since_s: float | None = None


@dataclass(frozen=True)
class RolloutLimits:
    """How long is waited.

    Attributes:
        timeout_s: For all of it.
        unhealthy_s: For an application that is unhealthy: Serve replaces replicas that fail, which may help.
    """

    timeout_s: float
    unhealthy_s: float = 60.0


@dataclass(frozen=True)
class Verdict:
    """What is to be thought of a rollout.

    Attributes:
        stage: How far it is.
        text: What goes on, or why it failed; for people.
        state: To be remembered.
    """

    stage: Stage
    text: str
    state: RolloutState


def judge(state: RolloutState, apps: Mapping[str, AppSight | None], elapsed_s: float, limits: RolloutLimits) -> Verdict:
    """Judge a rollout.

    Args:
        state: Of the last time.
        apps: The applications that are rolled out; None: Serve does not know it yet.
        elapsed_s: Since it began.
        limits: How long is waited.
    """
    text = "; ".join(filter(None, (_progress(name, app) for name, app in apps.items())))
    failed = [f"{name}: {_reason(app)}" for name, app in apps.items() if app is not None and _has_failed(app)]
    if failed:
        return Verdict(Stage.FAILED, "; ".join(failed), state)
    sick = [f"{name}: {_reason(app)}" for name, app in apps.items() if app is not None and app.status == "UNHEALTHY"]
    since_s = (elapsed_s if state.unhealthy_since_s is None else state.unhealthy_since_s) if sick else None
    state = RolloutState(since_s)
    if since_s is not None and elapsed_s - since_s >= limits.unhealthy_s:
        return Verdict(Stage.FAILED, f"unhealthy for {elapsed_s - since_s:.0f} s: {'; '.join(sick)}", state)
    if all(app is not None and _is_done(app) for app in apps.values()):
        return Verdict(Stage.DONE, text, state)
    if elapsed_s >= limits.timeout_s:
        return Verdict(Stage.FAILED, f"not done after {limits.timeout_s:.0f} s: {text}", state)
    return Verdict(Stage.UNDER_WAY, text, state)


def _has_failed(app: AppSight) -> bool:
    return app.status == "DEPLOY_FAILED" or any(one.status == "DEPLOY_FAILED" for one in app.deployments.values())


def _is_done(app: AppSight) -> bool:
    # A deployment that follows its load has been rolled out, too.
    settled = ("HEALTHY", "UPSCALING", "DOWNSCALING")
    return app.status == "RUNNING" and all(one.status in settled for one in app.deployments.values())


def _reason(app: AppSight) -> str:
    """Return the best line there is: of Python errors Serve hands on the whole traceback, whose last line counts."""
    texts = [one.message for one in app.deployments.values() if one.status in ("DEPLOY_FAILED", "UNHEALTHY")]
    for text in (*texts, app.message):
        lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
        errors = [line for line in lines if _is_error(line)]
        if lines:
            return errors[-1] if errors else lines[0]
    return app.status


def _is_error(line: str) -> bool:
    name = line.partition(":")[0]
    return name.rpartition(".")[2].endswith(("Error", "Exception", "Mismatch", "Corrupt", "Dead", "Unavailable"))


def _progress(name: str, app: AppSight | None) -> str:
    if app is None:
        return f"{name}: not there yet"
    parts = []
    for deployment, sight in app.deployments.items():
        if sight.status not in ("HEALTHY", "UPSCALING", "DOWNSCALING"):
            replicas = ", ".join(f"{count} {state.lower()}" for state, count in sorted(sight.replicas.items()))
            parts.append(f"{deployment}: {replicas or sight.status.lower()}")
    return f"{name}: {'; '.join(parts) if parts else app.status.lower().replace('_', ' ')}"
