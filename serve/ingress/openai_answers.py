"""Wire models of the answers of the OpenAI API. Encoded from these structs, so the OpenAPI document cannot lie."""

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from serve.router.records import RouteRecord

FinishReasonName = Literal["stop", "length"]


class PromptTokensDetails(Struct, frozen=True):
    """Of the prompt's tokens, those whose KV blocks were reused."""

    cached_tokens: int


class Usage(Struct, frozen=True):
    """Tokens of a request: each prompt counts once, whatever n is; a stop token counts nowhere."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Struct, frozen=True):
    """A token that was likely at this place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(Struct, frozen=True):
    """A token, and what was likely at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    """Log probabilities of the tokens of a message."""

    content: list[TokenLogprobs]
    refusal: None = None


class AnswerMessage(Struct, frozen=True):
    """What the model answered."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Struct, frozen=True):
    """One of n answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName


class Extras(Struct, frozen=True):
    """What RayTRT adds to an answer when a request header asks for it.

    Attributes:
        emitted_s: With x-raytrt-timing: 1, in every chunk: `time.monotonic()` of the engine's host when the first of
            these tokens was emitted; 0 if unknown.
        tokens: In the same chunks: tokens that the chunk stands for.
        queue_s, prefill_s: In the last of these chunks: how long the sequence waited, and its prefill took.
        routing: With x-raytrt-explain: 1, in the answer or in the last chunk of a stream: how each sequence was routed.
    """

    emitted_s: float | UnsetType = UNSET
    tokens: int | UnsetType = UNSET
    queue_s: float | UnsetType = UNSET
    prefill_s: float | UnsetType = UNSET
    routing: list[RouteRecord] | UnsetType = UNSET


class ChatCompletion(Struct, frozen=True):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    raytrt: Extras | UnsetType = UNSET


class ChatDelta(Struct, frozen=True):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(Struct, frozen=True):
    """What a chunk adds to one of n answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName | None


class ChatCompletionChunk(Struct, frozen=True):
    """One event of a stream of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    raytrt: Extras | UnsetType = UNSET


class CompletionLogprobs(Struct, frozen=True):
    """Log probabilities of the tokens of a completion: lists of one length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct, frozen=True):
    """One of n completions of one of the prompts."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReasonName | None  # None: a chunk of a stream that goes on


class Completion(Struct, frozen=True):
    """Answer of POST /v1/completions, and every event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    raytrt: Extras | UnsetType = UNSET


class Model(Struct, frozen=True):
    """A model that is served."""

    id: str
    created: int
    owned_by: str
    max_model_len: int  # as vLLM has it: prompt and output together
    object: Literal["model"] = "model"
    bundle: str | UnsetType = (
        UNSET  # fingerprint of the bundle that is configured; an answer's header says which served
    )


class ModelList(Struct, frozen=True):
    """Answer of GET /v1/models."""

    data: list[Model]
    object: Literal["list"] = "list"


class Tokens(Struct, frozen=True):
    """Answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(Struct, frozen=True):
    """Answer of POST /detokenize."""

    prompt: str


class Version(Struct, frozen=True):
    """Answer of GET /version."""

    version: str


class Health(Struct, frozen=True):
    """Answer of GET /health: the process lives.

    Attributes:
        fallbacks: Models that are not served by what was configured, and the engine or bundle that serves them.
    """

    status: Literal["ok"] = "ok"
    fallbacks: dict[str, str] = {}


class ReadyModel(Struct, frozen=True):
    """Replicas of one model."""

    id: str
    ready_replicas: int
    target_replicas: int
    message: str


class Readiness(Struct, frozen=True):
    """Answer of GET /ready."""

    ready: bool
    models: list[ReadyModel]


class RoutedRequest(Struct, frozen=True):
    """Answer of GET /debug/requests/{request}: how its sequences were routed."""

    request_id: str
    sequences: list[RouteRecord]


class RoutePreview(Struct, frozen=True):
    """Answer of POST /debug/route: where each prompt of a request would go now. Nothing was run."""

    model: str
    prompts: list[RouteRecord]
