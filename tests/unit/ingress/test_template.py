from collections.abc import Sequence

import pytest

from serve.errors import ConfigError, RequestError
from serve.ingress.openai import (
    AssistantMessage,
    DeveloperMessage,
    FunctionCall,
    Message,
    RefusalPart,
    SystemMessage,
    TextPart,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from serve.ingress.template import ChatTemplate

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def render(source: str, messages: Sequence[Message] = (UserMessage("Hi"),), **options: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}, "test").render(messages, **options)  # type: ignore[arg-type]


def test_messages_and_generation_prompt() -> None:
    messages: list[Message] = [
        SystemMessage("Be brief."),
        UserMessage("Hi"),
        AssistantMessage("Hello"),
        ToolMessage("5", "call-1"),
    ]
    assert render(PLAIN, messages) == "[system]Be brief.[user]Hi[assistant]Hello[tool]5[assistant]"
    assert render(PLAIN, add_generation_prompt=False) == "[user]Hi"


def test_a_developer_is_the_system_unless_the_template_knows_better() -> None:
    assert render(PLAIN, [DeveloperMessage("x")]) == "[system]x[assistant]"
    knows = PLAIN + "{# developer #}"
    assert render(knows, [DeveloperMessage("x")]) == "[developer]x[assistant]"


def test_parts_are_joined_for_a_template_of_strings() -> None:
    messages: list[Message] = [UserMessage([TextPart("a"), TextPart("b")]), AssistantMessage([RefusalPart("no")])]
    assert render(PLAIN, messages) == "[user]a\nb[assistant]no[assistant]"


def test_a_template_of_parts_gets_parts() -> None:
    source = "{% for m in messages %}{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endfor %}"
    assert render(source, [UserMessage("a"), UserMessage([TextPart("b"), TextPart("c")])]) == "<a><b><c>"


def test_an_assistant_without_content_has_an_empty_one() -> None:
    assert render(PLAIN, [AssistantMessage(refusal="I will not.")]) == "[assistant]I will not.[assistant]"
    assert render(PLAIN, [AssistantMessage()]) == "[assistant][assistant]"


def test_arguments_of_tool_calls_are_objects() -> None:
    source = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )

    def call(arguments: str) -> AssistantMessage:
        return AssistantMessage(tool_calls=[ToolCall("1", FunctionCall("f", arguments))])

    assert render(source, [call('{"city": "Köln <1>"}')]) == '{"city": "Köln <1>"}'
    assert render(source, [call("not json")]) == '"not json"'


def test_variables_and_special_tokens_reach_the_template() -> None:
    source = "{{ bos_token }}{{ enable_thinking }}"
    assert render(source, variables={"enable_thinking": False}) == "<s>False"


def test_helpers_of_hugging_face_templates() -> None:
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("{% generation %}a{{ 1 + 1 }}{% endgeneration %}b") == "a2b"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{%- if true %}\n  x\n{%- endif %}") == "  x"


def test_the_reserved_variables_cannot_be_set() -> None:
    with pytest.raises(RequestError, match="cannot set 'messages'"):
        render(PLAIN, variables={"messages": []})


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ messages[0]['content'].__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ messages.append(1) }}",
    ],
)
def test_what_a_template_refuses_is_the_clients_to_mend(source: str) -> None:
    with pytest.raises(RequestError) as caught:
        render(source)
    assert caught.value.param == "messages"


def test_a_broken_template_is_the_operators_to_mend() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json, line 2"):
        ChatTemplate("\n{% for %}", {}, "tokenizer_config.json")
