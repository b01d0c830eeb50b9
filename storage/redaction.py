"""Secrets in texts: credentials of URIs, signatures of pre-signed ones, and what secret environment variables hold."""

from __future__ import annotations

import logging
import os
import re

HIDDEN = "***"
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|_KEY|CONNECTION_STRING", re.IGNORECASE)  # of a variable
_USER = re.compile(  # the second form: a password may hold slashes, and is no port
    r"(?<=://)(?:[^/\s'\"]+|[^/\s:@'\"]+:(?!\d+/)[^\s@'\"]+)(?=@)"
)
_QUERY = re.compile(
    r"(?i)(?<=[?&;])((?:AccountKey|SharedAccessSignature|X-Amz-(?:Signature|Credential|Security-Token)|X-Goog-(?:Signature|Credential)"
    r"|AWSAccessKeyId|Signature|sig|token|access_token|password|secret)=)[^&\s'\"]+"
)
_NEVER_A_PATH = re.compile(r"SECRET|_KEY$", re.IGNORECASE)  # keys in base64 may begin with a slash
_SHORTEST = 8  # shorter values also occur in innocent texts


def redact(text: str) -> str:
    """The text with `***` where a secret stands."""
    text = _without_credentials(text)
    for value in _environment_secrets():
        text = text.replace(value, HIDDEN)
    return text


def has_secret(text: str) -> bool:
    """Whether `redact` would change the text."""
    return redact(text) != text


def has_credentials(text: str) -> bool:
    """Whether a URI in the text carries a user, a password or a signature."""
    return _without_credentials(text) != text


def _without_credentials(text: str) -> str:
    return _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(HIDDEN, text))


def _environment_secrets() -> list[str]:
    """Values of the variables whose names say that they are secret; a path (a token's file) is none."""
    found = {
        value
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and (_NEVER_A_PATH.search(name) or not value.startswith(("/", "~")))
    }
    return sorted((value for value in found if len(value) >= _SHORTEST), key=len, reverse=True)


class RedactingFormatter(logging.Formatter):
    """Formats log records, tracebacks included, without their secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The line to write."""
        return redact(super().format(record))
