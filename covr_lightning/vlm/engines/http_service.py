"""One HTTP service that may be slow, busy or away: single requests, and when to leave it alone."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from covr_lightning.errors import ConfigError

log = logging.getLogger(__name__)

#: Longest wait for a connection, in seconds.
CONNECT_SECONDS = 5.0
#: Longest answer that is read, in bytes.
LONGEST_ANSWER = 1 << 20
#: Longest rest between two tries of a service that is away, in seconds.
LONGEST_REST = 600.0
#: Characters of a service's own error message that are shown.
_SHOWN = 300


@dataclass(frozen=True)
class Failure:
    """A request that brought nothing.

    Attributes:
        reason: In words.
        again: Whether the same request may succeed in a moment.
        wait_s: Seconds that the service asks to be left alone for.
        status: Status of the answer; 0 without one.
    """

    reason: str
    again: bool
    wait_s: float = 0.0
    status: int = 0


def check_url(url: str, setting: str) -> str:
    """Check an address before anything is written down or sent.

    Args:
        url: ``http://host:port/path`` or https.
        setting: YAML key of the object that has it, for messages.

    Returns:
        It, without a slash at its end.

    Raises:
        ConfigError: It is no such address, or has a password in it.
    """
    import urllib3

    wrong = f"{setting}.url is {url!r}; it must be like 'http://127.0.0.1:8000/v1'."
    try:
        parts = urlsplit(url)
        urllib3.util.parse_url(url)
        _ = parts.port
    except (ValueError, urllib3.exceptions.LocationParseError):
        raise ConfigError(wrong) from None
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            f"{setting}.url has a name or password in it, which would end up in the run's config.yaml: put the key "
            f"into an environment variable and its name into {setting}.api_key_variable."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(wrong)
    return url.rstrip("/")


class HTTPService:
    """Requests to the one address that is configured: no redirect is followed, and no proxy of the environment asked.

    Args:
        url: What :func:`check_url` returned; requests go below it.
        key_variable: Environment variable with the key to send as a bearer token. The key itself is in no setting and
            in no message.
        connections: Most requests at once.
        setting: YAML key of the object that has these settings, for messages.

    Raises:
        ConfigError: The environment has no such variable.
    """

    def __init__(self, url: str, key_variable: str | None, connections: int, setting: str) -> None:
        import urllib3

        parts = urlsplit(url)
        self._path = parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        self._key = ""
        if key_variable is not None:
            self._key = os.environ.get(key_variable, "").strip()  # a mounted secret ends in a newline
            if not self._key:
                raise ConfigError(
                    f"{setting}.api_key_variable is {key_variable!r}, but the environment has no such variable, or it "
                    "is empty."
                )
            if not (self._key.isascii() and self._key.isprintable()):
                raise ConfigError(
                    f"{setting}.api_key_variable is {key_variable!r}, whose value has characters that no key has: it "
                    "must be printable ASCII in one line."
                )
            self._headers["Authorization"] = f"Bearer {self._key}"
        self._pool = urllib3.connection_from_url(
            f"{parts.scheme}://{parts.netloc}", maxsize=connections, block=True, retries=False
        )

    def send(self, method: str, path: str, content: dict[str, Any] | None, seconds: float) -> bytes | Failure:
        """One request, tried once.

        Args:
            method: ``"GET"`` or ``"POST"``.
            path: Below the address.
            content: Body, sent as JSON.
            seconds: Longest time for all of it.

        Returns:
            The body of a 2xx answer.
        """
        import urllib3

        end = time.monotonic() + seconds
        try:
            response = self._pool.urlopen(
                method,
                f"{self._path}/{path}",
                body=None if content is None else json.dumps(content).encode(),
                headers=self._headers,
                redirect=False,
                retries=False,
                preload_content=False,
                timeout=urllib3.Timeout(connect=min(CONNECT_SECONDS, seconds), read=seconds),
            )
            body = _read(response, end)
        except urllib3.exceptions.NewConnectionError:
            return Failure("nothing takes connections there", again=True)
        except (urllib3.exceptions.TimeoutError, TimeoutError):
            return Failure("no answer in time", again=True)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            return Failure(f"the connection broke ({type(error).__name__})", again=True)
        if body is None:
            return Failure(f"an answer of more than {LONGEST_ANSWER} bytes", again=False)
        return body if 200 <= response.status < 300 else self._refusal(response, body)

    def _refusal(self, response: Any, body: bytes) -> Failure:
        status = response.status
        if 300 <= status < 400:
            return Failure(f"status {status}, a redirect, which is not followed", again=False, status=status)
        said = " ".join(body.decode(errors="replace").split())[:_SHOWN]
        if self._key:
            said = said.replace(self._key, "…")
        again = status in (408, 429) or status >= 500
        return Failure(f"status {status}: {said}", again, _retry_after(response), status)


def _read(response: Any, end: float) -> bytes | None:
    """The body, None if it is too long."""
    body, whole = b"", False
    try:
        while part := response.read1(1 << 16):  # what is there: to wait for more would have no end, byte after byte
            body += part
            if len(body) > LONGEST_ANSWER:
                return None
            if time.monotonic() > end:
                raise TimeoutError
        whole = True
        return body
    finally:
        if not whole:
            response.close()
        response.release_conn()


def _retry_after(response: Any) -> float:
    from urllib3 import Retry
    from urllib3.exceptions import InvalidHeader

    header = response.headers.get("Retry-After")
    try:
        return Retry().parse_retry_after(header) if header else 0.0
    except InvalidHeader:
        return 0.0


class Breaker:
    """Remembers that a service is away, so that not every question waits for it.

    Closed while the service answers. When it is found away it opens and rests, and then lets one try through: if that
    fails too, the rest is twice as long, up to 10 minutes.

    Args:
        name: What the service is called in messages.
        rest_s: First rest in seconds.
    """

    def __init__(self, name: str, rest_s: float) -> None:
        self.name = name
        self.first_rest_s = rest_s
        self.clock = time.monotonic
        self._failures = 0
        self._until = 0.0
        self._reason = ""

    @property
    def is_open(self) -> bool:
        """Whether the service did not answer when last asked."""
        return self._failures > 0

    @property
    def rests(self) -> bool:
        """Whether it is not to be asked now."""
        return self.is_open and self.clock() < self._until

    def failed(self, failure: Failure) -> None:
        """The service is away, or refuses."""
        rest = min(self.first_rest_s * 2**self._failures, LONGEST_REST)
        rest = max(rest, min(failure.wait_s, LONGEST_REST))
        self._failures += 1
        self._until = self.clock() + rest
        if failure.reason != self._reason:
            log.warning(
                "%s gives no answers (%s). Its frames stay without a label and the run goes on; it is asked again in "
                "%.3g s, then ever less often, at least every %.0f minutes.",
                self.name, failure.reason, rest, LONGEST_REST / 60,
            )  # fmt: skip
        self._reason = failure.reason

    def answered(self) -> None:
        """The service is there."""
        if self.is_open:
            log.info("%s answers again.", self.name)
        self._failures, self._reason = 0, ""
