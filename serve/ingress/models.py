"""ServedModel: one model as clients of the gateway see it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from serve.errors import ConfigError
from serve.ingress.api_error import model_not_found
from serve.ingress.model_files import read_model_files
from serve.ingress.text import TextModel


@dataclass(frozen=True)
class ServedModel:
    """One model.

    Attributes:
        id: Its name in requests; may contain '/'.
        text: Its tokenizer and chat template.
        context_tokens: Prompt and output together, at most.
        vocab_size: Token ids are below this.
        created: Unix time, for GET /v1/models.
        owned_by: For GET /v1/models.
        session_header, tenant_header, priority_header: Request headers that name session, tenant and priority; lower
            case.
        bundle: Fingerprint of the bundle that it is configured to be served from; empty: a checkpoint.
    """

    id: str
    text: TextModel
    context_tokens: int
    vocab_size: int
    created: int = field(default_factory=lambda: int(time.time()))
    owned_by: str = "raytrt"
    session_header: str = "x-session-id"
    tenant_header: str = "x-tenant-id"
    priority_header: str = "x-raytrt-priority"
    bundle: str = ""


def load_model(
    model_id: str,
    path: Path,
    *,
    context_tokens: int | None = None,
    created: int | None = None,
    owned_by: str = "raytrt",
    session_header: str = "x-session-id",
    tenant_header: str = "x-tenant-id",
    priority_header: str = "x-raytrt-priority",
    bundle: str = "",
) -> ServedModel:
    """Read the text side of a model from its directory. Blocks, up to a second for a large vocabulary.

    Args:
        model_id: Its name in requests.
        path: Directory in Hugging Face's layout: tokenizer.json, and as far as there are tokenizer_config.json,
            special_tokens_map.json, chat_template.jinja, config.json and generation_config.json.
        context_tokens: What the engine can hold, if that may be less than what the model's files say.
        created: Unix time; None: now.
        owned_by: Who is said to own it.
        session_header: Request header that names a session.
        tenant_header: Request header that names the tenant.
        priority_header: Request header that holds the priority.
        bundle: Fingerprint of the bundle that it is served from.

    Raises:
        ConfigError: A file is missing or broken, or no file says how long the context is.
    """
    files = read_model_files(path)
    limits = [limit for limit in (context_tokens, files.context_tokens) if limit is not None]
    if not limits:
        raise ConfigError(
            f"model '{model_id}': neither config.json nor tokenizer_config.json in {path} says how many tokens its "
            "context has. Give config.json its max_position_embeddings."
        )
    return ServedModel(
        id=model_id,
        text=TextModel(files),
        context_tokens=min(limits),
        vocab_size=files.vocab_size,
        created=int(time.time()) if created is None else created,
        owned_by=owned_by,
        session_header=session_header,
        tenant_header=tenant_header,
        priority_header=priority_header,
        bundle=bundle,
    )


def find_model(models: Mapping[str, ServedModel], model_id: str) -> ServedModel:
    """Return a model by its id.

    Raises:
        ApiError: It is not served (404).
    """
    model = models.get(model_id)
    if model is None:
        raise model_not_found(model_id)
    return model
