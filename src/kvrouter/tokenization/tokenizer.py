"""The tokenizer of a checkpoint: text -> the token ids its engine computes, by the same Rust library.

Only text -> ids is needed here, so `transformers` is not imported: tokenizer.json says all, the special tokens put
around a text included.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import tokenizers

from kvrouter.errors import PromptError, TokenizerLoadError

logger = logging.getLogger(__name__)

TokenArray = npt.NDArray[np.uint32]
"""Token ids `[num_tokens]`."""

TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
"""What is read of a checkpoint."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text -> token ids; any number of threads may use one."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> TokenArray:
        """Return the ids of `text`, with what the tokenizer puts around it (such as BOS) unless told otherwise.

        Raises:
            PromptError: `text` is no Unicode text (it has a lone surrogate).
        """


class LocalTokenizer:
    """The tokenizer.json of a checkpoint directory; immutable, and it releases the GIL while it works."""

    def __init__(self, directory: Path) -> None:
        """Load `directory`/tokenizer.json.

        Raises:
            TokenizerLoadError: there is no such file, or it is not a tokenizer.
        """
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise TokenizerLoadError(f"{directory} has no tokenizer.json")
        try:
            self._backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
            raise TokenizerLoadError(f"{file} is not a tokenizer: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self.directory: Final = directory

    def encode(self, text: str, *, add_special_tokens: bool = True) -> TokenArray:
        """See `Tokenizer.encode`."""
        try:
            # The batch call, unlike the single one, releases the GIL; "fast" leaves out the offsets.
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise PromptError(f"the prompt is not Unicode text: {error}") from error
        return np.array(encoding.ids, np.uint32)


def resolve_checkpoint(path_or_id: str) -> Path:
    """Return the directory of a checkpoint: a path as it is, a Hugging Face id from the local cache or the hub.

    Raises:
        TokenizerLoadError: it is neither a directory nor a repository that can be had.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path_or_id.startswith((".", "/", "~")) or path_or_id.count("/") > 1:
        raise TokenizerLoadError(f"there is no directory {path_or_id}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = list(TOKENIZER_FILES)
    try:
        return Path(snapshot_download(path_or_id, allow_patterns=patterns, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        if isinstance(error, HFValidationError):
            raise TokenizerLoadError(f"{path_or_id} is neither a directory nor a Hugging Face id") from error
    try:
        return Path(snapshot_download(path_or_id, allow_patterns=patterns))
    except (OSError, HfHubHTTPError) as error:
        raise TokenizerLoadError(f"{path_or_id} is no directory, and not to be had from the hub: {error}") from error
