"""Engines that answer one request after another: transformers and llama.cpp. runner.py drives them."""

from typing import Any


class Transformers:
    """Plain `model.generate`."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        torch.set_num_threads(options["num_threads"])
        self._torch = torch
        self._config = GenerationConfig
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, options["dtype"])).eval()

    def answer(self, prompt: list[int], num_tokens: int) -> list[int]:
        ids = self._torch.tensor([prompt])
        config = self._config(max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
        output = self._model.generate(ids, attention_mask=self._torch.ones_like(ids), generation_config=config)
        return output[0, len(prompt) :].tolist()


class LlamaCpp:
    """llama.cpp on a GGUF file without a tokenizer; the largest logit is taken here."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        import llama_cpp
        import numpy as np

        threads = options["num_threads"]
        self._np, self._llama_cpp = np, llama_cpp
        self._llama = llama_cpp.Llama(
            model,
            n_ctx=options["max_model_len"],
            n_batch=options["max_num_batched_tokens"],
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self._num_vocab = self._llama.n_vocab()

    def answer(self, prompt: list[int], num_tokens: int) -> list[int]:
        self._llama.reset()
        self._llama.eval(prompt)
        tokens = [self._likeliest()]
        while len(tokens) < num_tokens:
            self._llama.eval(tokens[-1:])
            tokens.append(self._likeliest())
        return tokens

    def _likeliest(self) -> int:
        logits = self._llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        return int(self._np.ctypeslib.as_array(logits, shape=(self._num_vocab,)).argmax())
