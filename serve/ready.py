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
    status, body = _get(f"{url}/ready")
    try:
        models = json.loads(body)["models"]
        return status == 200, "; ".join(
            f"{model['id']}: {model['ready_replicas']} of {model['target_replicas']} replicas ready"
            + (f" ({model['message']})" if model.get("message") else "")
            for model in models
        )
    except (ValueError, KeyError, TypeError):
        return False, ""


def stand_ins(url: str) -> dict[str, str]:
    """Return the models that are not served as configured, and by what; nothing if no gateway answers.

    Args:
        url: Of the application.
    """
    try:
        found = json.loads(_get(f"{url}/health")[1])["fallbacks"]
        return {str(model): str(text) for model, text in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _get(url: str) -> tuple[int, bytes]:
    """Return status and body; 0 and nothing if nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read()
    except OSError:
        return 0, b""
