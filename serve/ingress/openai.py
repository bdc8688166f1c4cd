"""Wire models of the requests of the OpenAI API, for text, with the extensions that vLLM and TensorRT-LLM users know.

The structs are the only statement of what a request may hold: the decoder enforces types and ranges, and the OpenAPI
document is generated from them. What depends on several fields, or on the model, `sampling` and
`prompts` check. A field of OpenAI's that cannot be honoured here is declared, so that its refusal can say why
(`unsupported`).
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

MAX_LOGIT_BIASES = 4096
MAX_STOPS = 32
MAX_STOP_CHARS = 1024
MAX_TOP_LOGPROBS = 20

_MAX_TOKENS = 2**31 - 1  # more than any context; keeps arithmetic and wire formats in 64 bits

Probability = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenId = Annotated[int, Meta(ge=0, le=2**32 - 1)]
OutputTokens = Annotated[int, Meta(ge=1, le=_MAX_TOKENS)]
OutputTokensOrZero = Annotated[int, Meta(ge=0, le=_MAX_TOKENS)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]


def _not_here(remedy: str) -> Meta:
    return Meta(description=f"Not supported: {remedy}")


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """What a stream carries besides the text."""

    include_usage: Annotated[bool, Meta(description="A last chunk, without choices, has the usage.")] | None = None
    include_obfuscation: Annotated[bool, _not_here("leave it out, or false.")] | None = None


class ResponseFormat(Struct, frozen=True, forbid_unknown_fields=True):
    """Form of the answer; only text, until there is guided decoding."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class GenerationFields(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What chat and text completions have in common."""

    model: Annotated[str, Meta(description="Id of a model that GET /v1/models lists.")]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=2**31 - 1, description="Sequences for each prompt.")] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2, description="0 is greedy.")] | None = None
    top_p: Probability | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: (
        Annotated[
            int,
            Meta(
                ge=-(2**63),
                le=2**63 - 1,
                description="Same seed, same answer. Sequence i of n has the seed `seed + i`.",
            ),
        ]
        | None
    ) = None
    stop: (
        StopString
        | Annotated[
            list[StopString], Meta(max_length=MAX_STOPS, description="Excluded from the text, unless asked for.")
        ]
        | None
    ) = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(description="Token id -> bias.")] | None
    ) = None
    user: Annotated[str, Meta(description="Accepted; has no effect.")] | None = None
    # What follows is not OpenAI's.
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1, description="0 and -1 keep all.")] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100, description="1 is off.")] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=_MAX_TOKENS, description="No stop before so many tokens.")] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: Annotated[bool, Meta(description="Default true.")] | None = None
    add_special_tokens: (
        Annotated[
            bool,
            Meta(
                description="Whether the tokenizer adds its own, such as BOS. Default: true for /v1/completions, "
                "false for chat, where the template does it."
            ),
        ]
        | None
    ) = None
    priority: (
        Annotated[int, Meta(ge=-(2**31), le=2**31 - 1, description="Lower is served first, while not all can be.")]
        | None
    ) = None
    cache_salt: (
        Annotated[str, Meta(max_length=256, description="Requests share cached prefixes of the same salt only.")] | None
    ) = None


class TextPart(Struct, frozen=True, tag_field="type", tag="text", forbid_unknown_fields=True):
    """A piece of text."""

    text: str


class RefusalPart(Struct, frozen=True, tag_field="type", tag="refusal", forbid_unknown_fields=True):
    """A refusal in an earlier answer."""

    refusal: str


class FunctionCall(Struct, frozen=True, forbid_unknown_fields=True):
    """What an earlier answer called."""

    name: str
    arguments: Annotated[str, Meta(description="JSON.")]


class ToolCall(Struct, frozen=True, forbid_unknown_fields=True):
    """A call in an earlier answer."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class SystemMessage(Struct, frozen=True, tag_field="role", tag="system", forbid_unknown_fields=True):
    """Instructions."""

    content: str | list[TextPart]
    name: str | None = None


class DeveloperMessage(Struct, frozen=True, tag_field="role", tag="developer", forbid_unknown_fields=True):
    """Instructions; given to the template as `system`, unless it knows `developer`."""

    content: str | list[TextPart]
    name: str | None = None


class UserMessage(Struct, frozen=True, tag_field="role", tag="user", forbid_unknown_fields=True):
    """What the user said; text only."""

    content: str | list[TextPart]
    name: str | None = None


class AssistantMessage(Struct, frozen=True, tag_field="role", tag="assistant", forbid_unknown_fields=True):
    """An earlier answer."""

    content: str | list[TextPart | RefusalPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: FunctionCall | None = None
    reasoning_content: str | None = None
    annotations: list[dict[str, Any]] | None = None
    audio: None = None


class ToolMessage(Struct, frozen=True, tag_field="role", tag="tool", forbid_unknown_fields=True):
    """What a tool answered."""

    content: str | list[TextPart]
    tool_call_id: str
    name: str | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class ChatCompletionRequest(GenerationFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: OutputTokens | None = None
    max_completion_tokens: OutputTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    add_generation_prompt: Annotated[bool, Meta(description="Default true.")] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Meta(description="Variables of the chat template.")] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    # Accepted, because they change nothing about the answer.
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    # Refused, unless they ask for what happens anyway.
    tools: Annotated[list[Any], _not_here("leave it out, or empty.")] | None = None
    tool_choice: Annotated[Any, _not_here('leave it out, or "none".')] = None
    functions: Annotated[list[Any], _not_here("leave it out, or empty.")] | None = None
    function_call: Annotated[Any, _not_here('leave it out, or "none".')] = None
    modalities: Annotated[list[str], Meta(description='Only ["text"].')] | None = None
    audio: Annotated[Any, _not_here("leave it out.")] = None
    prediction: Annotated[Any, _not_here("leave it out.")] = None
    web_search_options: Annotated[Any, _not_here("leave it out.")] = None
    prompt_cache_retention: Annotated[str, Meta(description='Only "in-memory".')] | None = None
    service_tier: Annotated[str, Meta(description='Only "auto" and "default".')] | None = None
    store: Annotated[bool, _not_here("leave it out, or false.")] | None = None
    verbosity: Annotated[str, Meta(description='Only "medium".')] | None = None


class CompletionRequest(GenerationFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/completions."""

    prompt: (
        str
        | Annotated[
            list[str | TokenId | Annotated[list[TokenId], Meta(min_length=1)]],
            Meta(min_length=1, description="Strings, or token ids, or lists of token ids: one kind in one request."),
        ]
    )
    max_tokens: Annotated[OutputTokensOrZero, Meta(description="Default 16. 0 scores the prompt.")] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=2**31 - 1, description="Only the value of n.")] | None = None
    suffix: Annotated[str, _not_here("leave it out, or empty.")] | None = None


class TokenizeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /tokenize: `prompt` or `messages`."""

    model: str
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /detokenize."""

    model: str
    tokens: list[TokenId]
    skip_special_tokens: Annotated[bool, Meta(description="Default false: special tokens are shown.")] | None = None
