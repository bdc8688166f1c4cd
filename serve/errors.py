"""The exception tree. The class says who has to act.

RayTRTError
├── RequestError       the client: the request cannot be served as it is written
│   └── ContextTooLong     … because prompt and output do not fit the model's context
├── Overloaded         the client, after `retry_after_s`
├── EngineDead         Serve: the replica has to be replaced
│   └── StreamLost         … the client alone, by sending it again: one request is lost, its engine serves on
├── BundleMismatch     whoever builds bundles: this hardware or software cannot load it
├── BundleCorrupt      whoever owns the store: files are not what the manifest says
├── StoreUnavailable   whoever runs the store: it cannot be reached, or refuses; trying again later may help
└── ConfigError        the operator: a configuration file or command line is wrong

Ray rebuilds an exception in another process from its `args`, so every constructor argument goes to `super().__init__`.
"""


class RayTRTError(Exception):
    """Base of everything RayTRT raises on purpose."""


class RequestError(RayTRTError):
    """The client's request cannot be served as it is written.

    Args:
        message: What is wrong, with the value, and the remedy.
        param: Name of the offending request field as the client wrote it, if there is one.
        code: Short machine-readable reason, as OpenAI's API has them (for instance `unsupported_value`).
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.message = message
        self.param = param
        self.code = code

    def __str__(self) -> str:
        return self.message


class ContextTooLong(RequestError):
    """Prompt and requested output exceed the model's context.

    Args:
        prompt_tokens: Length of the prompt.
        max_tokens: Output tokens asked for; None if the prompt alone is too long.
        context_tokens: What the model can hold, prompt and output together.
        param: The field that holds the prompt.
    """

    def __init__(
        self, prompt_tokens: int, max_tokens: int | None, context_tokens: int, param: str = "messages"
    ) -> None:
        asked = f" and {max_tokens} tokens of output were asked for" if max_tokens is not None else ""
        message = (
            f"This model's maximum context length is {context_tokens} tokens, but the prompt has {prompt_tokens} "
            f"tokens{asked}. Shorten the prompt{' or lower max_tokens' if asked else ''}."
        )
        super().__init__(message, param, "context_length_exceeded")
        self.args = (prompt_tokens, max_tokens, context_tokens, param)


class Overloaded(RayTRTError):
    """There is no room for the request now.

    Args:
        message: What is full.
        retry_after_s: When trying again is worthwhile.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class EngineDead(RayTRTError):
    """The engine, or one of its ranks, is gone; the replica has to be replaced."""


class StreamLost(EngineDead):
    """One request cannot go on, and its engine can: an answer made no sense, or its handling failed.

    Who waits for the tokens has lost them either way, and takes it as the engine's death; who looks after the engine
    must not.
    """


class BundleMismatch(RayTRTError):
    """A model or engine bundle cannot be loaded by this hardware or software; names both sides."""


class BundleCorrupt(RayTRTError):
    """A bundle's files are not what its manifest says, or the manifest is none; nothing of it was used."""


class StoreUnavailable(RayTRTError):
    """An artifact store cannot be reached, or refuses what is asked of it; it was tried several times."""


class ConfigError(RayTRTError):
    """A configuration is wrong; the message gives file, key, value and remedy."""
