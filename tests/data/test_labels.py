"""The label queue with a labeller whose answers can be foretold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer

from covr_lightning.agent import ConstantPrior, DelayedPrior, Prior
from covr_lightning.agent.finite import FiniteGuard
from covr_lightning.counters import Counters
from covr_lightning.data import ExplorationPolicy, FrameStackStorage, LabelQueue
from covr_lightning.data.experience import Experience
from covr_lightning.data.replay_parts import ReplayParts
from covr_lightning.errors import ConfigError
from covr_lightning.step_times import StepTimes
from covr_lightning.vlm.answers import Answers
from covr_lightning.vlm.vlm import Proposals


class Echo:
    """Answers each frame with its first pixel; odd ones unintelligibly, those in `mute` not at all."""

    def __init__(self) -> None:
        self.round, self.frames = 3, 1
        self.calls: list[int] = []
        self.add = 0.0
        self.mute: set[int] = set()

    def ask(self, frames: torch.Tensor) -> Proposals:
        actions, valid = self.propose(frames)
        answered = torch.tensor([int(frame[0, 0, 0]) not in self.mute for frame in frames])
        return Proposals(actions, valid & answered, answered)

    def propose(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append(len(frames))
        first = frames[:, 0, 0, 0].float()
        return first[:, None] / 256 + self.add, first % 2 == 0


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
    assert queue.answers == Answers(asked=10, unparsable=5)


def test_a_labeller_may_be_shown_several_frames_side_by_side() -> None:
    storage, echo, shown = FrameStackStorage(100), Echo(), []
    echo.frames = 2
    queue = LabelQueue(storage, echo, every_agent_steps=2)
    fill(storage, 5, queue)
    answer = echo.propose
    echo.propose = lambda frames: shown.append(frames) or answer(frames)  # type: ignore[method-assign]
    queue.flush()
    (pictures,) = shown
    # Observation t ends in frame t; the first one's stack is frame 0 thrice. Frames are 2 pixels wide.
    assert pictures[:, 0, 0].tolist() == [[0, 0, 0, 0], [1, 1, 2, 2], [3, 3, 4, 4]]
    assert pictures.shape == (3, 3, 2, 4)


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
    assert queue.answers.asked == 4  # of rows 0, 2, …, 18 only 12, 14, 16, 18 are left
    late = LabelQueue(storage, echo, every_agent_steps=1, batch_size=50)
    late.offer(0, 0)
    late.flush()  # nothing is left to ask about
    assert (late.answers.asked, echo.calls[-1]) == (0, 4)
    restored = LabelQueue(storage, echo)
    restored.load_state_dict(queue.state_dict())
    assert restored.answers == Answers(asked=4)


def test_rows_whose_asked_row_is_overwritten_hold_nothing() -> None:
    storage, echo = FrameStackStorage(4), Echo()
    queue = LabelQueue(storage, echo, every_agent_steps=4, batch_size=2, hold=True)
    fill(storage, 5)  # row 4 lies where row 0 was
    for row in range(5):
        queue.offer(row, row)
    assert echo.calls == [1]
    # By running number: 4, 1, 2, 3. Row 4 was asked itself; the others wait for row 0, which is gone.
    assert storage.column("a_v_valid").flatten().tolist() == [True, False, False, False]
    assert storage.column("vlm_round").flatten().tolist() == [3, -1, -1, -1]


def test_rows_in_between_hold_the_last_answer_of_their_episode() -> None:
    storage, echo = FrameStackStorage(100), Echo()
    queue = LabelQueue(storage, echo, every_agent_steps=4, batch_size=2, hold=True)
    fill(storage, 10)  # two environments in turns: even rows are 0's, odd rows 1's
    for row in range(10):
        queue.offer(row, row // 2, row % 2)
        if row == 5:
            queue.end_episode(1)
        if row == 6:  # the answers to rows 0 and 1 are there, rows 2 to 6 hold them from the next flush on
            restored = LabelQueue(storage, echo, every_agent_steps=4, batch_size=2, hold=True)
            restored.load_state_dict(queue.state_dict())
            queue = restored
    queue.flush()
    rows = storage.get(range(10))
    # Asked: step 0 (rows 0, 1) and step 4 (rows 8, 9). Row 7 begins an episode, which has not been asked yet.
    source = [0, 1, 0, 1, 0, 1, 0, None, 8, 9]
    for row, of in enumerate(source):
        assert float(rows["a_v"][row]) == (0.0 if of is None else of / 256)
        assert bool(rows["a_v_valid"][row]) == (of is not None and of % 2 == 0)
        assert int(rows["vlm_round"][row]) == (-1 if of is None else 3)
    assert queue.answers.asked == 4
    with pytest.raises(ConfigError, match=r"data\.hold_answers"):
        LabelQueue(storage, echo, stale="relabel", hold=True)


def experience_of(labels: LabelQueue, counters: Counters, prior: Prior) -> Experience:
    """Of one environment."""
    replay = TensorDictReplayBuffer(storage=labels.storage, batch_size=1)
    return Experience(
        replay, None, labels, ReplayParts(Path("never written")), range(1), counters, prior, FiniteGuard(), [], [],
        StepTimes(),
    )  # fmt: skip


def collect(experience: Experience, t: int, done: bool = False, lost: bool = False) -> None:
    """Its step t, whose newest frame is 2·t."""
    pixels = torch.full((1, 9, 2, 2), 2 * t, dtype=torch.uint8)
    over = {"reward": torch.zeros(1, 1), "done": torch.tensor([[done or lost]]), "lost": torch.tensor([[lost]])}
    row = {"pixels": pixels, "action": torch.zeros(1, 1), "env": torch.zeros(1, dtype=torch.long)}
    experience.add(*experience.prepare(TensorDict(row | {"next": over | {"pixels": pixels + 2}}, [1])))


def test_an_answer_is_held_to_the_end_of_its_episode() -> None:
    storage = FrameStackStorage(100)
    labels = LabelQueue(storage, Echo(), every_agent_steps=10, batch_size=1, hold=True)
    experience = experience_of(labels, Counters(), ConstantPrior())
    for t in range(6):
        collect(experience, t, done=t == 2)
    labels.flush()
    assert storage.get(range(6))["a_v_valid"].flatten().tolist() == [True] * 3 + [False] * 3


def test_an_answer_is_held_no_longer_when_asking_begins_again() -> None:
    storage, counters = FrameStackStorage(100), Counters()
    labels = LabelQueue(storage, Echo(), every_agent_steps=4, batch_size=1, hold=True)
    experience = experience_of(labels, counters, DelayedPrior(after_rounds=1))
    for t in range(12):
        counters.rounds = int(t < 2 or t >= 6)  # as a prior that stops guiding and begins again
        collect(experience, t)
    labels.flush()
    # Steps 0, 4 and 8 are those to ask at; 4 is not asked, so 6 and 7 have nothing to hold.
    rows = storage.get(range(12))
    answers = zip(rows["a_v"].flatten(), rows["a_v_valid"].flatten(), strict=True)
    held = [round(float(a_v) * 128) if valid else None for a_v, valid in answers]
    assert held == [0, 0, None, None, None, None, None, None, 8, 8, 8, 8]


def test_a_lost_step_counts_among_those_between_two_answers() -> None:
    labels = LabelQueue(storage := FrameStackStorage(100), Echo(), every_agent_steps=4)
    experience = experience_of(labels, Counters(), ConstantPrior())
    for t in range(9):
        collect(experience, t, lost=t == 2)
    labels.flush()
    asked = storage.column("vlm_round").flatten() >= 0
    # Steps 0, 4 and 8; of the lost one there is no row.
    assert asked.nonzero().flatten().tolist() == [0, 3, 7]


class Constant:
    def act(self, pixels, deterministic=False, generator=None, previous_action=None):
        return torch.full((len(pixels), 2), 0.25)


def test_exploration_is_random_first_and_the_actor_afterwards() -> None:
    counters = Counters()
    policy = ExplorationPolicy(Constant(), 2, counters, warmup_agent_steps=3, seed=1)
    actions = []
    for _ in range(5):
        td = policy(TensorDict({"pixels": torch.zeros(2, 9, 2, 2, dtype=torch.uint8)}, [2]))
        actions.append(td["action"])
        counters.agent_steps += 1
    assert all(a.abs().max() <= 1 and not torch.equal(a, actions[3]) for a in actions[:3])
    assert not torch.equal(actions[0][0], actions[0][1])
    assert [a.tolist() for a in actions[3:]] == [[[0.25, 0.25]] * 2] * 2


def test_the_vlm_can_drive_the_warm_up_and_holds_its_answer() -> None:
    class Two(Echo):
        def propose(self, frames):
            actions, valid = super().propose(frames)
            return actions.expand(-1, 2), valid

    counters, driver = Counters(), Two()
    policy = ExplorationPolicy(
        Constant(), 2, counters, warmup_agent_steps=14, warmup_actions="vlm", labeller=driver, hold_agent_steps=3,
        envs=2,
    )  # fmt: skip
    driven = []
    for t in range(6):
        pixels = torch.full((2, 9, 2, 2), 10 + t, dtype=torch.uint8)
        pixels[1] += 10
        driven.append(policy(TensorDict({"pixels": pixels}, [2]))["action"])
        counters.agent_steps += 2
    assert torch.equal(driven[0], torch.tensor([[10 / 256] * 2, [20 / 256] * 2]))
    assert torch.equal(driven[2], driven[0])  # held for three steps of each
    assert not torch.equal(driven[3][0], torch.full((2,), 13 / 256))  # 13 is odd, unparsable: uniform instead
    assert driver.calls == [2, 2]
    # 10, 20, 13 and 23, of which the odd ones cannot be parsed.
    assert policy.answers == Answers(asked=4, unparsable=2)
    driver.mute, driver.calls = {16}, []
    before = policy.noise_state()
    policy(TensorDict({"pixels": torch.full((2, 9, 2, 2), 16, dtype=torch.uint8)}, [2]))
    assert driver.calls == [2]
    assert policy.answers == Answers(asked=6, unparsable=2, unanswered=2)
    policy.set_noise_state(before)
    assert policy.answers == Answers(asked=4, unparsable=2)
    policy.set_noise_state({name: value for name, value in before.items() if name != "answers"})  # an older run's
    assert policy.answers == Answers()


def test_a_new_episode_of_the_warm_up_is_not_driven_by_an_answer_to_the_one_before() -> None:
    counters, driver = Counters(), Echo()
    policy = ExplorationPolicy(
        Constant(), 1, counters, warmup_agent_steps=12, warmup_actions="vlm", labeller=driver, hold_agent_steps=3,
        envs=2,
    )  # fmt: skip
    driven = []
    for t in range(4):
        pixels = torch.full((2, 9, 2, 2), 10 + 2 * t, dtype=torch.uint8)
        pixels[1] += 10
        driven.append(policy(TensorDict({"pixels": pixels}, [2]))["action"].flatten() * 256)
        counters.agent_steps += 2
        if t == 1:
            policy.end_episode(1)
            saved = policy.noise_state()
    # The second environment is asked again in its first step, alone; both at the third, as ever.
    assert [action.tolist() for action in driven] == [[10, 20], [10, 20], [10, 24], [16, 26]]
    assert driver.calls == [2, 1, 2]
    policy.set_noise_state(saved)
    counters.agent_steps = 4
    action = policy(TensorDict({"pixels": torch.full((2, 9, 2, 2), 14, dtype=torch.uint8)}, [2]))["action"]
    assert (action.flatten() * 256).tolist() == [10, 14]


def renewed(stale: str) -> tuple[FrameStackStorage, Echo, LabelQueue, int]:
    """Twelve rows, every third labelled in round 3; then the VLM of round 4 answers one half more."""
    storage, echo = FrameStackStorage(9), Echo()
    queue = LabelQueue(storage, echo, 3, batch_size=2, stale=stale, relabel_batch_size=2)
    fill(storage, 12, queue)  # rows 0 … 11, of which the replay still holds 3 … 11; labelled: 3, 6, 9
    echo.round, echo.calls = 4, []
    echo.add = 0.5
    return storage, echo, queue, queue.vlm_changed()


def test_stale_answers_are_kept_masked_or_given_anew() -> None:
    def columns(storage: FrameStackStorage) -> dict[int, tuple[float, bool, int]]:
        rows = storage.get(range(9))
        return {
            int(rows["row_id"][i]): (float(rows["a_v"][i]), bool(rows["a_v_valid"][i]), int(rows["vlm_round"][i]))
            for i in range(9)
        }

    unasked = dict.fromkeys((4, 5, 7, 8, 10, 11), (0.0, False, -1))
    old = {3: (3 / 256, False, 3), 6: (6 / 256, True, 3), 9: (9 / 256, False, 3)}  # odd frames cannot be answered

    storage, echo, _, n = renewed("keep")
    assert (n, echo.calls) == (0, [])
    assert columns(storage) == unasked | old

    storage, echo, queue, n = renewed("mask")
    assert (n, echo.calls) == (1, [])  # the other two are masked already
    assert queue.vlm_changed() == 0
    assert columns(storage) == unasked | old | {6: (6 / 256, False, 3)}

    storage, echo, queue, n = renewed("relabel")
    assert (n, echo.calls) == (3, [2, 1])
    assert columns(storage) == unasked | {i: (i / 256 + 0.5, i == 6, 4) for i in (3, 6, 9)}
    assert queue.answers.asked == 4 + 3


@pytest.mark.parametrize(("stale", "renewed"), [("mask", 1), ("relabel", 2)])
def test_answers_from_before_the_first_round_are_renewed_too(stale: str, renewed: int) -> None:
    storage, echo = FrameStackStorage(9), Echo()
    echo.round = 0
    queue = LabelQueue(storage, echo, 3, batch_size=2, stale=stale)  # type: ignore[arg-type]
    fill(storage, 6, queue)  # asked: rows 0 and 3, of which 3 cannot be parsed
    echo.round = 1
    assert queue.vlm_changed() == renewed
    assert storage.column("vlm_round").flatten().tolist() == ([0, -1, -1] if stale == "mask" else [1, -1, -1]) * 2


def test_rows_without_an_answer_are_masked_and_counted_apart() -> None:
    storage, echo = FrameStackStorage(20), Echo()
    echo.mute = {4, 5}
    queue = LabelQueue(storage, echo, every_agent_steps=1, batch_size=4, stale="relabel")
    fill(storage, 8, queue)
    rows = storage.get(range(8))
    assert rows["a_v_valid"].reshape(-1).tolist() == [True, False, True, False, False, False, True, False]
    assert rows["vlm_round"].reshape(-1).tolist() == [3, 3, 3, 3, -1, -1, 3, 3]
    assert queue.answers == Answers(asked=8, unanswered=2, unparsable=3)  # 1, 3 and 7 are unparsable, 5 is silent
    restored = LabelQueue(storage, echo)
    restored.load_state_dict(queue.state_dict())
    assert restored.answers == queue.answers
    old = {name: value for name, value in queue.state_dict().items() if name != "unanswered"}
    restored.load_state_dict(old)  # a checkpoint from before there were services
    assert restored.answers == Answers(asked=8, unparsable=3)

    # Relabelled while the service is away: nothing old passes for new, and the row comes up again next time.
    echo.round, echo.mute, echo.add = 4, {0, 4, 5}, 0.5
    assert queue.vlm_changed() == 6
    rows = storage.get(range(8))
    assert rows["a_v_valid"].reshape(-1).tolist() == [False, False, True, False, False, False, True, False]
    assert rows["vlm_round"].reshape(-1).tolist() == [3, 4, 4, 4, -1, -1, 4, 4]
    echo.round, echo.mute = 5, {4, 5}
    queue.vlm_changed()
    rows = storage.get(range(8))
    assert rows["vlm_round"].reshape(-1).tolist() == [5, 5, 5, 5, -1, -1, 5, 5]
    assert float(rows["a_v"][0]) == 0.5


def test_what_becomes_of_stale_answers_is_one_of_three() -> None:
    with pytest.raises(ConfigError, match=r"data.stale_priors is 'drop'; it can be 'keep', 'mask' or 'relabel'"):
        LabelQueue(FrameStackStorage(9), Echo(), stale="drop")
    assert LabelQueue(FrameStackStorage(9), Echo(), stale="relabel").vlm_changed() == 0  # nothing collected yet
