"""What is done while experience is collected."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from tensordict import TensorDict

from covr_lightning.counters import Counters
from covr_lightning.data import ExperienceData
from covr_lightning.data.exploration import ExplorationPolicy
from covr_lightning.envs import PointReach
from tests.agent.small_agents import agent


class Asked:
    """An agent that notes how it is asked."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def act(self, pixels: torch.Tensor, deterministic: bool = False, **rest: Any) -> torch.Tensor:
        self.calls.append({"pixels": pixels, "deterministic": deterministic, **rest})
        return torch.full((len(pixels), 2), 0.5)


def seen(value: int, envs: int) -> TensorDict:
    pixels = torch.full((envs, 9, 2, 2), value, dtype=torch.uint8)
    return TensorDict({"pixels": pixels, "previous_action": torch.full((envs, 2), value / 100)}, [envs])


def test_the_warm_up_is_uniform_over_all_actions_and_ends_by_the_clock() -> None:
    agent, counters = Asked(), Counters()
    policy = ExplorationPolicy(agent, 2, counters, warmup_agent_steps=10, seed=3)
    counters.agent_steps = 9
    chosen = policy(seen(1, 4000))
    actions = chosen["action"]
    assert chosen["warmup"].tolist() == [True] * 4000
    assert not agent.calls
    assert actions.shape == (4000, 2)
    low, middle, high = torch.quantile(actions, torch.tensor([0.05, 0.5, 0.95]), dim=0)
    torch.testing.assert_close(low, torch.full((2,), -0.9), atol=0.03, rtol=0)
    torch.testing.assert_close(middle, torch.zeros(2), atol=0.06, rtol=0)
    torch.testing.assert_close(high, torch.full((2,), 0.9), atol=0.03, rtol=0)
    assert not torch.equal(actions, policy(seen(1, 4000))["action"])
    counters.agent_steps = 10
    chosen = policy(seen(1, 3))
    assert torch.equal(chosen["action"], torch.full((3, 2), 0.5))
    assert chosen["warmup"].tolist() == [False] * 3


def test_noise_that_has_not_begun_is_saved_by_its_seed() -> None:
    """As of a run that was dealt out anew in its warm-up, and stopped in it again."""
    through, resumed = (ExplorationPolicy(Asked(), 2, Counters(), warmup_agent_steps=0, seed=3) for _ in range(2))
    through.reseed(5)
    resumed.set_noise_state(through.noise_state())
    cpu = torch.device("cpu")
    drawn = [torch.rand(4, generator=policy._noise_on(cpu)) for policy in (through, resumed)]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], torch.rand(4, generator=torch.Generator().manual_seed(3)))


def test_afterwards_the_agent_samples_and_is_told_its_last_action() -> None:
    agent = Asked()
    policy = ExplorationPolicy(agent, 2, Counters(), warmup_agent_steps=0, seed=3)
    for value in (7, 8):
        policy(seen(value, 1))
    generators = []
    for value, call in zip((7, 8), agent.calls, strict=True):
        assert call["pixels"].unique().tolist() == [value]
        assert not call["deterministic"]
        assert call["previous_action"].unique().tolist() == [torch.tensor(value / 100).item()]
        generators.append(call["generator"])
    assert generators[0] is generators[1]  # it goes on drawing, from a seed of its own
    assert generators[0].initial_seed() == 3


def test_the_policy_is_told_of_episodes_that_end_or_are_cut() -> None:
    ended: list[int] = []
    data = ExperienceData(PointReach(), num_envs=3)
    data.policy = SimpleNamespace(end_episode=ended.append)  # type: ignore[assignment]
    for env, transition in ((0, False), (1, True), (2, None)):
        row = None if transition is None else TensorDict({"next": {"done": torch.tensor([transition])}})
        data._tell_policy(env, row)
    assert ended == [1, 2]


def test_trying_the_policy_leaves_the_noise_as_it_was() -> None:
    policy = ExplorationPolicy(agent(), 2, Counters(agent_steps=10), warmup_agent_steps=0, envs=2)
    pixels = torch.randint(256, (2, 9, 20, 20), dtype=torch.uint8)
    once = TensorDict({"pixels": pixels, "previous_action": torch.zeros(2, 2)}, [2])
    first = policy(once.clone())["action"]
    with policy.only_tried():
        second = policy(once.clone())["action"]
    assert not torch.equal(first, second)
    assert torch.equal(policy(once.clone())["action"], second)
