"""Prompts to token ids, so that untrusted text can never become a special token.

The tokenizer's own chat template is rendered once with markers in place of every message's
content; what stands between the markers is the template's own text, the only text whose special
tokens count. Everything else (questions, feedback, system text) is data: it is encoded together
with the plain text around it, as the tokenizer would, but any piece that would come out as an
added token (`<|im_end|>`, `<think>`) is split inside, so that it stays ordinary text.

Student's and teacher's prompt begin with the same tokens through the question, which are computed
once for both: a prompt whose rendering breaks that is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastsd.config.sections import PromptConfig
from fastsd.errors import FastsdError
from fastsd.types import Prompt, common_prefix

_MARKER = "\ue000fastsd{}\ue001"
_MARKER_PATTERN = re.compile("\ue000fastsd(\\d+)\ue001")
_PROBE_QUESTION = "Which of these two numbers is the larger one?"
_PROBE_FEEDBACK = "Look at their first digits."


class PromptError(FastsdError):
    """A prompt that cannot be used as it is: too long, or the chat template rewrites it."""


@dataclass(frozen=True)
class TeacherPrompt:
    """Token ids of the self-teacher's prompt; `cut` when the feedback was shortened to fit."""

    ids: tuple[int, ...]
    cut: bool


class PromptRenderer:
    """Renders student and teacher prompts with one tokenizer.

    room: tokens of the longest prompt that leaves the model room for a response; None: any.
    Raises PromptError where the tokenizer has no chat template, where the template changes or
    drops a message's text, or where a prompt is longer than the configuration allows.
    """

    def __init__(self, tokenizer, config: PromptConfig, room: int | None = None):
        if not tokenizer.chat_template:
            raise PromptError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: use an "
                "instruction-tuned model, or save a chat_template.jinja in the model's folder"
            )
        self.tokenizer = tokenizer
        self.config = config
        self.room = math.inf if room is None else room
        self._special_ids = _special_ids(tokenizer)
        self._special_pattern = special_pattern(tokenizer)
        self._layouts: dict[tuple, list[str]] = {}

    def student(self, prompt: Prompt) -> tuple[int, ...]:
        """Ids of the student's prompt, generation prompt included. The question is never cut."""
        ids = self._encode_chat(self._messages(prompt), self.config.student_template_kwargs)
        if len(ids) > self.config.max_prompt_tokens:
            raise PromptError(
                f"prompt {prompt.id!r} has {len(ids)} tokens, prompt.max_prompt_tokens is "
                f"{self.config.max_prompt_tokens}: raise it or drop the row (questions are "
                "never cut)"
            )
        if len(ids) > self.room:
            raise PromptError(
                f"prompt {prompt.id!r} has {len(ids)} tokens, and {self.room} fit into the model "
                "beside rollout.max_new_tokens: lower that or drop the row (questions are never "
                "cut)"
            )
        return ids

    def check_question(self, prompt: Prompt) -> None:
        """Raises what `student` would, without encoding the many prompts that are short enough."""
        limit = min(self.config.max_prompt_tokens, self.room)
        # A token is a byte of text or more; twice that is room for the template's own.
        if 2 * sum(len(message["content"].encode()) for message in self._messages(prompt)) > limit:
            self.student(prompt)

    def teacher(self, prompt: Prompt, template: str, feedback: str) -> TeacherPrompt | None:
        """Ids of the self-teacher's prompt: `template` with the question and the feedback.

        Feedback beyond prompt.max_feedback_tokens, or that leaves the response no room in the
        model, is an error, or is cut after a whole step (line) with prompt.feedback_overflow =
        "cut"; None where not even the first step fits.
        """
        limit = self.config.max_feedback_tokens
        while True:
            fitted = self._fit_feedback(prompt, feedback, limit)
            if feedback and not fitted:
                return None
            ids = self._teacher_ids(prompt, template, fitted)
            if len(ids) <= self.room:
                return TeacherPrompt(ids, cut=fitted != feedback)
            if not fitted:
                return None
            limit = len(self._encode_plain(fitted)) - (len(ids) - int(self.room))

    def question_tokens(self, prompt: Prompt, student_ids: tuple[int, ...]) -> int:
        """How many leading tokens the self-teacher's prompt must share with the student's.

        They end before the question's last word: a word may be tokenised with what follows it.
        """
        segments = self._segments(self._messages(prompt), self.config.student_template_kwargs)
        words = segments[-2][0].rsplit(None, 1)
        before = [*segments[:-2], (words[0] if len(words) > 1 else "", False)]
        return len(common_prefix([student_ids, self._encode_segments(before)]))

    def check_shared(
        self, prompt: Prompt, tokens: int, student_ids: tuple[int, ...], teacher_ids: tuple
    ) -> None:
        """Raises PromptError where the prompts differ within their first `tokens` tokens."""
        shared = len(common_prefix([student_ids, teacher_ids]))
        if shared < tokens:
            raise PromptError(
                f"prompt {prompt.id!r}: the self-teacher's prompt shares only its first {shared} "
                f"tokens with the student's, not the {tokens} through the question: the chat "
                f"template of {self.tokenizer.name_or_path!r} puts something else before it. Give "
                "prompt.teacher_template_kwargs the values of prompt.student_template_kwargs that "
                "change the beginning, or use a chat template in which the question comes first"
            )

    def check_template(self, template: str, like: Prompt) -> None:
        """Raises PromptError where a teacher's prompt cannot share the student's question.

        like: its messages but for the question, which is one of ours.
        """
        question = {**like.messages[-1], "content": _PROBE_QUESTION}
        probe = replace(like, messages=(*like.messages[:-1], question))
        kwargs = self.config.student_template_kwargs
        student_ids = self._encode_chat(self._messages(probe), kwargs)
        teacher_ids = self._teacher_ids(probe, template, _PROBE_FEEDBACK)
        tokens = self.question_tokens(probe, student_ids)
        self.check_shared(probe, tokens, student_ids, teacher_ids)

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; contains no added token whatever the text says."""
        return self._encode_plain(text)

    def _messages(self, prompt: Prompt) -> list[dict[str, str]]:
        messages = [dict(message) for message in prompt.messages]
        if self.config.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.config.system})
        return messages

    def _teacher_ids(self, prompt: Prompt, template: str, feedback: str) -> tuple[int, ...]:
        messages = self._messages(prompt)
        content = fill_template(template, question=messages[-1]["content"], feedback=feedback)
        messages[-1] = {**messages[-1], "content": content}
        return self._encode_chat(messages, self.config.teacher_template_kwargs)

    def _fit_feedback(self, prompt: Prompt, feedback: str, limit: int) -> str:
        """The feedback, or as many whole lines from its start as `limit` tokens hold."""
        if len(self._encode_plain(feedback)) <= limit:
            return feedback
        if self.config.feedback_overflow == "error":
            most = self.config.max_feedback_tokens
            why = f"prompt.max_feedback_tokens = {most}: raise it"
            if limit < most:
                why = f"the {limit} tokens that the model has room for: shorten it"
            raise PromptError(
                f"feedback for prompt {prompt.id!r} is longer than {why} or set "
                'prompt.feedback_overflow = "cut"'
            )
        lines = feedback.splitlines(keepends=True)
        low, high = 0, len(lines) - 1
        while low < high:
            middle = (low + high + 1) // 2
            fits = len(self._encode_plain("".join(lines[:middle]).rstrip("\n"))) <= limit
            low, high = (middle, high) if fits else (low, middle - 1)
        return "".join(lines[:low]).rstrip("\n")

    def _encode_chat(self, messages: Sequence[Mapping[str, str]], kwargs: dict) -> tuple[int, ...]:
        return self._encode_segments(self._segments(messages, kwargs))

    def _encode_segments(self, segments: Sequence[tuple[str, bool]]) -> tuple[int, ...]:
        ids: list[int] = []
        plain = ""
        for text, trusted in segments:
            if not trusted:
                plain += text
                continue
            position = 0
            for match in self._special_pattern.finditer(text) if self._special_pattern else ():
                ids += self._encode_plain(plain + text[position : match.start()])
                plain = ""
                ids.append(self.tokenizer.convert_tokens_to_ids(match.group()))
                position = match.end()
            plain += text[position:]
        return tuple(ids + self._encode_plain(plain))

    def _segments(self, messages, kwargs: dict) -> list[tuple[str, bool]]:
        """The rendered chat as (text, is the template's own) in order."""
        roles = tuple(message["role"] for message in messages)
        key = (roles, repr(sorted(kwargs.items())))
        if key not in self._layouts:
            self._layouts[key] = self._template_layout(roles, kwargs)
        contents = [message["content"] for message in messages]
        literal = self._render(list(messages), kwargs)
        for values in (contents, [content.strip() for content in contents]):
            segments = _interleave(self._layouts[key], values)
            if "".join(text for text, _ in segments) == literal:
                return segments
        # The template looked into a message (a think tag, a tool call): keep the text as data.
        return _interleave(self._layouts[key], contents)

    def _template_layout(self, roles: tuple[str, ...], kwargs: dict) -> list[str]:
        """Pieces of the template around the contents: [before 0, between 0 and 1, ..., after]."""
        marked = [{"role": role, "content": _MARKER.format(i)} for i, role in enumerate(roles)]
        pieces = _MARKER_PATTERN.split(self._render(marked, kwargs))
        if [int(index) for index in pieces[1::2]] != list(range(len(roles))):
            raise PromptError(
                f"the chat template of {self.tokenizer.name_or_path!r} does not keep the messages "
                f"{list(roles)} once each and in order: fastsd cannot tell its text from yours"
            )
        return pieces[0::2]

    def _render(self, messages: list[Any], kwargs: dict) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **kwargs
        )

    def _encode_plain(self, text: str) -> list[int]:
        """Ids of `text`; where an added token would come out, splits inside it and starts anew."""
        if not text:
            return []
        encoded = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        for token_id, (start, end) in zip(
            encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            if token_id in self._special_ids:
                if end - start < 2:
                    return self._encode_plain(text[:start] + "\ufffd" + text[end:])
                cut = start + 1
                return self._encode_plain(text[:cut]) + self._encode_plain(text[cut:])
        return list(encoded["input_ids"])


def fill_template(template: str, *, question: str, feedback: str) -> str:
    """`template` with {question} and {feedback} put in once each; their own braces stay text."""
    before, _, rest = template.partition("{question}")
    between, _, after = rest.partition("{feedback}")
    return before + question + between + feedback + after


def _interleave(layout: list[str], contents: Sequence[str]) -> list[tuple[str, bool]]:
    segments = [(layout[0], True)]
    for content, piece in zip(contents, layout[1:], strict=True):
        segments += [(content, False), (piece, True)]
    return segments


def _special_tokens(tokenizer) -> dict[str, int]:
    """Added tokens that carry meaning: all but runs of white space and the unknown token."""
    return {
        token.content: token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.content.strip() and token_id != tokenizer.unk_token_id
    }


def _special_ids(tokenizer) -> frozenset[int]:
    return frozenset(_special_tokens(tokenizer).values())


def special_pattern(tokenizer) -> re.Pattern | None:
    tokens = sorted(_special_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None
