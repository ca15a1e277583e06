"""Structured outputs: from what a user asks for to a checked grammar, in the front end.

Mirrors vllm/v1/structured_output/backend_guidance.py and the checks of vllm/v1/engine/processor.py. The core, which
follows the grammar token by token, gets it as text: see sample/logits_processor/structured.py.
"""

import functools
import json
from typing import Any

import msgspec

from folovllm.errors import InvalidRequestError
from folovllm.sampling_params import StructuredOutputsParams
from folovllm.transformers_utils.tokenizer import Tokenizer

_ANY_OBJECT = {"type": "object"}
_CACHE_SIZE = 128


def compile_grammar(params: StructuredOutputsParams) -> str:
    """The grammar as llguidance takes it; known ones come from a cache.

    Raises:
        InvalidRequestError: the schema, expression or grammar is not valid, or has parts that cannot be honoured.
    """
    try:
        return _compile(msgspec.json.encode(params))
    except RecursionError as error:
        raise InvalidRequestError("structured_outputs is nested too deeply") from error


def check_tokenizer(tokenizer: Tokenizer | None) -> None:
    """Return when a grammar can be followed with this tokenizer.

    Raises:
        InvalidRequestError: there is none, or its tokens do not say which bytes they stand for.
    """
    if tokenizer is None:
        raise InvalidRequestError("this engine runs without a tokenizer; structured_outputs needs one")
    if not tokenizer.is_byte_level and "ByteFallback" not in repr(tokenizer.backend.decoder):
        raise InvalidRequestError("structured_outputs needs a tokenizer of bytes; this model's tokens are not")


@functools.lru_cache(maxsize=_CACHE_SIZE)
def _compile(encoded: bytes) -> str:
    from llguidance import LLMatcher

    params = msgspec.json.decode(encoded, type=StructuredOutputsParams)
    kind = next(name for name in ("json", "regex", "choice", "grammar", "json_object") if getattr(params, name))
    try:
        grammar = _to_grammar(params)
    except ValueError as error:
        raise InvalidRequestError(f"structured_outputs.{kind} is not valid: {error}") from error
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_error:
        raise InvalidRequestError(f"structured_outputs.{kind} cannot be honoured: {messages[0]}")
    return grammar


def _to_grammar(params: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher, grammar_from

    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, params.choice)))
    if params.grammar is not None:
        return grammar_from("grammar", params.grammar)
    if params.json_object:
        schema: Any = _ANY_OBJECT
    else:
        schema = json.loads(params.json) if isinstance(params.json, str) else params.json
        if not isinstance(schema, dict):
            raise ValueError(f"a JSON schema is an object, not {json.dumps(schema)[:50]}")
    if params.disable_additional_properties:
        schema = _without_additional_properties(schema)
    options: Any = {"whitespace_flexible": not params.disable_any_whitespace}
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=options)


def _without_additional_properties(schema: Any) -> Any:
    """A copy in which every object schema that names properties and says nothing about others has no others."""
    if isinstance(schema, list):
        return [_without_additional_properties(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {name: _without_additional_properties(value) for name, value in schema.items()}
    if ("properties" in copy or "patternProperties" in copy) and "additionalProperties" not in copy:
        copy["additionalProperties"] = False
    return copy
