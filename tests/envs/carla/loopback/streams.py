"""Sensor streams: who listens to which, and the byte layouts of what they get."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import msgpack

#: What kind of sensor sent a message: its place in the client's list of sensors.
COLLISION, CAMERA, EPISODE = 0, 13, 17
#: Stream of the episode's state.
EPISODE_STREAM = 1

Transform = tuple[float, float, float, float, float, float]
ORIGIN: Transform = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Stamp:
    """When a message was made."""

    frame: int
    seconds: float


def token(stream: int, port: int) -> bytes:
    """What tells a client where to listen: stream, port, TCP, IPv4, address."""
    return struct.pack("<IHBB", stream, port, 1, 1) + bytes([127, 0, 0, 1]) + bytes(12)


def image(width: int, height: int, fov: float, bgra: bytes) -> bytes:
    """Payload of a camera."""
    return struct.pack("<IIf", width, height, fov) + bgra


def collision(actor: list[object], other: list[object], impulse: Iterable[float]) -> bytes:
    """Payload of a collision sensor: whose, with whom, N·s."""
    return msgpack.packb([actor, other, [float(x) for x in impulse]], use_single_float=True)


def episode_header(episode: int, seconds: float, delta: float) -> bytes:
    """First part of the episode's state: no map origin, nothing pending."""
    return struct.pack("<Qdf3iI", episode, seconds, delta, 0, 0, 0, 0)


def actor_state(actor: int, transform: Transform, velocity: Iterable[float], extra: bytes = b"") -> bytes:
    """One actor in the episode's state: id, active, place, velocity; no angular velocity, no acceleration; the rest."""
    return struct.pack("<IB6f9f", actor, 1, *transform, *velocity, 0, 0, 0, 0, 0, 0) + extra.ljust(54, b"\0")


def vehicle_state(throttle: float, steer: float, brake: float, speed_limit: float) -> bytes:
    """A vehicle's part of :func:`actor_state`: its newest control and the speed limit in km/h."""
    return struct.pack("<fff???i", throttle, steer, brake, False, False, False, 1) + struct.pack("<f", speed_limit)


class StreamServer:
    """Sends each message to whoever subscribed to its stream.

    Args:
        listener: Listening socket; its port is in the tokens.
    """

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.port: int = listener.getsockname()[1]
        self._subscribers: dict[int, list[socket.socket]] = {}
        self._lock = threading.Lock()

    def start(self) -> None:
        """Accept subscribers in the background."""
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                (stream,) = struct.unpack("<I", connection.recv(4, socket.MSG_WAITALL))
            except (OSError, struct.error):  # it left before it said what it wants
                connection.close()
                continue
            with self._lock:
                self._subscribers.setdefault(stream, []).append(connection)

    def token(self, stream: int) -> bytes:
        """Token of a stream."""
        return token(stream, self.port)

    def send(self, stream: int, kind: int, stamp: Stamp, payload: bytes, transform: Transform = ORIGIN) -> None:
        """Send one message."""
        message = struct.pack("<QQd6f", kind, stamp.frame, stamp.seconds, *transform) + payload
        with self._lock:
            for connection in self._subscribers.get(stream, [])[:]:
                try:
                    connection.sendall(struct.pack("<I", len(message)) + message)
                except OSError:
                    self._subscribers[stream].remove(connection)
