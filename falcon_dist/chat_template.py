"""Chat templates: found by name, file or model; talks rendered by them, and where in the text the answers are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from falcon_dist.contract import UserError
from falcon_dist.records import BadRecord, Passage

FOLDER: Final = Path(__file__).parent / "templates"
_MARKED: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What transformers takes for the begin of text that an assistant generates."""
_CONTENT: Final = "\0content\0"
"""What no text is."""

Messages = Sequence[Mapping[str, str]]


def known_templates() -> list[str]:
    """Names of the templates that come with this package."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def find_template(name: str) -> str:
    """The text of a template: ours by name, a .jinja file, or that of another model.

    Raises:
        UserError: there is no such template.
    """
    path = FOLDER / f"{name}.jinja" if name in known_templates() else Path(name).expanduser()
    if path.is_file():
        return path.read_text(encoding="utf-8").removesuffix("\n")
    if name.endswith(".jinja"):
        raise UserError(f'data.template: no such file: "{name}"')
    try:
        found = AutoTokenizer.from_pretrained(
            str(path) if path.is_dir() else name, trust_remote_code=False
        ).chat_template
    except (OSError, ValueError) as error:
        known = ", ".join([*known_templates(), "or a .jinja file"])
        raise UserError(f'data.template: no such template or model: "{name}"; known: {known}') from error
    if not found:
        raise UserError(f'data.template: the model has no chat template: "{name}"')
    return str(found)


def set_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> None:
    """Gives the tokenizer this template, to be saved with it; None leaves it its own."""
    if name is not None:
        tokenizer.chat_template = find_template(name)


def render(messages: Messages, tokenizer: PreTrainedTokenizerBase, *, answers: bool) -> Passage:
    """A talk as the model reads it; with ``answers``, only what the assistant says carries loss.

    Raises:
        BadRecord: the template refuses these messages, or there is no answer in them.
        UserError: there is no template, or it does not show where answers are.
    """
    if not tokenizer.chat_template:
        raise UserError('the model has no chat template for messages; set one, as data.template="falcon"')
    try:
        if not answers:
            return Passage(_rendered(messages, tokenizer), None)
        marked = _MARKED.search(tokenizer.chat_template)
        passage = _by_marks(messages, tokenizer) if marked else _by_prefix(messages, tokenizer)
    except TemplateError as error:
        raise BadRecord("the chat template refuses the messages", str(error)) from error
    if not passage.answers:
        raise BadRecord("no answer to learn from", "no message of the assistant")
    return passage


def _rendered(messages: Messages, tokenizer: PreTrainedTokenizerBase, *, invite: bool = False) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=invite))


def _by_marks(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> Passage:
    """By the template's own {% generation %} marks."""
    (text,), (spans,) = render_jinja_template(
        conversations=[list(messages)],
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return Passage(text, tuple((start, end) for start, end in spans if end > start))


def _by_prefix(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> Passage:
    """By what each answer adds to the text before it; the template must only ever append."""
    text = _rendered(messages, tokenizer)
    spans = []
    for at in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        after = _rendered(messages[: at + 1], tokenizer).rstrip()
        before = _rendered(messages[:at], tokenizer, invite=True) if at else _begin_of_first(messages[0], tokenizer)
        if not (text.startswith(after) and after.startswith(before.rstrip())):
            raise UserError(
                "data.template: the template writes earlier turns anew and has no {% generation %} marks, so answers "
                'cannot be told from the rest; set data.template to one with marks, or data.loss="all"'
            )
        spans.append((min(len(before), len(after)), len(after)))
    return Passage(text, tuple(spans))


def _begin_of_first(message: Mapping[str, str], tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands before the content of a talk's first message: content may be trimmed, or stand there as well."""
    begin, found, _ = _rendered([{**message, "content": _CONTENT}], tokenizer).partition(_CONTENT)
    return begin if found else _CONTENT
