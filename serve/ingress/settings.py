"""GatewaySettings: what an operator can set about the gateway. All of it can change without a restart."""

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from serve.core.strict_model import StrictModel


class GatewaySettings(StrictModel):
    """Limits and defaults of the HTTP API; changed live through the deployment's `user_config`."""

    max_body_bytes: PositiveInt = Field(
        default=16 * 2**20, description="A longer request body is refused with status 413."
    )
    max_sequences_per_request: PositiveInt = Field(
        default=128, description="n times the number of prompts in one request, at most."
    )
    max_in_flight: PositiveInt = Field(
        default=4096,
        description="Sequences that one gateway process holds at once; more get status 429 and Retry-After.",
    )
    default_max_tokens: PositiveInt | None = Field(
        default=None,
        description="Output limit of chat requests that set none. None: whatever is left of the model's context. "
        "(/v1/completions has OpenAI's default, 16.)",
    )
    retry_after_s: NonNegativeFloat = Field(default=1.0, description="Retry-After of an overload answer, in seconds.")
    request_timeout_s: PositiveFloat | None = Field(
        default=None, description="A request that takes longer is cancelled: status 408, or an error event in a stream."
    )
    debug_routes: bool = Field(
        default=True,
        description="Whether /debug/requests, /debug/route and the header x-raytrt-explain work: they tell any client "
        "of replicas and their load.",
    )
    routing_records: NonNegativeInt = Field(
        default=1000, description="Sequences whose routing is remembered for /debug/requests, besides those in flight."
    )
    request_log: str | None = Field(
        default=None,
        description="File that a line is written to for each sequence that ends, to be replayed by `raytrt simulate`: "
        "sizes, times and block hashes, no text and no token ids. The gateway's id is added to its name. None: no log.",
    )
    request_log_max_bytes: PositiveInt = Field(
        default=256 * 2**20, description="Length at which the file is renamed (.1, .2, ...) and a new one begun."
    )
    request_log_max_files: PositiveInt = Field(
        default=4, description="How many of these files a gateway keeps, the one it writes included."
    )
