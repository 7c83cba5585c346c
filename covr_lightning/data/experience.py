"""What one process has collected: its share of D, its running episodes, and how both go on after a resume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import TensorDictReplayBuffer

from covr_lightning import processes
from covr_lightning.agent.finite import FiniteGuard
from covr_lightning.agent.priors import Prior
from covr_lightning.counters import Counters
from covr_lightning.data.frame_storage import FrameStackStorage
from covr_lightning.data.labels import LabelQueue
from covr_lightning.data.replay_parts import ReplayParts
from covr_lightning.data.resharding import deal_out
from covr_lightning.data.samplers import RunSampler
from covr_lightning.data.sequences import SequenceSampler
from covr_lightning.errors import ConfigError
from covr_lightning.step_times import StepTimes

#: Told of each transition: the number of its environment, and the transition; None where the episode is cut.
Listener = Callable[[int, TensorDictBase | None], None]


class Experience:
    """Takes in what the environments of this process give, and is saved and restored as a whole.

    Args:
        replay: D, or this process's share of it.
        sequences: What draws windows of D for objectives; None if none needs them.
        labels: The VLM's questions about D's rows; None without a VLM.
        parts: Where D is saved.
        env_numbers: Numbers of this process's environments among all of the run.
        counters: The run's clock; episodes are counted here, steps by the caller.
        prior: Says whether answers of the VLM are wanted.
        finite: What becomes of a reward that is not finite.
        listeners: Called with every transition, in order.
        training_returns: Where the returns of finished episodes are appended, for whoever logs and clears them.
        times: Where the time goes.

    Attributes:
        last_training_return: Return of the newest finished episode.
    """

    def __init__(
        self,
        replay: TensorDictReplayBuffer,
        sequences: SequenceSampler | None,
        labels: LabelQueue | None,
        parts: ReplayParts,
        env_numbers: range,
        counters: Counters,
        prior: Prior,
        finite: FiniteGuard,
        listeners: list[Listener],
        training_returns: list[float],
        times: StepTimes,
    ) -> None:
        self.replay = replay
        self.sequences = sequences
        self.labels = labels
        self.last_training_return: float | None = None
        self._parts = parts
        self._env_numbers = env_numbers
        self._counters = counters
        self._prior = prior
        self._finite = finite
        self._listeners = listeners
        self._training_returns = training_returns
        self._times = times
        self._returns = [0.0] * len(env_numbers)  # so far, of each environment's running episode
        self._steps = [0] * len(env_numbers)  # agent steps of each environment

    @property
    def storage(self) -> FrameStackStorage:
        """The replay's storage."""
        return self.replay.storage

    def prepare(self, collected: TensorDictBase) -> tuple[TensorDictBase, list[bool]]:
        """Collected transitions (M,) as rows of D, without answers yet, and which of them can be learnt from.

        Those who listen are also told ``warmup`` of each, whether the warm-up chose its action.

        Not those whose simulator was lost in them, nor those whose reward is not finite.
        """
        n, action_dim = len(collected), collected["action"].shape[-1]
        lost = collected.pop(("next", "lost")).flatten().tolist()
        rows = collected.set("a_v", torch.zeros(n, action_dim))
        rows["a_v_valid"] = torch.zeros(n, 1, dtype=torch.bool)
        rows["vlm_round"] = torch.full((n, 1), -1)
        rewards = zip(rows["next", "reward"], lost, strict=True)
        return rows, [not gone and self._finite.allows("reward", self._counters, r) for r, gone in rewards]

    def add(self, rows: TensorDictBase, usable: list[bool]) -> None:
        """Write rows (M,) into D; one that cannot be learnt from is left out, and ends the episode before it."""
        begin = 0
        for row in (i for i, is_usable in enumerate(usable) if not is_usable):
            self._write(rows[begin:row])
            self._leave_out(int(rows["env"][row]), bool(rows["next", "done"][row]))
            begin = row + 1
        self._write(rows[begin:])

    def _write(self, rows: TensorDictBase) -> None:
        if not len(rows):
            return
        first = self.storage.last_row_id + 1
        self.replay.extend(rows.exclude("warmup"))
        wants_labels = self.labels is not None and self._prior.uses_vlm and self._prior.wants_labels(self._counters)
        for row_id, transition in enumerate(rows.unbind(0), first):
            env = int(transition["env"])
            own = env - self._env_numbers.start
            if wants_labels and self.labels is not None:
                with self._times("label"):
                    self.labels.offer(row_id, self._steps[own], env)
            else:
                self._end_label_episode(env)  # an answer from before is held no longer when asking begins again
            self._steps[own] += 1
            for listener in self._listeners:
                listener(env, transition)
            self._returns[own] += float(transition["next", "reward"])
            if bool(transition["next", "done"]):
                self._end_episode(own)

    def _end_episode(self, own: int) -> None:
        self._counters.episodes += 1
        self._training_returns.append(self._returns[own])
        self.last_training_return, self._returns[own] = self._returns[own], 0.0
        self._end_label_episode(own + self._env_numbers.start)

    def _end_label_episode(self, env: int) -> None:
        if self.labels is not None:
            self.labels.end_episode(env)

    def _leave_out(self, env: int, done: bool) -> None:
        own = env - self._env_numbers.start
        self._steps[own] += 1
        self.storage.cut_episode(env)
        for listener in self._listeners:
            listener(env, None)
        if done:
            self._end_episode(own)
        else:
            self._end_label_episode(env)

    def sample(self, progress: float) -> TensorDictBase:
        """Draw an update's batch.

        Args:
            progress: Share of the run's environment steps that have been taken, in [0, 1].
        """
        if isinstance(self.replay.sampler, RunSampler):
            self.replay.sampler.progress = progress
        batch = self.replay.sample()
        return batch if self.sequences is None else self.sequences.add_to(batch)

    # -- state ---------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Write the new part of D, and give its manifest (``replay``) and all else that is needed to go on."""
        return {
            "replay": self._parts.save(self.storage),
            "sampler": self.replay.sampler.state_dict(),
            "sampler_class": type(self.replay.sampler).__name__,
            "sampler_rng": self.replay._rng.get_state(),
            "sequences": self.sequences.state_dict() if self.sequences is not None else None,
            "returns": self._returns,
            "steps": self._steps,
            "last_training_return": self.last_training_return,
            "training_returns": [*self._training_returns],
            "labels": self.labels.state_dict() if self.labels is not None else None,
        }

    def take_back(self, manifest: dict[str, Any], saved: dict[str, Any]) -> None:
        """Become what was saved.

        Args:
            manifest: What :meth:`save` gave as ``replay``.
            saved: The rest of it.

        Raises:
            ReplayPartError: A part is missing or damaged.
            ConfigError: It is of another sampler.
        """
        here = type(self.replay.sampler).__name__
        there = saved.get("sampler_class", here)
        if there != here:
            raise ConfigError(
                f"data.sampler is {here}, but the checkpoint given as --ckpt_path is of a run with {there}; set it as "
                "the config.yaml in the run's folder has it."
            )
        self._parts.restore(self.storage, manifest)
        self._continue_writing()
        self.replay.sampler.load_state_dict(saved["sampler"])
        self.replay._rng.set_state(saved["sampler_rng"])
        if self.sequences is not None and saved["sequences"] is not None:
            self.sequences.load_state_dict(saved["sequences"])
        self.last_training_return = saved["last_training_return"]
        self._training_returns[:] = saved.get("training_returns", [])
        self._returns, self._steps = list(saved["returns"]), list(saved["steps"])
        if self.labels is not None and saved["labels"] is not None:
            self.labels.load_state_dict(saved["labels"])

    def cut(self, env: int) -> None:
        """End an environment's running episode, which could not be continued: it is truncated."""
        self.storage.cut_episode(env)
        self._end_label_episode(env)
        self._returns[env - self._env_numbers.start] = 0.0

    def take_share(self, manifests: list[dict[str, Any]]) -> None:
        """Take this process's share of what other numbers of processes and environments have collected.

        Args:
            manifests: Of each of the processes before.

        Raises:
            ReplayPartError: A part is missing or damaged.
        """
        deal_out(self._parts, manifests, self.storage, processes.number(), processes.count())
        self._continue_writing()
        self.replay.sampler.extend(torch.arange(len(self.storage)))  # its own state is of other rows

    def reseed(self, seed: int) -> None:
        """Draw with other random numbers from here on."""
        self.replay._rng.manual_seed(seed)
        if self.sequences is not None:
            self.sequences.reseed(seed)

    def _continue_writing(self) -> None:
        written, capacity = self.storage.last_row_id + 1, self.storage.max_size
        self.replay._writer.load_state_dict({"_cursor": written % capacity, "_write_count": written})
