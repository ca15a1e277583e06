"""Log-probabilities as users see them, with the tokens' texts. Mirrors vllm/v1/engine/logprobs.py."""

from folovllm.engine.messages import LogprobsLists
from folovllm.outputs import Logprob, PositionLogprobs
from folovllm.transformers_utils.tokenizer import Tokenizer


def to_position_logprobs(lists: LogprobsLists, tokenizer: Tokenizer | None) -> list[PositionLogprobs]:
    """One dictionary per position; without a tokenizer the tokens have no text."""
    return [
        {
            # A token that is also among the most likely has the rank it has there.
            token_id: Logprob(logprob, rank, _text_of(token_id, tokenizer))
            for token_id, logprob, rank in zip(ids, logprobs, (own_rank, *range(1, len(ids))), strict=True)
        }
        for ids, logprobs, own_rank in zip(
            lists.logprob_token_ids, lists.logprobs, lists.sampled_token_ranks, strict=True
        )
    ]


def _text_of(token_id: int, tokenizer: Tokenizer | None) -> str | None:
    if tokenizer is None:
        return None
    if tokenizer.is_byte_level:
        return tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")
    return tokenizer.decode([token_id], skip_special_tokens=False)
