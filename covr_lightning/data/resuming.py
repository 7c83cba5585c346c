"""What a checkpoint holds of a run's experience, and how the run goes on from one."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import lightning as L

from covr_lightning import processes
from covr_lightning.counters import Counters
from covr_lightning.data.collection import Collection
from covr_lightning.data.experience import Experience
from covr_lightning.data.exploration import ExplorationPolicy
from covr_lightning.envs.base import EnvFactory
from covr_lightning.errors import ConfigError
from covr_lightning.random_state import derived_seed, global_state, seed_of
from covr_lightning.saving.checkpoints import newest_good_checkpoint
from covr_lightning.saving.manifest import ReplayPartError, look_beside
from covr_lightning.vlm.answers import Answers
from covr_lightning.vlm.vlm import VLM

log = logging.getLogger(__name__)


class ResumingData(L.LightningDataModule, ABC):
    """Experience that goes on as if the run had not been stopped; its subclass is the data module of a run.

    Attributes:
        counters: The run's clock.
        experience: What this process has collected; made by ``setup("fit")``.
        step_is_open: Whether a round or an evaluation of the newest agent step is still to come (it was stopped in
            one). A resumed run then begins with an empty item, which brings them about.
        cut_envs: Environments whose running episode could not be continued from a checkpoint; None: not even asked,
            because processes or environments are others.
    """

    env_factory: EnvFactory
    vlm: VLM | None
    max_env_steps: int
    num_envs: int
    collection: Collection
    policy: ExplorationPolicy
    seed: int
    env_steps_completed: int

    @property
    @abstractmethod
    def lost_episodes(self) -> int:
        """Episodes, of training and evaluation, that were cut because a simulator died or hung."""

    def __init__(self) -> None:
        super().__init__()
        self.counters = Counters()
        self.experience: Experience | None = None
        self.step_is_open = False
        self.cut_envs: list[int] | None = []
        self._environments_open = False
        self._updates_owed = 0.0
        self._open_env_steps = 0  # environment steps of the item whose step is open
        self._lost_before = 0  # episodes that were lost before a resume
        self._restored: dict[str, Any] | None = None
        self._global_random_state: dict[str, Any] | None = None

    @property
    def env_numbers(self) -> range:
        """Numbers of this process's environments among all of the run."""
        first = processes.number() * self.num_envs
        return range(first, first + self.num_envs)

    @property
    def _experience(self) -> Experience:
        assert self.experience is not None, "setup('fit') makes it"
        return self.experience

    def _open_environments(self, seed: int) -> None:
        """Build the environments, once; after `setup`, since a checkpoint may ask for other seeds."""
        if not self._environments_open:
            self._environments_open = True
            self.collection.open(self.env_factory, self.policy, self.env_numbers, seed)

    @property
    def _trainer(self) -> L.Trainer:
        assert self.trainer is not None, "a Trainer runs this"
        return self.trainer

    def state_dict(self) -> dict[str, Any]:
        """The clock; for each process its episodes, random states and waiting labels, and its replay's manifest.

        A process's new part of the replay is written first. With several, all processes have to call this, and the
        first one gets it.
        """
        state: dict[str, Any] = {"counters": self.counters.state_dict()}
        if self.experience is None:
            return state
        with processes.failing_together():
            mine = self.experience.save() | {
                "exploration": self.policy.noise_state(),
                "episodes": self.collection.state(),
                "global_random_state": global_state(),
                "lost_episodes": self.lost_episodes,
            }
        everyone = processes.gather_on_first(mine)
        if everyone is not None:
            state["replays"] = [one.pop("replay") for one in everyone]
            state["processes"] = everyone
        state |= {
            "step_is_open": self.step_is_open,
            "open_env_steps": self.env_steps_completed,
            "updates_owed": self._updates_owed,
            "vlm_round": self.vlm.round if self.vlm is not None else 0,
        }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the clock at once, the replay when it exists."""
        self.counters.load_state_dict(state["counters"])
        if self.experience is not None:
            self._restore(state)
        else:
            self._restored = state

    def _continues(self, state: dict[str, Any]) -> bool:
        """Whether a checkpoint is of as many processes and environments, or has none to continue."""
        if "processes" not in state:
            return True
        return len(state["processes"]) == processes.count() and len(state["processes"][0]["steps"]) == self.num_envs

    def _restore(self, state: dict[str, Any]) -> None:
        self._restored = None
        if "processes" not in state:
            return
        self._check_length()
        look_beside(Path(self._trainer.ckpt_path or ""), state["replays"])
        self.step_is_open, self._updates_owed = state["step_is_open"], state["updates_owed"]
        # Neither is in checkpoints of before 28 November 2026.
        self._open_env_steps = state.get("open_env_steps", 0)
        lost, number = [process.get("lost_episodes", 0) for process in state["processes"]], processes.number()
        continues = self._continues(state)
        seed = self.seed
        known = all(_is_known(episode) for one in state["processes"] for episode in one["episodes"])
        if not (continues and known and self.collection.resumes_exactly):  # no episode and no noise is to come again
            seed = derived_seed(self.seed, self.counters.agent_steps)
        self._open_environments(seed)
        try:
            if continues:
                self._lost_before = lost[number]
                self._take_back(state["replays"][number], state["processes"][number])
            else:
                if not number:
                    self._lost_before = sum(lost)
                    self._take_counts(state["processes"])
                self._deal_out(state["replays"], seed_of(seed, number))
        except ReplayPartError as error:
            other = newest_good_checkpoint(Path(self._trainer.ckpt_path or ""))
            raise ConfigError(f"{error}; {other}.") from error

    def _check_length(self) -> None:
        """Refuse a length that the run is past by more than the item in which it was reached.

        Raises:
            ConfigError: It is.
        """
        item = self.collection.agent_steps_of_an_item(self.num_envs) * processes.count()
        if self.counters.env_steps - item * self.env_factory.spec.action_repeat >= self.max_env_steps:
            raise ConfigError(
                f"data.max_env_steps is {self.max_env_steps}, but the checkpoint's run has {self.counters.env_steps} "
                "already; to go on, it must be above that."
            )

    def _take_back(self, manifest: dict[str, Any], mine: dict[str, Any]) -> None:
        """Become what this process was."""
        self._experience.take_back(manifest, mine)
        self.policy.set_noise_state(mine["exploration"])
        self._global_random_state = mine["global_random_state"]
        known = all(map(_is_known, mine["episodes"]))
        continued = self.collection.restore(mine["episodes"]) if known else [False] * self.num_envs
        self.cut_envs = [env for env, goes_on in zip(self.env_numbers, continued, strict=True) if not goes_on]
        for env in self.cut_envs:
            self._experience.cut(env)
            self.policy.end_episode(env - self.env_numbers.start)
        if self.cut_envs:
            if known:
                who = type(self.env_factory if self.collection.resumes_exactly else self.collection).__name__
            else:
                who = "A checkpoint of asynchronous workers"
            log.warning("%s cannot continue the episodes it was stopped in: %d cut.", who, len(self.cut_envs))

    def _take_counts(self, everyone: list[dict[str, Any]]) -> None:
        """Go on counting the VLM's answers from what all processes before have counted."""
        warmup = [one["exploration"]["answers"] for one in everyone if "answers" in one["exploration"]]
        if warmup:
            self.policy.answers = Answers(*sum(warmup).tolist())
        labels = self._experience.labels
        for one in everyone:
            if labels is not None and one["labels"] is not None:
                labels.add_counts(one["labels"])

    def _deal_out(self, manifests: list[dict[str, Any]], own_seed: int) -> None:
        """Take this process's share of what other numbers of processes and environments have collected."""
        self._experience.take_share(manifests)
        self._experience.reseed(own_seed)
        self.policy.reseed(own_seed)
        self.cut_envs = None
        if processes.number() == 0:
            log.warning(
                "The checkpoint is of %d processes, and this run has other processes or environments (%d processes of "
                "%d environments): the replay is dealt out anew, open episodes are cut, and the run goes on, not as it "
                "would have.", len(manifests), processes.count(), self.num_envs,
            )  # fmt: skip


def _is_known(episode: dict[str, Any]) -> bool:
    """Whether a checkpoint has a running episode; workers that collect asynchronously are not asked for theirs."""
    return "drawn_from" in episode
