"""The official `openai` client against a running system: real ports, real Ray, real engines."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.integration.serving import Serving

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "How do I serve on 8 GPUs?"}]


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} >= {"quickstart", "sim"}
    assert client.models.retrieve("sim").id == "sim"


def test_a_question_gets_the_same_answer_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="quickstart", messages=QUESTION, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model="quickstart",
            messages=QUESTION,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(text) > 20
    assert whole.choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_repeated_prefix_is_reported_as_cached(client: openai.OpenAI) -> None:
    prompt = [300 + i % 200 for i in range(1000)]
    usages = [client.completions.create(model="quickstart", prompt=prompt, max_tokens=1).usage for _ in range(2)]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages if usage and usage.prompt_tokens_details]
    assert cached[0] == 0
    assert cached[1] is not None
    assert 900 < cached[1] < 1000


def test_several_choices_and_several_prompts_keep_their_places(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="quickstart", prompt=["What is RayTRT?", "Hello"], n=3, max_tokens=12, temperature=0
    )
    texts = [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert texts[0] == texts[1] == texts[2] != texts[3]
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 6 * 12


def test_thirty_two_choices_of_a_batch_all_finish(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="sim", prompt=["a", "b", "c", "d"], n=8, max_tokens=20)
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 32


def test_a_seed_repeats_a_draw(client: openai.OpenAI) -> None:
    texts = [
        client.completions.create(model="quickstart", prompt="Tell me", max_tokens=24, seed=seed, temperature=1.5)
        .choices[0]
        .text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_logprobs_come_for_every_token(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="quickstart",
        messages=QUESTION,
        logprobs=True,
        top_logprobs=3,
        max_completion_tokens=5,
        temperature=0,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [3] * 5
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in logprobs.content)


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="quickstart", messages=QUESTION, temperature=0)
    text = whole.choices[0].message.content or ""
    stop = text[10:16]
    stopped = client.chat.completions.create(model="quickstart", messages=QUESTION, temperature=0, stop=stop)
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_mistakes_have_the_right_class_and_say_what_is_wrong(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-5"):
        client.completions.create(model="gpt-5", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="sim", prompt="x", temperature=-1)
    with pytest.raises(openai.BadRequestError, match=r"4096.*5000|5000.*4096"):
        client.completions.create(model="quickstart", prompt=[300] * 5000)
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="sim", prompt="x" * 3_000_000)
    assert caught.value.status_code == 413


def test_more_than_fits_is_refused_with_retry_after_and_the_rest_is_served(serving: Serving) -> None:
    def ask(_: int) -> int | openai.APIStatusError:
        with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0) as client:
            try:
                usage = client.completions.create(model="tiny", prompt="x", max_tokens=100).usage
                return usage.completion_tokens if usage else 0
            except openai.APIStatusError as exc:
                return exc

    with ThreadPoolExecutor(12) as pool:
        outcomes = list(pool.map(ask, range(12)))
    refused = [outcome for outcome in outcomes if isinstance(outcome, openai.APIStatusError)]
    assert refused
    assert all(outcome == 100 for outcome in outcomes if isinstance(outcome, int))
    assert len(refused) < 12
    for exc in refused:
        assert exc.status_code in (429, 503)
        assert float(exc.response.headers["retry-after"]) >= 0


def test_a_stream_that_is_left_frees_its_kv_blocks(client: openai.OpenAI) -> None:
    """`tiny` has KV blocks for one sequence of 4,000 tokens, which takes it 40 s; the second has to wait for them."""
    for _ in range(2):
        stream = client.completions.create(model="tiny", prompt="x", max_tokens=4000, stream=True)
        assert next(iter(stream)).choices
        stream.close()
    answer = client.with_options(timeout=20).completions.create(model="tiny", prompt="y", max_tokens=500)
    assert answer.choices[0].finish_reason == "length"


def test_operator_endpoints(serving: Serving) -> None:
    assert serving.get("/health")[0] == 200
    assert replicas(serving)["sim"] == 2
    assert serving.get("/version")[0] == 200
    status, metrics = serving.get("/metrics")
    assert status == 200
    assert "raytrt_" in metrics


def test_a_model_scaled_to_zero_counts_as_ready_and_wakes_at_a_request(serving: Serving, client: openai.OpenAI) -> None:
    assert replicas(serving)["sleeper"] == 0
    assert client.completions.create(model="sleeper", prompt="x", max_tokens=3).choices[0].finish_reason == "length"
    assert replicas(serving)["sleeper"] == 1


def replicas(serving: Serving) -> dict[str, int]:
    status, ready = serving.get("/ready")
    assert status == 200
    return {model["id"]: model["ready_replicas"] for model in ready["models"]}


def test_every_answer_has_one_request_id_and_a_response_time(serving: Serving) -> None:
    for path, sent in (("/v1/models", "mine-1"), ("/nothing", "mine-2"), ("/v1/models", None)):
        answer = httpx.get(serving.url + path, headers={"x-request-id": sent} if sent else {})
        ids = answer.headers.get_list("x-request-id")
        assert ids == [sent] if sent else len(ids) == 1
        assert answer.headers["x-response-time"].endswith("ms")
