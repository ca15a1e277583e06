"""What can go wrong in `kvrouter`, and whose fault it is."""

from __future__ import annotations


class KVRouterError(Exception):
    """Base of every error raised by this package."""


class InvalidKeysError(KVRouterError, ValueError):
    """Block keys, entries or weights have the wrong type or shape; the message says which and what is allowed."""


class ConfigError(KVRouterError, ValueError):
    """An option has a value that is not allowed; the message names the option and the allowed values."""


class EndpointError(KVRouterError, RuntimeError):
    """An event endpoint cannot be subscribed to; the message names the endpoint and the cause."""


class UnknownPodError(KVRouterError, KeyError):
    """No pod of this name is subscribed."""


class DeadlineExceededError(KVRouterError, TimeoutError):
    """What was waited for did not happen before the deadline."""


class TokenizerLoadError(KVRouterError, RuntimeError):
    """A tokenizer or chat template cannot be loaded; the message names the file and the cause."""


class PromptError(KVRouterError, ValueError):
    """A prompt or conversation cannot become token ids; the message says why."""


class PoolOverloadError(KVRouterError, RuntimeError):
    """More work waits for the tokenisation threads than their queue may hold."""


class PoolClosedError(KVRouterError, RuntimeError):
    """The tokenisation threads have ended."""


class ListenError(KVRouterError, OSError):
    """The router cannot listen on its address; the message names the address and the cause."""


class RequestError(KVRouterError, ValueError):
    """A client's request is answered with an error: its HTTP status, and the fields of an OpenAI error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        """Describe the answer."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
