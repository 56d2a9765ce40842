"""Chats: messages of roles, through a model's own chat template, as one input and one answer."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from promot_jax.data.vocabularies import controls
from promot_jax.errors import UserError, half_character

_CUT = "\ufdd4"  # within a control token's text in a message, so that it is none


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A model's chat template.

    Attributes:
        source: Jinja.
        control_tokens: texts of the tokenizer's control tokens.
        variables: `bos_token` and `eos_token`, as templates name them.
    """

    source: str
    control_tokens: tuple[str, ...] = ()
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def split(self, messages: Any, where: str) -> tuple[str, str]:
        """Returns the input, everything up to the last answer, and that answer.

        The template's control tokens are marked in the input (`vocabularies.controls`), as are the beginning of
        sequence that it starts with, and the end of an input whose answer the template writes without a space. Control
        tokens in messages stay text.

        Args:
            messages: `[{"role": ..., "content": text}, ...]`, the last of the role "assistant".
            where: what an error message names.

        Raises:
            UserError: anything else, or the template refuses the messages.
        """
        checked = _checked(messages, where)
        known = controls.pattern(self.control_tokens)
        safe = [{**one, "content": known.sub(lambda m: m[0][0] + _CUT + m[0][1:], one["content"])} for one in checked]
        *before, answer = safe
        answer["content"] = answer["content"].strip()
        try:
            template = _template(self.source)
            raw = template.render(messages=before, add_generation_prompt=True, **self.variables)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise UserError(f"The model's chat template refuses {where}: {' '.join(str(error).split())}.") from error
        text = controls.marked(raw, self.control_tokens).replace(_CUT, "")
        if self.control_tokens and raw[-1:].strip() and text[-1] != controls.END:
            try:
                whole = template.render(messages=safe, add_generation_prompt=False, **self.variables)
            except (TemplateError, TypeError, ValueError, KeyError):  # it writes no answers: they follow as others do
                whole = ""
            text += controls.NO_SPACE * whole.startswith(raw + answer["content"])
        if (bos := self.variables.get("bos_token")) and text.startswith(first := controls.mark(bos)):
            text = controls.BEGIN + text.removeprefix(first)
        return text, answer["content"].replace(_CUT, "")


def _checked(messages: Any, where: str) -> list[dict[str, str]]:
    """The messages with the marks of control tokens left out. Raises UserError for what is no chat with an answer."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or len(messages) < 2:
        raise UserError(f'{where} has no chat: messages are a list of two or more {{"role": ..., "content": text}}.')
    checked = []
    for number, message in enumerate(messages, 1):
        role, content = (message.get(key) if isinstance(message, Mapping) else None for key in ("role", "content"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f'{where}, message {number}, is not {{"role": ..., "content": text}}.')
        if problem := half_character(content):
            raise UserError(f"{where}, message {number}, {problem}.")
        checked.append({"role": role, "content": controls.unmarked(content).replace(_CUT, "")})
    if checked[-1]["role"] != "assistant" or not checked[-1]["content"].strip():
        raise UserError(f"{where} does not end with an answer of the role 'assistant', which is what is learnt.")
    return checked


@functools.cache
def _template(source: str) -> Template:
    """The template in Jinja as transformers sets it up."""

    def refuse(message: str) -> str:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    # Without `strftime_now`, with which a resumed run would have other inputs: templates then write a fixed date.
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source)
