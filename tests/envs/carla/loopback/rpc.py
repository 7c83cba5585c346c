"""MessagePack RPC as CARLA's client speaks it: requests, replies, and the wrapping of results."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

import msgpack

logger = logging.getLogger(__name__)

Handler = Callable[..., Any]

REQUEST, RESPONSE = 0, 1


class RpcError(Exception):
    """An error that the client shall see as a RuntimeError with this message."""


class Void:
    """Result of a call that returns nothing."""


def reply(value: Any) -> list[Any]:
    """A result as the client expects it: an optional error for a call without a result, else error-or-value."""
    return [[False]] if value is Void else [[1, value]]


def refusal(message: str) -> list[Any]:
    """An error in the place of a result."""
    return [[0, [message]]]


class Raw:
    """A result that is not wrapped (`apply_batch` wraps each of its answers instead)."""

    def __init__(self, value: Any) -> None:
        self.value = value


class RpcServer:
    """Serves the methods of one object: a call of ``tick_cue`` goes to its ``rpc_tick_cue``.

    Args:
        listener: Listening socket.
        target: Object with the methods.
    """

    def __init__(self, listener: socket.socket, target: object) -> None:
        self.listener = listener
        self.target = target

    def start(self) -> None:
        """Serve in background threads, one per client."""
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        unpacker = msgpack.Unpacker(raw=False, strict_map_key=False, unicode_errors="surrogateescape")
        try:
            while data := connection.recv(1 << 16):
                unpacker.feed(data)
                for message in unpacker:
                    answer = self.call(message[-2], message[-1])
                    if message[0] == REQUEST:
                        connection.sendall(msgpack.packb([RESPONSE, message[1], None, answer]))
        except OSError:
            pass
        finally:
            connection.close()

    def call(self, name: str, arguments: list[Any]) -> Any:
        """Answer one call; the client's leading metadata ([is it asynchronous]) is dropped."""
        if arguments and arguments[0] in ([False], [True]):
            arguments = arguments[1:]
        handler: Handler | None = getattr(self.target, f"rpc_{name}", None)
        if handler is None:
            logger.warning("no such call: %s%r", name, arguments)
            return refusal(f"loopback: unknown call {name}")
        try:
            result = handler(*arguments)
        except RpcError as error:
            return refusal(str(error))
        except Exception as error:
            logger.exception("%s failed", name)
            return refusal(f"loopback: {name}: {error!r}")
        return result.value if isinstance(result, Raw) else reply(result)
