"""Policies by name on a command line: `dynamo`, or with parameters `dynamo:prefill_load_scale=2:temperature=0.1`."""

from dataclasses import dataclass

import yaml
from pydantic import ValidationError

from serve.core.routing.policy import Policy
from serve.core.routing.settings import POLICY_NAMES, RoutingSettings, make_policy, parse_policy
from serve.core.strict_model import describe_mistakes
from serve.errors import ConfigError


@dataclass(frozen=True)
class Candidate:
    """A policy with its parameters.

    Attributes:
        label: For tables.
        settings: What the configuration would say.
    """

    label: str
    settings: RoutingSettings

    def make(self) -> Policy:
        """Make the policy."""
        return make_policy(self.settings)

    def beside(self, configured: RoutingSettings) -> "Candidate":
        """Return the same policy, with what the configured section says beside its policy."""
        kept = configured.model_dump(include=configured.model_fields_set & set(RoutingSettings.model_fields))
        return Candidate(self.label, self.settings.model_copy(update=kept))


def parse_candidates(text: str) -> list[Candidate]:
    """Read names and parameters, separated by commas; `all` stands for every policy there is.

    Raises:
        ConfigError: There is no such policy or parameter; names those that there are.
    """
    labels = [label.strip() for label in text.split(",") if label.strip()]
    names = [name for label in labels for name in (POLICY_NAMES if label == "all" else (label,))]
    if not names:
        raise ConfigError(f"--policy={text!r} names no policy; there are {', '.join(POLICY_NAMES)}, and all")
    return [parse_candidate(name) for name in dict.fromkeys(names)]


def parse_candidate(label: str) -> Candidate:
    """Read one name with parameters.

    Raises:
        ConfigError: As for `parse_candidates`.
    """
    name, *parameters = label.split(":")
    if name not in POLICY_NAMES and name != "auto":
        raise ConfigError(f"--policy: there is no {name!r}; there are {', '.join(POLICY_NAMES)}")
    section: dict[str, object] = {"policy": name}
    for parameter in parameters:
        key, separator, value = parameter.partition("=")
        if not separator:
            raise ConfigError(f"--policy: {parameter!r} in {label!r} is no key=value; write {name}:key=value")
        section[key] = yaml.safe_load(value)
    try:
        return Candidate(label, parse_policy(section))
    except ValidationError as exc:
        raise ConfigError(describe_mistakes(exc, f"--policy {label}: ")) from None


def configured_candidate(settings: RoutingSettings) -> Candidate | None:
    """Return the policy of a model's section in a config file; None: it is one of Ray Serve's own routers."""
    section = settings.model_dump(exclude_unset=True, exclude=set(RoutingSettings.model_fields))
    name = section.pop("policy", "auto")
    label = ":".join(
        [("predictive" if name == "auto" else name), *(f"{key}={value}" for key, value in section.items())]
    )
    return Candidate(label, settings) if name in (*POLICY_NAMES, "auto") else None
