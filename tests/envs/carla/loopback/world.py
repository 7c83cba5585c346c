"""The loopback server's world: actors on the scenario's road, advanced tick by tick.

CARLA's frame is left-handed (y and yaw to the right, degrees); `Track` and the vehicles' motion are right-handed.
Transforms at the border of this module are CARLA's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from covr_lightning.envs.driving.road.bodies import Body, Kind, contact, drive, impulse
from covr_lightning.envs.driving.road.track import Pose
from tests.envs.carla.loopback.blueprints import BY_NAME
from tests.envs.carla.loopback.rpc import RpcError

#: Half heights of the boxes, metres: vehicles and sensors, walkers.
HALF_HEIGHT, HALF_WALKER = 0.75, 0.9
STILL = (0.0, 0.0)
#: A walker takes this long from standing to any speed, and when hit is gone after this many seconds.
RAMP_SECONDS, LIFE_AFTER_DEATH = 2.0, 10.0


@dataclass
class Place:
    """A transform of CARLA: metres, degrees."""

    x: float = 0.0
    y: float = 0.0
    z: float = 0.0
    pitch: float = 0.0
    yaw: float = 0.0
    roll: float = 0.0

    @classmethod
    def decode(cls, transform: list[list[float]]) -> Place:
        """From RPC: [[x, y, z], [pitch, yaw, roll]]."""
        return cls(*transform[0], *transform[1])

    @property
    def pose(self) -> Pose:
        """In the plane, right-handed."""
        return Pose(self.x, -self.y, -math.radians(self.yaw))

    def move(self, pose: Pose) -> None:
        """Go to a right-handed pose."""
        self.x, self.y, self.yaw = pose.x, -pose.y, -math.degrees(pose.heading)

    @property
    def values(self) -> tuple[float, float, float, float, float, float]:
        """In the order of the wire."""
        return self.x, self.y, self.z, self.pitch, self.yaw, self.roll


@dataclass
class Actor:
    """Anything that was spawned.

    Attributes:
        number: Its id.
        name: Id of its blueprint.
        description: Its description as it came over the wire.
        attributes: Its attributes by name.
        place: Where it is.
        parent: The actor it is attached to, 0 for none.
        stream: Its sensor stream, 0 for none.
        throttle: Newest control of a vehicle, 0 to 1.
        steer: Newest control of a vehicle, −1 to 1.
        brake: Newest control of a vehicle, 0 to 1.
        autopilot: Whether a traffic manager drives it.
        speed: Speed of a vehicle along its heading or of a walker along `direction`, m/s.
        direction: Where a walker goes (CARLA's frame).
        wanted: Speed that a walker is told to have, m/s.
        died: Simulated time at which a walker was hit.
    """

    number: int
    name: str
    description: list[object]
    attributes: dict[str, str]
    place: Place
    parent: int = 0
    stream: int = 0
    throttle: float = 0.0
    steer: float = 0.0
    brake: float = 0.0
    autopilot: bool = False
    speed: float = 0.0
    direction: tuple[float, float] = (0.0, 0.0)
    wanted: float = 0.0
    died: float | None = None

    @property
    def kind(self) -> Kind | None:
        """Its box, if it has a body."""
        return BY_NAME[self.name].kind

    @property
    def is_vehicle(self) -> bool:
        """Whether it drives."""
        return self.name.startswith("vehicle.")

    @property
    def is_walker(self) -> bool:
        """Whether it walks."""
        return self.name.startswith("walker.")

    @property
    def is_invincible(self) -> bool:
        """Whether a car passes over it unnoticed; so are walkers of which nothing else is said."""
        return self.is_walker and self.attributes.get("is_invincible", "true") == "true"

    @property
    def velocity(self) -> tuple[float, float, float]:
        """Velocity in CARLA's frame, m/s."""
        if self.is_walker:
            return self.direction[0] * self.speed, self.direction[1] * self.speed, 0.0
        yaw = math.radians(self.place.yaw)
        return self.speed * math.cos(yaw), self.speed * math.sin(yaw), 0.0


@dataclass(frozen=True)
class Collision:
    """Two bodies that touch: whose sensor says so, with whom, impulse in N·s (CARLA's frame)."""

    actor: int
    other: int
    impulse: tuple[float, float, float]


@dataclass
class World:
    """All actors and the clock.

    Attributes:
        frame: Number of the newest tick.
        seconds: Simulated time.
        actors: By id.
    """

    frame: int = 1
    seconds: float = 0.0
    actors: dict[int, Actor] = field(default_factory=dict)
    _next: int = 24

    def spawn(self, description: list[object], place: Place, parent: int = 0) -> Actor:
        """Put an actor into the world; refused where a body stands, as CARLA does."""
        name = str(description[1])
        if name not in BY_NAME:
            raise RpcError(f"Invalid actor description {name!r}")
        values = description[2]
        assert isinstance(values, list)
        actor = Actor(
            self._next, name, description, {str(v[0]): str(v[2]) for v in values}, place, parent,
            stream=100 + self._next if name.startswith("sensor.") else 0,
        )  # fmt: skip
        if actor.kind and any(self._touch(actor, other) for other in self.actors.values()):
            raise RpcError("Spawn failed because of collision at spawn position")
        if parent and parent not in self.actors:
            raise RpcError("unable to spawn actor with parent: parent actor not found")
        self._next += 1
        self.actors[actor.number] = actor
        return actor

    def destroy(self, number: int) -> bool:
        """Remove an actor. What is attached to it loses its parent and stays, as in CARLA."""
        return self.actors.pop(number, None) is not None

    def advance(self, dt: float) -> list[Collision]:
        """One tick: everybody moves, bodies that touch stop each other."""
        self.frame += 1
        self.seconds += dt
        before = {number: actor.place.pose for number, actor in self.actors.items()}
        for actor in self.actors.values():
            if actor.is_vehicle:
                throttle = -actor.brake if actor.brake else actor.throttle
                pose, actor.speed = drive(actor.place.pose, actor.speed, actor.steer, throttle, dt)
                actor.place.move(pose)
            elif actor.is_walker:
                actor.speed = min(actor.wanted, actor.speed + actor.wanted / RAMP_SECONDS * dt)
                actor.place.x += actor.velocity[0] * dt
                actor.place.y += actor.velocity[1] * dt
        gone = [a.number for a in self.actors.values() if a.died and self.seconds > a.died + LIFE_AFTER_DEATH]
        for number in gone:
            self.destroy(number)
        return self._collide(before)

    def _touch(self, one: Actor, other: Actor) -> bool:
        if one.kind is None or other.kind is None or one is other:
            return False
        return contact(Body(one.place.pose, one.kind, STILL), Body(other.place.pose, other.kind, STILL)) is not None

    def _collide(self, before: dict[int, Pose]) -> list[Collision]:
        bodies = [actor for actor in self.actors.values() if actor.kind and not (actor.is_invincible or actor.died)]
        events: list[Collision] = []
        for i, one in enumerate(bodies):
            for other in bodies[i + 1 :]:
                if self._touch(one, other) and (one.is_vehicle or other.is_vehicle):
                    events += self._impact(one, other, before)
        return events

    def _impact(self, one: Actor, other: Actor, before: dict[int, Pose]) -> list[Collision]:
        """Both get the impulse; who moved onto the other goes back and stands."""
        assert one.kind
        assert other.kind
        va, vb = one.velocity, other.velocity
        dx, dy = va[0] - vb[0], va[1] - vb[1]
        size = impulse(one.kind, other.kind, math.hypot(dx, dy))
        norm = math.hypot(dx, dy) or 1.0
        push = (-size * dx / norm, -size * dy / norm, 0.0)
        for actor in (one, other):
            if actor.is_vehicle:
                actor.speed = 0.0
                actor.place.move(before[actor.number])
            if actor.is_walker:
                actor.died, actor.wanted = self.seconds, 0.0
        back = (-push[0], -push[1], 0.0)
        return [Collision(one.number, other.number, push), Collision(other.number, one.number, back)]
