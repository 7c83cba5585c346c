"""Keys and passwords kept out of what is printed and written."""

from __future__ import annotations

import logging
import re

#: What replaces a secret.
MASK = "…"

#: What a setting, a parameter or a variable is called that holds a secret.
_NAMES = r"(?:[a-z0-9]+[_-])*(?:token|api[_-]?key|secret|password|passwd|signature|sig|credential)"
#: A value in quotes of YAML or JSON, or one that goes as far as the next sign that no such value has.
_VALUE = r"""(?:'(?:[^'\n]|'')*'|"(?:[^"\\\n]|\\.)*"|[^\s&;,'"{}\[\]]+)"""

_PATTERNS = (
    # A name and a password in an address; a password may have an @ itself.
    (re.compile(r"(?<=://)[^/\s'\"]+@"), f"{MASK}@"),
    # An assignment to such a name, or a flag of it with the value behind it.
    (re.compile(rf"(?i)\b({_NAMES}['\"]?\s*(?:[=:]|%3D)\s*)(?!None\b|null\b){_VALUE}"), rf"\g<1>{MASK}"),
    (re.compile(rf"(?i)(--(?:[\w-]+\.)*{_NAMES}\s+)(?!None\b|null\b|--){_VALUE}"), rf"\g<1>{MASK}"),
    (re.compile(r"(?i)(\bauthorization['\"]?\s*[=:]\s*['\"]?(?:\w+\s+)?)[^\s'\"]+"), rf"\g<1>{MASK}"),
    (re.compile(r"(?i)\b(bearer\s+)[^\s'\"]+"), rf"\g<1>{MASK}"),
    # What Hugging Face, OpenAI-like servers and Weights & Biases hand out.
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\b[0-9a-f]{40}(?=@)"), MASK),
)


def masked(text: str) -> str:
    """A text without the keys and passwords that can be told by their looks.

    These are name and password in an address, values named like a secret (``token=…``, ``api_key: '…'``, ``--api_key
    …``), what follows ``Authorization:``, bearer tokens, and keys of known form.

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
