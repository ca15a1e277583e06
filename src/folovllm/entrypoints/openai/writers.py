"""What one request generated, as choices of an answer. A whole answer is a stream's pieces written as one.

Tokens whose text is held back (the middle of a character, a stop string or a tool call that may begin) are kept, with
their log-probabilities, for the piece that brings the text.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from msgspec import UNSET

from folovllm.engine.output_processor import RequestDelta, RequestState
from folovllm.entrypoints.openai.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from folovllm.entrypoints.openai.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatFinishReason,
    ChatMessage,
    CompletionChoice,
    CompletionLogprobs,
    FunctionCall,
    ToolCall,
)
from folovllm.entrypoints.openai.tool_parsers import ParsedDelta, ToolCallDelta, ToolParser
from folovllm.outputs import PositionLogprobs
from folovllm.transformers_utils.tokenizer import Tokenizer

Choice = CompletionChoice | ChatChoice | ChatChunkChoice
_ChatChoice = TypeVar("_ChatChoice", ChatChoice, ChatChunkChoice)


class ChoiceWriter(ABC):
    """Writes the choice of one sequence."""

    @abstractmethod
    def pieces(self, delta: RequestDelta | None) -> Sequence[Choice]:
        """The chunks for what came; None asks again for what could not be written yet."""

    @abstractmethod
    def whole(self, total: RequestDelta) -> Choice:
        """The choice of a whole answer."""


@dataclass(frozen=True, slots=True)
class CompletionOptions:
    """How the completions of one call are written."""

    num_logprobs: int | None
    """None: no log-probabilities."""
    echo: bool
    is_prompt_only: bool
    """Leave out what was generated."""
    prompt_logprobs: bool


class CompletionWriter(ChoiceWriter):
    """Choices of /v1/completions."""

    def __init__(
        self,
        index: int,
        prompt: str | None,
        first: RequestState,
        options: CompletionOptions,
        tokenizer: Tokenizer | None,
    ) -> None:
        """Write the sequence `index`; `first` is the first one of its prompt, which alone has the prompt's logprobs."""
        self._index, self._first, self._options, self._tokenizer = index, first, options, tokenizer
        self._prompt = prompt
        self._echoes = options.echo
        self._pending = RequestDelta()
        self._offset = 0

    def pieces(self, delta: RequestDelta | None) -> list[CompletionChoice]:
        """See `ChoiceWriter.pieces`."""
        if delta is not None:
            self._pending.merge(delta)
        has_news = self._pending.text or self._pending.finish_reason is not None
        waits = self._echoes and self._options.num_logprobs is not None and self._first.prompt_logprobs is None
        return [self._write()] if has_news and not waits else []

    def whole(self, total: RequestDelta) -> CompletionChoice:
        """See `ChoiceWriter.whole`."""
        self._pending.merge(total)
        choice = self._write()
        if self._options.prompt_logprobs:
            choice.prompt_logprobs = prompt_logprobs(self._first.prompt_logprobs or [])
        return choice

    def _write(self) -> CompletionChoice:
        delta, self._pending = self._pending, RequestDelta()
        if self._options.is_prompt_only:
            delta.text, delta.token_ids, delta.logprobs = "", [], None
        text = delta.text
        if self._echoes:
            text = self._prompt_text() + text
        choice = CompletionChoice(
            index=self._index,
            text=text,
            logprobs=self._logprobs(delta),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )
        self._echoes = False
        return choice

    def _prompt_text(self) -> str:
        if self._prompt is not None:
            return self._prompt
        assert self._tokenizer is not None, "echo was refused without a tokenizer"
        return self._tokenizer.decode(self._first.prompt_token_ids, skip_special_tokens=False)

    def _logprobs(self, delta: RequestDelta) -> CompletionLogprobs | None:
        if self._options.num_logprobs is None:
            return None
        ids: list[int] = []
        positions: list[PositionLogprobs | None] = []
        if self._echoes:
            ids += self._first.prompt_token_ids
            positions += self._first.prompt_logprobs or []
        ids += delta.token_ids
        positions += delta.logprobs or []
        found = completion_logprobs(ids, positions, self._options.num_logprobs, self._tokenizer, self._offset)
        if found.tokens:
            self._offset = found.text_offset[-1] + len(found.tokens[-1])
        return found


class ChatWriter(ChoiceWriter):
    """Choices of /v1/chat/completions."""

    def __init__(
        self,
        index: int,
        parser: ToolParser | None,
        max_calls: int | None,
        num_logprobs: int | None,
        tokenizer: Tokenizer | None,
    ) -> None:
        """Write the answer `index`: with a `parser`, split into text and at most `max_calls` calls."""
        self._index, self._parser, self._max_calls = index, parser, max_calls
        self._num_logprobs, self._tokenizer = num_logprobs, tokenizer
        self._pending = RequestDelta()
        self._has_begun = False

    def pieces(self, delta: RequestDelta | None) -> list[ChatChunkChoice]:
        """See `ChoiceWriter.pieces`."""
        if delta is None:
            return []
        found = []
        if not self._has_begun:
            self._has_begun = True
            found.append(ChatChunkChoice(index=self._index, delta=ChatMessage("assistant", "")))
        self._pending.merge(delta)
        parsed = self._parse(delta)
        if parsed.content or parsed.tool_calls or delta.finish_reason is not None:
            message = ChatMessage()
            if parsed.tool_calls:
                message.tool_calls = _joined(parsed.tool_calls, is_stream=True)
            if parsed.content or not parsed.tool_calls:
                message.content = parsed.content
            found.append(self._choice(ChatChunkChoice(index=self._index, delta=message)))
        return found

    def whole(self, total: RequestDelta) -> ChatChoice:
        """See `ChoiceWriter.whole`."""
        self._pending.merge(total)
        parsed = self._parse(total)
        calls = _joined(parsed.tool_calls, is_stream=False)
        content = None if calls and not parsed.content else parsed.content
        message = ChatMessage("assistant", content, calls or UNSET)
        return self._choice(ChatChoice(index=self._index, message=message))

    def _parse(self, delta: RequestDelta) -> ParsedDelta:
        if self._parser is None:
            return ParsedDelta(delta.text)
        parsed = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            parsed.merge(self._parser.finish())
        if self._max_calls is not None:
            parsed.tool_calls = [call for call in parsed.tool_calls if call.index < self._max_calls]
        return parsed

    def _choice(self, choice: _ChatChoice) -> _ChatChoice:
        """Fill in the rest of a choice, which takes what is pending with it."""
        delta, self._pending = self._pending, RequestDelta()
        if self._num_logprobs is not None:
            choice.logprobs = chat_logprobs(delta.token_ids, delta.logprobs or [], self._num_logprobs, self._tokenizer)
        choice.finish_reason, choice.stop_reason = self._reason(delta), delta.stop_reason
        return choice

    def _reason(self, delta: RequestDelta) -> ChatFinishReason | None:
        if delta.finish_reason == "stop" and self._parser is not None and self._parser.num_calls:
            return "tool_calls"
        return delta.finish_reason


def _joined(deltas: Sequence[ToolCallDelta], is_stream: bool) -> list[ToolCall]:
    """One entry for each call that `deltas` begin or continue."""
    calls: dict[int, ToolCall] = {}
    for delta in deltas:
        call = calls.setdefault(delta.index, ToolCall(FunctionCall(), index=delta.index if is_stream else UNSET))
        if delta.id is not None and delta.name is not None:
            call.id, call.type, call.function.name = delta.id, "function", delta.name
        call.function.arguments += delta.arguments
    return list(calls.values())
