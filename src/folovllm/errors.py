"""Errors of the engine: one base, and below it who is to blame."""


class FoloVLLMError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(FoloVLLMError, ValueError):
    """An engine option is wrong; the message names the option and what is allowed."""


class ModelLoadError(FoloVLLMError):
    """The checkpoint is missing, incomplete or of an unsupported architecture."""


class InvalidRequestError(FoloVLLMError, ValueError):
    """A request cannot be served as asked (HTTP 400): bad sampling value, prompt too long, empty prompt."""


class EngineDeadError(FoloVLLMError, RuntimeError):
    """The engine core has stopped; no request can be served any more (HTTP 500, health 503)."""
