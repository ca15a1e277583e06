"""Remote URLs taken apart; the options behind `?` are declared by the backend that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from flexkv.errors import ConfigError

_TRUE, _FALSE = ("1", "true", "yes"), ("0", "false", "no")


@dataclass(frozen=True, slots=True)
class RemoteUrl:
    """A URL and its parts, percent-decoded.

    Attributes:
        shown: the URL without its password and options, for messages.
        port: None when the URL names none.
        path: what follows the host, with its leading slash, or empty.
    """

    shown: str
    scheme: str
    host: str
    port: int | None
    path: str
    username: str | None
    password: str | None = field(repr=False)
    query: dict[str, str] = field(repr=False)

    @property
    def netloc(self) -> str:
        """Return `host:port`, with brackets around an IPv6 address."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"

    def require(self, holds: bool, problem: str, example: str) -> None:
        """Refuse the URL unless `holds`.

        Raises:
            ConfigError: it does not hold.
        """
        if not holds:
            raise ConfigError(f"remote URL {self.shown!r} {problem}; it looks like {example!r}")

    def options(self) -> UrlOptions:
        """Return the options, to be read by name."""
        return UrlOptions(self)


def parse_url(url: str) -> RemoteUrl:
    """Take a URL apart.

    Raises:
        ConfigError: it is no URL, or gives an option twice.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise ConfigError(f"{url.split('?', 1)[0].rpartition('@')[2]!r} is not a remote URL: {error}") from error
    query = dict(pairs)
    shown = _shown(parts)
    if len(query) != len(pairs):
        raise ConfigError(f"remote URL {shown!r} gives an option more than once")
    if parts.fragment:
        raise ConfigError(f"remote URL {shown!r} has a fragment (#...), which means nothing here")
    return RemoteUrl(
        shown=shown,
        scheme=parts.scheme,
        host=parts.hostname or "",
        port=port,
        path=unquote(parts.path),
        username=None if parts.username is None else unquote(parts.username),
        password=None if parts.password is None else unquote(parts.password),
        query=query,
    )


def _shown(parts: SplitResult) -> str:
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class UrlOptions:
    """Reads options by name; `finish` refuses those that nobody asked for."""

    def __init__(self, url: RemoteUrl) -> None:
        """Read the options of `url`."""
        self._url = url
        self._known: list[str] = []

    def text(self, name: str, default: str | None = None) -> str | None:
        """Return an option as it stands."""
        self._known.append(name)
        return self._url.query.get(name, default)

    def choice(self, name: str, default: str, allowed: Sequence[str]) -> str:
        """Return one of the `allowed` words.

        Raises:
            ConfigError: it is none of them.
        """
        value = self.text(name) or default
        if value not in allowed:
            raise self._refused(name, value, f"one of {', '.join(allowed)}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Return a yes or no.

        Raises:
            ConfigError: it is neither.
        """
        value = self.text(name)
        if value is None:
            return default
        if value.lower() not in (*_TRUE, *_FALSE):
            raise self._refused(name, value, f"one of {', '.join((*_TRUE, *_FALSE))}")
        return value.lower() in _TRUE

    def integer(self, name: str, default: int, smallest: int, largest: int) -> int:
        """Return a whole number within `smallest..largest`.

        Raises:
            ConfigError: it is not.
        """
        value = self.text(name)
        if value is None:
            return default
        if not value.isascii() or not value.isdigit() or not smallest <= int(value) <= largest:
            raise self._refused(name, value, f"a whole number within {smallest}..{largest}")
        return int(value)

    def finish(self) -> None:
        """Refuse options that were not read.

        Raises:
            ConfigError: there is one; the message names it and those that exist.
        """
        unknown = sorted(set(self._url.query) - set(self._known))
        if unknown:
            raise ConfigError(
                f"remote URL {self._url.shown!r} has no option {unknown[0]!r}; "
                f"a {self._url.scheme} URL takes {', '.join(sorted(self._known)) or 'none'}"
            )

    def _refused(self, name: str, value: str, allowed: str) -> ConfigError:
        return ConfigError(f"remote URL {self._url.shown!r}: {name}={value!r} is not allowed; it must be {allowed}")
