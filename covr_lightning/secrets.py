"""Keys and passwords kept out of what is printed and written."""

from __future__ import annotations

import logging
import re

#: What replaces a secret.
MASK = "…"

_PATTERNS = (
    # A name and a password in an address.
    (re.compile(r"(?<=://)[^/\s@'\"]+@"), f"{MASK}@"),
    # A parameter of an address, a header, or a setting that is named like a secret.
    (
        re.compile(
            r"(?i)\b((?:[a-z0-9]+[_-])*(?:token|api[_-]?key|secret|password|passwd|signature|sig|credential)"
            r"(?:\s*[=:]\s*|%3D))(?!None\b|null\b)[^\s&;,'\"]+"
        ),
        rf"\g<1>{MASK}",
    ),
    (re.compile(r"(?i)\b(bearer\s+)[^\s'\"]+"), rf"\g<1>{MASK}"),
    # What Hugging Face, OpenAI-like servers and Weights & Biases hand out.
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\b[0-9a-f]{40}(?=@)"), MASK),
)


def masked(text: str) -> str:
    """A text without the keys and passwords that can be told by their looks.

    These are name and password in an address, values named like a secret (``token=…``, ``api_key: …``), bearer tokens,
    and keys of known form.

    Args:
        text: Any text.
    """
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


class MaskSecrets(logging.Filter):
    """Masks a log record's message, its arguments included."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Mask it; every record passes."""
        message = record.getMessage()
        if (safe := masked(message)) != message:
            record.msg, record.args = safe, None
        return True
