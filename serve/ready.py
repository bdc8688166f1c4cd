"""What a gateway's /ready says, from outside."""

import json
import urllib.error
import urllib.request

_TIMEOUT_S = 5.0


def readiness(url: str) -> tuple[bool, str]:
    """Ask a gateway.

    Args:
        url: Of the application.

    Returns:
        Whether every model is ready, and how ready each is, for people; empty if nothing answers.
    """
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=_TIMEOUT_S) as response:
            status, body = response.status, response.read()
    except urllib.error.HTTPError as exc:
        with exc:
            status, body = exc.code, exc.read()
    except OSError:
        return False, ""
    try:
        models = json.loads(body)["models"]
        return status == 200, "; ".join(
            f"{model['id']}: {model['ready_replicas']} of {model['target_replicas']} replicas ready"
            + (f" ({model['message']})" if model.get("message") else "")
            for model in models
        )
    except (ValueError, KeyError, TypeError):
        return False, ""
