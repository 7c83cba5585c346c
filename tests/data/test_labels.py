"""The label queue with a labeller whose answers can be foretold."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from covr_lightning.counters import Counters
from covr_lightning.data import ExplorationPolicy, FrameStackStorage, LabelQueue


class Echo:
    """Answers each frame with its first pixel; frames that start with an odd pixel cannot be answered."""

    def __init__(self) -> None:
        self.round = 3
        self.calls: list[int] = []

    def propose(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append(len(frames))
        first = frames[:, 0, 0, 0].float()
        return first[:, None] / 256, first % 2 == 0


def fill(storage: FrameStackStorage, n: int, queue: LabelQueue | None = None) -> None:
    for t in range(n):
        # Observation t is frame t; episodes never end.
        before = torch.full((9, 2, 2), t % 256, dtype=torch.uint8)
        after = torch.full((9, 2, 2), (t + 1) % 256, dtype=torch.uint8)
        row = {"pixels": before, "a_v": torch.zeros(1), "a_v_valid": torch.zeros(1, dtype=torch.bool),
               "vlm_round": torch.full((1,), -1), "next": {"pixels": after, "done": torch.tensor([False])}}  # fmt: skip
        storage.set(t % storage.max_size, TensorDict(row))
        if queue is not None:
            queue.offer(t, t)


def test_every_tenth_row_is_labelled_in_batches_and_the_rest_is_masked() -> None:
    storage, echo = FrameStackStorage(100), Echo()
    queue = LabelQueue(storage, echo, every_agent_steps=5, batch_size=4)
    fill(storage, 50, queue)
    assert echo.calls == [4, 4]  # rows 0, 5, …, 45: ten, of which two still wait
    queue.flush()
    assert echo.calls == [4, 4, 2]
    rows = storage.get(range(50))
    for t in range(50):
        labelled = t % 5 == 0
        assert bool(rows["a_v_valid"][t]) == (labelled and t % 2 == 0)
        assert int(rows["vlm_round"][t]) == (3 if labelled else -1)
        assert float(rows["a_v"][t]) == (t / 256 if labelled else 0.0)
    assert (queue.asked, queue.unparsable) == (10, 5)


def test_labels_do_not_depend_on_the_batch() -> None:
    labelled = []
    for batch_size in (1, 3, 7):
        storage = FrameStackStorage(100)
        queue = LabelQueue(storage, Echo(), every_agent_steps=3, batch_size=batch_size)
        fill(storage, 60, queue)
        queue.flush()
        labelled.append(storage.get(range(60)))
    for other in labelled[1:]:
        for key in ("a_v", "a_v_valid", "vlm_round"):
            assert torch.equal(labelled[0][key], other[key])


def test_rows_that_were_overwritten_while_they_waited_are_skipped() -> None:
    storage, echo = FrameStackStorage(8), Echo()
    queue = LabelQueue(storage, echo, every_agent_steps=2, batch_size=50)
    fill(storage, 20, queue)
    queue.flush()
    assert queue.asked == 4  # of rows 0, 2, …, 18 only 12, 14, 16, 18 are left
    restored = LabelQueue(storage, echo)
    restored.load_state_dict(queue.state_dict())
    assert (restored.asked, restored.unparsable) == (4, 0)


class Constant:
    def act(self, pixels, deterministic=False, generator=None):
        return torch.full((len(pixels), 2), 0.25)


def test_exploration_is_random_first_and_the_actor_afterwards() -> None:
    counters = Counters()
    policy = ExplorationPolicy(Constant(), 2, counters, warmup_agent_steps=3, seed=1)
    actions = []
    for _ in range(5):
        td = policy(TensorDict({"pixels": torch.zeros(9, 2, 2, dtype=torch.uint8)}))
        actions.append(td["action"])
        counters.agent_steps += 1
    assert all(a.abs().max() <= 1 and not torch.equal(a, actions[3]) for a in actions[:3])
    assert [a.tolist() for a in actions[3:]] == [[0.25, 0.25]] * 2


def test_the_vlm_can_drive_the_warm_up_and_holds_its_answer() -> None:
    class Two(Echo):
        def propose(self, frames):
            actions, valid = super().propose(frames)
            return actions.expand(-1, 2), valid

    counters, driver = Counters(), Two()
    policy = ExplorationPolicy(
        Constant(), 2, counters, warmup_agent_steps=6, warmup_actions="vlm", labeller=driver, hold_agent_steps=3
    )
    driven = []
    for t in range(6):
        pixels = torch.full((9, 2, 2), 10 + t, dtype=torch.uint8)
        driven.append(policy(TensorDict({"pixels": pixels}))["action"])
        counters.agent_steps += 1
    assert torch.equal(driven[0], torch.full((2,), 10 / 256))
    assert torch.equal(driven[2], driven[0])  # held for three steps
    assert not torch.equal(driven[3], torch.full((2,), 13 / 256))  # 13 is odd, unparsable: uniform instead
    assert driver.calls == [1, 1]
