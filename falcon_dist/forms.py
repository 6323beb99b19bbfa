"""Records of every known form -> passages: text, prompt/completion, messages, ShareGPT, Alpaca."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from falcon_dist.chat_template import render
from falcon_dist.config import DataConfig, Form
from falcon_dist.records import BadRecord, Passage

ROLES: Final = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""What others call the two speakers; any other role is given to the template as it is."""
_ALPACA: Final = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{}\n\n{}### Response:\n"
)
"""The prompt of Stanford Alpaca (Taori et al. 2023), for models without a chat template."""


def passage_of(values: Mapping[str, Any], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Passage:
    """A record as the model will read it, and which of it carries loss.

    Raises:
        BadRecord: it is of no known form, a part is missing or empty, or there is no answer to learn from.
        UserError: the model has no chat template that could do it.
    """
    form = form_of(values, config) if config.form == "auto" else config.form
    answers = config.loss == "answers"
    if form == "text":
        return _plain(_text(values, config.text_field), config)
    if form == "messages":
        return render(_talk(values, config.messages_field, config), tokenizer, answers=answers)
    if form == "sharegpt":
        return render(_talk(values, config.columns.conversations, config), tokenizer, answers=answers)
    if form == "prompt-completion":
        return _pair(values, config, tokenizer)
    return _alpaca(values, config, tokenizer)


def form_of(values: Mapping[str, Any], config: DataConfig) -> Form:
    """The form that a record's columns tell, the most structured one first.

    Raises:
        BadRecord: they tell none.
    """
    names = config.columns
    if _filled(values, config.messages_field, list):
        return "messages"
    if _filled(values, names.conversations, list):
        return "sharegpt"
    if _filled(values, names.prompt, str | list) and isinstance(values.get(names.completion), str | list):
        return "prompt-completion"
    if _filled(values, names.instruction, str) and isinstance(values.get(names.output), str):
        return "alpaca"
    if _filled(values, config.text_field, str):
        return "text"
    found = ", ".join(f'"{k}"' for k in values) or "nothing"
    raise BadRecord(
        f'record has neither text in "{config.text_field}" nor messages in "{config.messages_field}"',
        f"found {found}",
        "set data.columns or data.form; docs/data.md has every form",
    )


def _filled(values: Mapping[str, Any], name: str, kind: Any) -> bool:
    return isinstance(values.get(name), kind) and bool(values[name])


def _text(values: Mapping[str, Any], name: str) -> str:
    text = values.get(name)
    if not isinstance(text, str):
        raise BadRecord(f'record has no text in "{name}"', f"found {_shown(text)}")
    if not text.strip():
        raise BadRecord(f'"{name}" is empty')
    return text


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:60]


def _plain(text: str, config: DataConfig) -> Passage:
    if config.loss == "all":
        return Passage(text, None)
    spans = marked_answers(text, config.human_mark, config.answer_mark)
    if not spans:
        raise BadRecord("no answer to learn from", f'no text behind "{config.answer_mark}"', "set data.answer_mark")
    return Passage(text, spans)


def marked_answers(text: str, human: str, answer: str) -> tuple[tuple[int, int], ...]:
    """Character ranges of what stands between an answer's mark and the next mark.

    >>> marked_answers("### Human: Hi### Assistant: Yes", "### Human:", "### Assistant:")
    ((28, 32),)
    """
    marks = list(re.finditer(f"{re.escape(human)}|{re.escape(answer)}", text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    spans = [(m.end(), end) for m, end in zip(marks, ends, strict=False) if m.group() == answer]
    return tuple((start, end) for start, end in spans if text[start:end].strip())


def _talk(values: Mapping[str, Any], name: str, config: DataConfig) -> list[dict[str, str]]:
    found = values.get(name)
    if not isinstance(found, list) or not found:
        raise BadRecord(f'record has no messages in "{name}"', f"found {_shown(found)}")
    return [*_system(values, config), *(_message(message, config) for message in found)]


def _system(values: Mapping[str, Any], config: DataConfig) -> list[dict[str, str]]:
    text = values.get(config.columns.system)
    return [{"role": "system", "content": text}] if isinstance(text, str) and text else []


def _check_no_system(values: Mapping[str, Any], config: DataConfig) -> None:
    if found := _system(values, config):
        raise BadRecord(
            "a system text has no turn in a record that is no talk",
            f"found {_shown(found[0]['content'])}",
            'make it messages, set data.template for Alpaca records, or leave it out: data.columns.system=""',
        )


def _message(message: Any, config: DataConfig) -> dict[str, str]:
    if isinstance(message, dict):
        role = message.get(config.columns.role, message.get("from"))
        content = message.get(config.columns.content, message.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": ROLES.get(role, role), "content": content}
    raise BadRecord('a message needs "role" and "content" as text', _shown(message))


def _pair(values: Mapping[str, Any], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Passage:
    names = config.columns
    prompt, completion = values.get(names.prompt), values.get(names.completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        talk = [_message(message, config) for message in prompt + completion]
        return render([*_system(values, config), *talk], tokenizer, answers=config.loss == "answers")
    _check_no_system(values, config)
    return _after(_text(values, names.prompt), _text(values, names.completion), config)


def _after(prompt: str, completion: str, config: DataConfig) -> Passage:
    text = prompt + completion
    return Passage(text, ((len(prompt), len(text)),) if config.loss == "answers" else None)


def _alpaca(values: Mapping[str, Any], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Passage:
    names = config.columns
    instruction, output = _text(values, names.instruction), _text(values, names.output)
    more = values.get(names.input)
    more = more if isinstance(more, str) and more.strip() else ""
    if not tokenizer.chat_template:
        _check_no_system(values, config)
        paired = (
            (", paired with an input that provides further context", f"### Input:\n{more}\n\n") if more else ("", "")
        )
        return _after(_ALPACA.format(paired[0], instruction, paired[1]), output, config)
    talk = [
        {"role": "user", "content": f"{instruction}\n\n{more}" if more else instruction},
        {"role": "assistant", "content": output},
    ]
    return render([*_system(values, config), *talk], tokenizer, answers=config.loss == "answers")
