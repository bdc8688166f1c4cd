"""Dashboard: Ray's REST API, as far as Serve's applications are concerned."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve.core.rollout import AppSight, DeploymentSight
from serve.errors import ConfigError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_PATH = "/api/serve/applications/"
_TIMEOUT_S = 60.0


class DashboardError(Exception):
    """The dashboard does not answer, or not as it should. Trying again may help."""


class Dashboard:
    """The dashboard of a running cluster.

    Args:
        address: `http://host:8265`.
        environ: Environment, for the token of clusters that want one, as Ray's own commands take it.
    """

    def __init__(self, address: str, environ: Mapping[str, str] = os.environ) -> None:
        if not address.startswith(("http://", "https://")):
            raise ConfigError(
                f"--address: {address!r} is no URL of a dashboard; give for instance {DEFAULT_ADDRESS}, which `ray "
                "start` and `raytrt up` print"
            )
        self.address = address.rstrip("/")
        self._environ = environ
        self._token: str | None = None

    def details(self) -> dict[str, Any]:
        """Return everything that Serve tells of itself.

        Raises:
            ConfigError: There is no dashboard, or it wants another token.
            DashboardError: It does not answer now.
        """
        found: dict[str, Any] = json.loads(self._request("GET"))
        return found

    def deploy(self, document: Mapping[str, Any]) -> None:
        """Make a config file's content what Serve is to run. Serve goes on by itself; see `details`.

        Raises:
            ConfigError: It is refused.
            DashboardError: The dashboard does not answer now.
        """
        self._request("PUT", json.dumps(document).encode())

    def _request(self, method: str, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(self.address + _PATH, body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
                content: bytes = response.read()
                return content
        except urllib.error.HTTPError as exc:
            with exc:
                text = exc.read().decode(errors="replace").strip()
            if exc.code == 401 and self._token is None and (token := _find_token(self._environ)) is not None:
                self._token = token
                return self._request(method, body)
            if 400 <= exc.code < 500:
                raise ConfigError(f"{self.address} refuses ({exc.code}): {_remedy(exc.code, text)}") from None
            raise DashboardError(f"{self.address} answers {exc.code}: {text[:500]}") from None
        except OSError as exc:
            reason = getattr(exc, "reason", exc)
            raise DashboardError(f"no dashboard answers at {self.address}: {reason}") from None


def app_sights(details: Mapping[str, Any]) -> dict[str, AppSight]:
    """Read what Serve tells of its applications, by name."""
    return {name: _app_sight(app) for name, app in details.get("applications", {}).items()}


def deployed_configs(details: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the configuration of each application that came from a config file, by name."""
    applications = details.get("applications", {}).items()
    return {name: app["deployed_app_config"] for name, app in applications if app.get("deployed_app_config")}


def _app_sight(app: Mapping[str, Any]) -> AppSight:
    deployments = {}
    for name, deployment in app.get("deployments", {}).items():
        replicas: dict[str, int] = {}
        for replica in deployment.get("replicas", ()):
            state = str(replica.get("state", "UNKNOWN"))
            replicas[state] = replicas.get(state, 0) + 1
        deployments[name] = DeploymentSight(str(deployment["status"]), str(deployment.get("message") or ""), replicas)
    return AppSight(str(app["status"]), str(app.get("message") or ""), deployments)


def _find_token(environ: Mapping[str, str]) -> str | None:
    """Return the token of the user's clusters, from where Ray's own commands have it."""
    if token := environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _remedy(code: int, text: str) -> str:
    if code in (401, 403):
        return (
            "it wants the cluster's token; put it into RAY_AUTH_TOKEN, or into the file that RAY_AUTH_TOKEN_PATH names "
            "(~/.ray/auth_token without it)"
        )
    return text[:2000] or "without a reason"
