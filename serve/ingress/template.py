"""ChatTemplate: messages to a prompt, by the Jinja template that comes with a model.

Templates are written for Hugging Face transformers, so names, filters and whitespace rules are theirs
(`apply_chat_template`). They come with model files and see a client's values, hence the sandbox.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serve.errors import ConfigError, RequestError
from serve.ingress.openai import AssistantMessage, DeveloperMessage, Message, RefusalPart, TextPart, ToolMessage

_RESERVED = frozenset({"messages", "add_generation_prompt", "tools", "documents"})


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what a model wrote, for training; here it shows its content."""

    tags = {"generation"}  # noqa: RUF012  # as the base class declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own escapes characters for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda fmt: datetime.now().strftime(fmt)
    return environment


class ChatTemplate:
    """One model's chat template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str) -> None:
        """Compile a template.

        Args:
            source: Jinja.
            special_tokens: `bos_token`, `eos_token`, …, as templates name them.
            origin: Where it was found, for the error message.

        Raises:
            ConfigError: It is no valid template.
        """
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as exc:
            raise ConfigError(f"{origin}, line {exc.lineno}: the chat template does not parse: {exc.message}") from exc
        # What every rendering starts from; merging the environment's globals each time costs more than the rendering.
        self._base = {**self._template.globals, **special_tokens}
        self._keeps_developer = "developer" in source
        self.knows_reasoning_effort = "reasoning_effort" in source
        self._takes_parts = self._probe_takes_parts()

    def _probe_takes_parts(self) -> bool:
        """Whether the template loses a text that is a string and shows it as a list of parts."""
        probe, parts = "probe-of-content", [{"type": "text", "text": "probe-of-content"}]

        def shows(content: Any) -> bool:
            try:
                return probe in self._render([{"role": "user", "content": content}], True, {})
            except RequestError:
                return False

        return not shows(probe) and shows(parts)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt.

        Args:
            messages: At least one.
            add_generation_prompt: Whether the prompt ends where an answer begins.
            variables: Further variables, from the client.

        Raises:
            RequestError: The template refuses these messages, or a variable is not the client's to set.
        """
        if variables and (taken := _RESERVED.intersection(variables)):
            name = min(taken)
            raise RequestError(f"chat_template_kwargs cannot set '{name}'.", f"chat_template_kwargs.{name}")
        return self._render([self._as_dict(message) for message in messages], add_generation_prompt, variables or {})

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]) -> str:
        context = {**self._base, **variables}
        context.update(messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None)
        try:
            return "".join(self._template.root_render_func(self._template.new_context(context, shared=True)))
        except SecurityError as exc:
            raise RequestError(
                f"The model's chat template did something that is not allowed: {exc}", "messages"
            ) from exc
        except TemplateError as exc:
            raise RequestError(f"The model's chat template refuses these messages: {exc}", "messages") from exc
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as exc:
            # Python operators inside the template, applied to what the client sent.
            raise RequestError(f"The model's chat template cannot render these messages: {exc}", "messages") from exc

    def _as_dict(self, message: Message) -> dict[str, Any]:
        role: str = message.__struct_config__.tag  # type: ignore[assignment]  # tags here are strings
        if type(message) is DeveloperMessage and not self._keeps_developer:
            role = "system"
        result: dict[str, Any] = {"role": role, "content": self._content(message.content)}
        if message.name is not None:
            result["name"] = message.name
        if type(message) is ToolMessage:
            result["tool_call_id"] = message.tool_call_id
        elif type(message) is AssistantMessage:
            result.update(_assistant_extras(message))
        return result

    def _content(self, content: str | Sequence[TextPart | RefusalPart] | None) -> str | list[dict[str, str]]:
        if content is None:
            return ""
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if self._takes_parts else content
        texts = [part.text if isinstance(part, TextPart) else part.refusal for part in content]
        return [{"type": "text", "text": text} for text in texts] if self._takes_parts else "\n".join(texts)


def _assistant_extras(message: AssistantMessage) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if message.reasoning_content is not None:
        extras["reasoning_content"] = message.reasoning_content
    if message.refusal is not None and message.content is None:
        extras["content"] = message.refusal
    calls = message.tool_calls or []
    if calls:
        extras["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {"name": call.function.name, "arguments": _parsed(call.function.arguments)},
            }
            for call in calls
        ]
    return extras


def _parsed(arguments: str) -> Any:
    """Templates expect an object where the API has its JSON text."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
