"""Offline inference from the command line: prompts from a file, answers into another.

text file     one prompt per line, blank lines skipped
JSONL file    {"prompt": text or token ids} or {"messages": [...]}, and any sampling option; "id" comes back

results       JSONL, one line per prompt in the order of the prompts, written as soon as that order allows
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.parallel_sampling import ParentRequest
from folovllm.engine.processor import Processor, PromptType
from folovllm.errors import ConfigError, InvalidRequestError
from folovllm.outputs import RequestOutput
from folovllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What to complete, and where to."""

    prompt: str | None = None
    """One prompt; its completion is printed as it grows."""
    input_file: Path | None = None
    """Prompts: a text file with one per line, or .jsonl with prompt or messages, sampling options and id."""
    output_file: Path | None = None
    """Write results to this file, as JSONL; they are printed otherwise."""
    chat: bool = False
    """Put prompts into the model's chat template, as a user's message."""

    def check(self) -> None:
        """Return when they make sense together.

        Raises:
            ConfigError: they do not.
        """
        if (self.prompt is None) == (self.input_file is None):
            raise ConfigError("give either a prompt or an input file")


@dataclass(frozen=True, slots=True)
class _Task:
    """One prompt of the input."""

    id: str | int
    prompt: PromptType | None
    messages: list[dict[str, Any]] | None
    options: dict[str, Any]

    def echo(self) -> dict[str, Any]:
        """What came in, for the result's line."""
        if self.messages is not None:
            return {"id": self.id, "messages": self.messages}
        return {"id": self.id, "prompt": self.prompt}


def run_offline(args: EngineArgs, options: RunOptions, sampling: dict[str, Any]) -> None:
    """Complete every prompt; `sampling` are the options given for all, which a prompt's own override.

    Raises:
        FoloVLLMError: an option, the model or a prompt (its line is named) is not usable; nothing is computed then.
        OSError: a file cannot be read or written.
    """
    options.check()
    tasks = list(_read_tasks(options))
    # The options can be judged now; the model may take minutes to load.
    each = [_params({**sampling, **task.options}, task) for task in tasks]
    with ExitStack() as stack:
        out: IO[str] = sys.stdout
        if options.output_file is not None:
            out = stack.enter_context(options.output_file.open("w", encoding="utf-8"))
        engine = LLMEngine.from_engine_args(args)
        stack.callback(engine.shutdown)
        defaults = engine.processor.facts.default_sampling
        each = [_params({**defaults, **sampling, **task.options}, task) for task in tasks]
        prompts = [_prompt(engine.processor, task, options.chat) for task in tasks]
        requests = engine.add_requests(prompts, each)
        if options.prompt is not None and options.output_file is None and each[0].n == 1:
            _stream(engine, requests[0], out)
        else:
            _run_all(engine, tasks, requests, out)


def _read_tasks(options: RunOptions) -> Iterator[_Task]:
    if options.prompt is not None:
        yield _Task(0, options.prompt, None, {})
        return
    assert options.input_file is not None
    is_json = options.input_file.suffix in (".jsonl", ".ndjson", ".json")
    lines = options.input_file.read_text(encoding="utf-8").split("\n")
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise InvalidRequestError(f"{options.input_file} holds no prompt")
    for index, (number, line) in enumerate(filled):
        yield _parse_line(f"{options.input_file}:{number}", line, index) if is_json else _Task(index, line, None, {})


def _parse_line(where: str, line: str, index: int) -> _Task:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise InvalidRequestError(f"{where} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequestError(f"{where} must be a JSON object")
    prompt, messages, name = fields.pop("prompt", None), fields.pop("messages", None), fields.pop("id", index)
    if (prompt is None) == (messages is None):
        raise InvalidRequestError(f"{where} must have either prompt or messages")
    if not isinstance(prompt, str | list | None) or not isinstance(messages, list | None):
        raise InvalidRequestError(f"{where}: prompt must be a text or token ids, messages a list")
    return _Task(name, prompt, messages, fields)


def _params(options: dict[str, Any], task: _Task) -> SamplingParams:
    try:
        return SamplingParams.from_options(options)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"prompt {task.id!r}: {error}") from error


def _prompt(processor: Processor, task: _Task, chat: bool) -> PromptType:
    messages = task.messages
    if messages is None and chat:
        if not isinstance(task.prompt, str):
            raise InvalidRequestError(f"prompt {task.id!r}: a chat needs a text, not token ids")
        messages = [{"role": "user", "content": task.prompt}]
    try:
        if messages is None:
            return processor.tokenize(task.prompt if task.prompt is not None else "")
        # The template wrote the special tokens already.
        return processor.tokenize(processor.render_chat(messages), add_special_tokens=False)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"prompt {task.id!r}: {error}") from error


def _stream(engine: LLMEngine, request: ParentRequest, out: IO[str]) -> None:
    """Print the completion as it grows."""
    shown = 0
    while True:
        output = request.take()
        if output is None:
            engine.step()
            continue
        [completion] = output.outputs
        out.write(completion.text[shown:])
        out.flush()
        shown = len(completion.text)
        if output.finished:
            break
    out.write("\n")
    if completion.finish_reason == "error":
        raise InvalidRequestError("the engine could not complete this prompt; its log tells more")


def _run_all(engine: LLMEngine, tasks: Sequence[_Task], requests: Sequence[ParentRequest], out: IO[str]) -> None:
    """Run to the end under a progress bar, which standard error shows."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tokens = TextColumn("{task.fields[tokens_per_s]:.0f} tokens/s")
    with Progress(*columns, tokens, console=Console(stderr=True)) as progress:
        bar = progress.add_task("prompts", total=len(requests), tokens_per_s=0.0)
        written = 0
        while written < len(requests):
            while written < len(requests) and requests[written].finished:
                output = requests[written].take()
                assert output is not None, "the last delta is still to be taken"
                out.write(json.dumps(_result(tasks[written], output), ensure_ascii=False) + "\n")
                written += 1
            if written < len(requests):
                engine.step()
            generated = sum(state.num_output_tokens for request in requests for state in request.states)
            elapsed = progress.tasks[0].elapsed or 0.0
            done = sum(request.finished for request in requests)
            progress.update(bar, completed=done, tokens_per_s=generated / elapsed if elapsed else 0.0)


def _result(task: _Task, output: RequestOutput) -> dict[str, Any]:
    choices = []
    for completion in output.outputs:
        choice: dict[str, Any] = {
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if completion.logprobs is not None:
            choice["logprobs"] = [
                {str(token): entry.logprob for token, entry in position.items()} for position in completion.logprobs
            ]
        choices.append(choice)
    return {
        **task.echo(),
        "outputs": choices,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
    }
