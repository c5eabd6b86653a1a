"""Addresses of servers and the keys to them: the same for teachers and rollouts."""

import os
from urllib.parse import urlsplit

from poweropd.errors import UsageError


def check_url(key: str, url: str) -> None:
    """Raises ValueError, without repeating a password, where `url` is no base URL."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        plain = parts.username is None and parts.password is None and not parts.query
    except ValueError:  # brackets that do not match, or a port that is no number
        known = plain = False
    if not known or not plain:
        raise ValueError(
            f"{key}: expected a base URL such as http://127.0.0.1:8000, without a key or "
            f"password (see api_key_env), got ...{url.rpartition('@')[2].partition('?')[0]}"
        )


def base_url(url: str) -> str:
    """Paths such as /v1/completions are put behind it."""
    return url.rstrip("/").removesuffix("/v1")


def api_key(key: str, variable: str | None) -> str | None:
    """The value of an environment variable; raises UsageError where it is no key."""
    if variable is None:
        return None
    value = os.environ.get(variable, "").strip()
    if not value or not value.isascii():
        raise UsageError(
            f"{key}: expected a key of ASCII characters in the variable {variable}, which is "
            f"{'not plain text' if value else 'not set'}"
        )
    return value
