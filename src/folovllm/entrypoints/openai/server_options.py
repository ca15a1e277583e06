"""How the server is reached, whom it serves and how it ends."""

from dataclasses import dataclass, field

from folovllm.entrypoints.openai.tool_parsers import choose_tool_parser
from folovllm.errors import ConfigError

API_KEY_VARIABLES = ("FOLOVLLM_API_KEY", "VLLM_API_KEY")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Options of the HTTP server; flags of `folovllm serve` and `kvstrata serve`."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key: str | None = field(default=None, metadata={"envvar": API_KEY_VARIABLES}, repr=False)
    """Require this bearer token."""
    drain_timeout: int = 30
    """Seconds that requests may go on after SIGTERM; a second signal ends them at once."""
    tool_call_parser: str = "auto"
    """Format in which the model writes tool calls: hermes, none, or auto, which reads the chat template."""

    def check(self) -> None:
        """Return when every value is allowed.

        Raises:
            ConfigError: one is not.
        """
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port={self.port} is not allowed; it must be from 0 to {2**16 - 1}")
        if self.drain_timeout < 0:
            raise ConfigError(f"drain_timeout={self.drain_timeout} is not allowed; it must be 0 or more seconds")
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("api_key is empty; give a token, or leave it out to serve everyone")
        choose_tool_parser(self.tool_call_parser, None)
