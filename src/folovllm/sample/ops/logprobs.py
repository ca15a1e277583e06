"""Log-probabilities of chosen and of most likely tokens. Mirrors vllm/v1/sample/ops/logprobs.py."""

import numpy as np
import numpy.typing as npt
import torch

from folovllm.engine.messages import LogprobsLists
from folovllm.sample.ops.staging import to_device


def gather_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_logprobs: int) -> LogprobsLists:
    """Report a token per row and the most likely ones; waits for the device.

    Args:
        logits: `[num_rows, vocab_size]`, as the model made them.
        token_ids: `[num_rows]` int64, the token of each row.
        num_logprobs: how many of the most likely to report; 0 for none.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs >= own).sum(dim=-1)
    best, best_ids = logprobs.topk(min(num_logprobs, logprobs.shape[1]), dim=-1)
    ids = torch.cat([token_ids[:, None], best_ids], dim=1)
    values = torch.cat([own, best], dim=1)
    return LogprobsLists(ids.tolist(), values.tolist(), ranks.tolist())


def gather_logprobs_by_row(
    logits: torch.Tensor, token_ids: torch.Tensor, num_logprobs: npt.NDArray[np.int64]
) -> dict[int, LogprobsLists]:
    """Row -> its report, of as many of the most likely tokens as it asks for."""
    reports: dict[int, LogprobsLists] = {}
    for number in np.unique(num_logprobs).tolist():
        rows = np.flatnonzero(num_logprobs == number)
        index = to_device(rows, logits.device)
        report = gather_logprobs(logits[index], token_ids[index], number)
        for i, row in enumerate(rows.tolist()):
            reports[row] = LogprobsLists(
                report.logprob_token_ids[i : i + 1],
                report.logprobs[i : i + 1],
                report.sampled_token_ranks[i : i + 1],
            )
    return reports
