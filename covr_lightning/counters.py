"""The one clock of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class Counters:
    """Everything that schedules count in.

    Schedules are in environment steps: simulator control steps, action repeat included, what papers call "frames".
    One agent step is `action_repeat` environment steps. One gradient step is one update of the critics.

    Attributes:
        env_steps: Environment steps taken.
        agent_steps: Actions taken.
        grad_steps: Critic updates done.
        episodes: Episodes finished in this process; a resumed run goes on with the first one's count.
        rounds: VLM fine-tune rounds finished (the paper's c).
    """

    env_steps: int = 0
    agent_steps: int = 0
    grad_steps: int = 0
    episodes: int = 0
    rounds: int = 0

    def state_dict(self) -> dict[str, int]:
        """The counts as plain integers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Set the counts, in place, so that everyone who holds this clock sees them."""
        for name in asdict(self):
            setattr(self, name, int(state[name]))
