"""One engine in a process of its own, driven by JSON lines on its standard input.

    python runner.py folovllm|vllm|transformers|llama.cpp MODEL '{"num_threads": 2, ...}'
    <- {"ready": true}
    -> {"prompts": [[1, 2, ...], ...], "max_tokens": 16 or [16, 20, ...]}
    <- {"seconds": 1.25, "num_output_tokens": 128, "first_answer": [3, 4, ...]}
    -> {"reset": true}
    <- {"reset": true}
    -> {"touch": true}      all of the KV pool becomes resident, for engines that take its memory block by block
    <- {"touch": true}

It imports nothing of kvstrata but the engine it was asked for: it also runs under the interpreters of others.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import_started = time.perf_counter()


def make_vllm(model: str, options: dict[str, Any]) -> Any:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(options["kv_cache_gb"])
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # no process between us and the engine, on either side
    from vllm import LLM

    return LLM(
        model,
        dtype=options["dtype"],
        skip_tokenizer_init=True,
        max_model_len=options["max_model_len"],
        max_num_seqs=options["max_num_seqs"],
        max_num_batched_tokens=options["max_num_batched_tokens"],
        enable_prefix_caching=options["prefix_caching"],
        disable_log_stats=True,
        seed=0,
    )


def make_folovllm(model: str, options: dict[str, Any]) -> Any:
    from folovllm.entrypoints.llm import LLM

    return LLM(
        model,
        dtype=options["dtype"],
        skip_tokenizer_init=True,
        max_model_len=options["max_model_len"],
        max_num_seqs=options["max_num_seqs"],
        max_num_batched_tokens=options["max_num_batched_tokens"],
        enable_prefix_caching=options["prefix_caching"],
        kv_cache_memory_gb=options["kv_cache_gb"],
        num_threads=options["num_threads"],
        **options.get("extra", {}),
    )


def make_single_stream(engine: str, model: str, options: dict[str, Any]) -> Any:
    import single_stream

    return {"transformers": single_stream.Transformers, "llama.cpp": single_stream.LlamaCpp}[engine](model, options)


def make(engine: str, model: str, options: dict[str, Any]) -> Any:
    if engine in BATCHING:
        return BATCHING[engine](model, options)
    return make_single_stream(engine, model, options)


BATCHING = {"vllm": make_vllm, "folovllm": make_folovllm}


def batch(engine: str, llm: Any, prompts: list[list[int]], lengths: list[int]) -> Callable[[], list[list[int]]]:
    """What answers all prompts at once; made beforehand, because only the answering is measured."""
    if engine == "vllm":
        from vllm import SamplingParams

        inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        extra, options = {"use_tqdm": False}, {"detokenize": False}
    else:
        from folovllm.sampling_params import SamplingParams

        inputs, extra, options = prompts, {}, {}
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, **options) for n in lengths]
    return lambda: [output.outputs[0].token_ids for output in llm.generate(inputs, params, **extra)]


def generate(engine: str, llm: Any, prompts: list[list[int]], max_tokens: int | list[int]) -> dict[str, Any]:
    lengths = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
    if engine in BATCHING:
        answer = batch(engine, llm, prompts, lengths)
    else:
        answer = lambda: [llm.answer(prompt, n) for prompt, n in zip(prompts, lengths, strict=True)]  # noqa: E731
    start = time.perf_counter()
    answers = answer()
    taken = time.perf_counter() - start
    return {"seconds": taken, "num_output_tokens": sum(map(len, answers)), "first_answer": list(answers[0])}


def touch_pool(engine: str, llm: Any) -> None:
    if engine == "folovllm":
        for cache in llm.llm_engine._client._core.executor.worker.model_runner.kv_caches.values():
            cache.zero_()


def main() -> None:
    engine, model, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what engines print is not an answer
    llm = make(engine, model, options)
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        if "reset" in request:
            answers.write(json.dumps({"reset": bool(llm.reset_prefix_cache())}) + "\n")
        elif "touch" in request:
            touch_pool(engine, llm)
            answers.write(json.dumps({"touch": True}) + "\n")
        else:
            answers.write(json.dumps(generate(engine, llm, request["prompts"], request["max_tokens"])) + "\n")


if __name__ == "__main__":
    main()
