"""The tokenizer of a checkpoint: text to token ids and back, through the Rust library directly.

`transformers` is only imported for checkpoints without a tokenizer.json: the import costs more than the server's start.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders

from folovllm.errors import InvalidRequestError, ModelLoadError
from folovllm.transformers_utils.chat_template import ChatTemplate, Message, load_chat_template

_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to token ids and back. Safe to use from several threads at once."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        """Wrap `backend`; `special_tokens` maps roles such as `eos_token` to their text."""
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.chat_template = chat_template
        self.special_token_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        eos = (special_tokens or {}).get("eos_token")
        self.eos_token_id: int | None = None if eos is None else backend.token_to_id(eos)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        """Whether the text is the UTF-8 reading of the tokens' bytes put together."""
        self._byte_of_char = {char: byte for byte, char in _byte_level_alphabet().items()}
        self._token_bytes: dict[int, bytes] = {}

    @classmethod
    def from_checkpoint(cls, directory: Path) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json and the chat template of a checkpoint.

        Raises:
            ModelLoadError: there is no tokenizer, or it cannot be read.
        """
        config = read_json(directory / "tokenizer_config.json")
        special_tokens = _special_tokens(read_json(directory / "special_tokens_map.json") | config)
        template = load_chat_template(directory, config, special_tokens)
        return cls(_load_backend(directory), special_tokens=special_tokens, chat_template=template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`, with what the tokenizer puts around a text (such as BOS) unless told otherwise.

        Raises:
            InvalidRequestError: `text` has a lone surrogate, so it is no Unicode text.
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequestError(f"the prompt is not valid Unicode text: {error}") from error

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; ids outside the vocabulary read as nothing."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a byte-level token stands for; nothing for an id outside the vocabulary."""
        known = self._token_bytes.get(token_id)
        if known is None:
            token = self.backend.id_to_token(token_id) or ""
            try:
                known = bytes(self._byte_of_char[char] for char in token)
            except KeyError:  # an added token written in plain text
                known = token.encode()
            self._token_bytes[token_id] = known
        return known

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for a conversation.

        Raises:
            InvalidRequestError: the checkpoint has no chat template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise InvalidRequestError("this model has no chat template; send a prompt instead of messages")
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt, **variables)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is no such file.

    Raises:
        ModelLoadError: the file is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} is not a JSON object")
    return value


def _load_backend(directory: Path) -> tokenizers.Tokenizer:
    file = directory / "tokenizer.json"
    if file.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
            raise ModelLoadError(f"{file} cannot be read: {error}") from error
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory).backend_tokenizer
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelLoadError(
            f"{directory} holds no tokenizer.json, nor another tokenizer that can be converted; "
            "pass skip_tokenizer_init to serve token ids only"
        ) from error


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _byte_level_alphabet() -> dict[int, str]:
    """Byte -> the printable character that stands for it in byte-level vocabularies.

    Printable Latin-1 bytes stand for themselves, the others follow from U+0100 on.
    Source: GPT-2's `bytes_to_unicode`.
    """
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in themselves}
    others = [byte for byte in range(256) if byte not in alphabet]
    return alphabet | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
