"""Several sequences for one prompt (`n`). Mirrors vllm/v1/engine/parallel_sampling.py.

The core knows requests of one sequence only: the front end makes n of them, which share the prompt's blocks through the
prefix cache, the first computing them and the others hitting them, in the same step where it fits.
"""

import msgspec

from folovllm.engine.messages import EngineCoreRequest

_SEED_LIMIT = 2**63


def fan_out(request: EngineCoreRequest) -> list[EngineCoreRequest]:
    """The requests of one sequence each that `request` stands for: itself when n is 1.

    The i-th is named `<i>_<request id>` and seeded with `seed + i`. Only the first is asked for the log-probabilities
    of the prompt, which are the same for all, and which cost it the prefix cache.
    """
    params = request.sampling_params
    if params.n == 1:
        return [request]
    children = []
    for index in range(params.n):
        own = msgspec.structs.replace(
            params,
            n=1,
            seed=None if params.seed is None else (params.seed + index) % _SEED_LIMIT,
            prompt_logprobs=params.prompt_logprobs if index == 0 else None,
        )
        name = f"{index}_{request.request_id}"
        children.append(msgspec.structs.replace(request, request_id=name, sampling_params=own))
    return children
