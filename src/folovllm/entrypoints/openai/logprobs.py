"""Log-probabilities in the formats of the two endpoints. Mirrors vllm's serving.py files.

Positions come as token id -> Logprob, the token that stands there first. JSON has no infinity: -9999 stands for it.
"""

from collections.abc import Sequence

from folovllm.entrypoints.openai.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from folovllm.outputs import Logprob, PositionLogprobs
from folovllm.transformers_utils.tokenizer import Tokenizer

_LEAST = -9999.0


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[PositionLogprobs | None],
    num_top: int,
    tokenizer: Tokenizer | None,
    begin: int = 0,
) -> CompletionLogprobs:
    """Those of a completion, or of a piece that begins at character `begin`; None where nothing is known."""
    found = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    for token_id, position in zip(token_ids, positions, strict=True):
        token = token_text(token_id, position[token_id] if position else None, tokenizer)
        found.text_offset.append(begin)
        found.tokens.append(token)
        found.token_logprobs.append(_finite(position[token_id]) if position else None)
        found.top_logprobs.append(_top_by_text(position, token_id, num_top, tokenizer) if position else None)
        begin += len(token)
    return found


def chat_logprobs(
    token_ids: Sequence[int], positions: Sequence[PositionLogprobs], num_top: int, tokenizer: Tokenizer | None
) -> ChatLogprobs:
    """Those of an answer, or of a piece of it."""
    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        top = [
            TopLogprob(token_text(i, one, tokenizer), _finite(one), _token_bytes(i, one, tokenizer))
            for i, one in _most_likely(position, num_top)
        ]
        own = position[token_id]
        text, raw = token_text(token_id, own, tokenizer), _token_bytes(token_id, own, tokenizer)
        content.append(TokenLogprob(text, _finite(own), raw, top))
    return ChatLogprobs(content)


def prompt_logprobs(positions: Sequence[PositionLogprobs | None]) -> PromptLogprobs:
    """Those of a prompt, in vLLM's format."""
    found: PromptLogprobs = []
    for position in positions:
        if position is None:
            found.append(None)
        else:
            found.append({i: PromptLogprob(_finite(p), p.rank, p.decoded_token) for i, p in position.items()})
    return found


def token_text(token_id: int, logprob: Logprob | None, tokenizer: Tokenizer | None) -> str:
    """The text of a token; its id where there is no tokenizer."""
    if logprob is not None and logprob.decoded_token is not None:
        return logprob.decoded_token
    if tokenizer is None:
        return f"token_id:{token_id}"
    return tokenizer.decode([token_id], skip_special_tokens=False)


def _most_likely(position: PositionLogprobs, num_top: int) -> list[tuple[int, Logprob]]:
    """The first entry is the token that stands there: it counts only when it is among them."""
    ranked = sorted(position.items(), key=lambda entry: entry[1].rank)
    return [entry for entry in ranked[:num_top] if entry[1].rank <= num_top]


def _top_by_text(
    position: PositionLogprobs, token_id: int, num_top: int, tokenizer: Tokenizer | None
) -> dict[str, float]:
    """OpenAI's format: up to `num_top` and the token that stands there; of tokens that read alike the likeliest."""
    entries = [*_most_likely(position, num_top), (token_id, position[token_id])]
    found: dict[str, float] = {}
    for i, one in entries:
        found.setdefault(token_text(i, one, tokenizer), _finite(one))
    return found


def _token_bytes(token_id: int, logprob: Logprob, tokenizer: Tokenizer | None) -> list[int]:
    if tokenizer is not None and tokenizer.is_byte_level:
        return list(tokenizer.token_bytes(token_id))
    return list(token_text(token_id, logprob, tokenizer).encode())


def _finite(logprob: Logprob) -> float:
    return max(logprob.logprob, _LEAST)
