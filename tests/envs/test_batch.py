"""Several environments as one, in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.envs.utils import check_env_specs

from covr_lightning.envs import DMControl
from covr_lightning.envs.batch import EnvBatch
from tests.envs.puppet import EPISODE_STEPS, Puppet, PuppetEnv

KEYS = ("pixels", "action", ("next", "pixels"), ("next", "reward"))
KEYS += (("next", "done"), ("next", "terminated"), ("next", "truncated"))  # type: ignore[assignment]


def collect(env: EnvBase, frames: int, seed: int = 0) -> Iterator[TensorDictBase]:
    """Agent steps with random actions, as the data module collects them."""
    generator = torch.Generator().manual_seed(seed)
    shape = env.action_spec.shape
    policy = TensorDictModule(
        lambda pixels: torch.rand(shape, generator=generator) * 2 - 1, in_keys=["pixels"], out_keys=["action"]
    )
    state = generator.get_state()
    collector = Collector(
        env,
        policy,
        frames_per_batch=frames,
        total_frames=-1,
        trust_policy=True,
        track_traj_ids=False,
        auto_register_policy_transforms=False,
    )
    generator.set_state(state)  # it asks the policy once, to see what it gives
    for collected in collector:
        yield collected.reshape(-1).clone()


@pytest.mark.parametrize(
    ("factory", "steps"), [(DMControl(size=40, action_repeat=50, rendering="fast"), 50), (Puppet(), 14)]
)
def test_a_batch_of_one_collects_what_its_environment_alone_would(factory: DMControl | Puppet, steps: int) -> None:
    alone, batch = collect(factory.make(5), 1), collect(EnvBatch([factory.make(5)], first=2), 1)
    ends = 0
    for t in range(steps):
        mine, theirs = next(batch), next(alone)
        for key in KEYS:
            assert torch.equal(mine[key], theirs[key]), (t, key)
            assert mine[key].dtype == theirs[key].dtype
        assert mine["env"].tolist() == mine["next", "env"].tolist() == [2]
        ends += int(mine["next", "done"].sum())
    assert ends >= 2


def puppet(seed: int, ahead: int) -> PuppetEnv:
    """One that goes on from some steps into its first episode."""
    ahead_env, env = Puppet().make(seed), Puppet().make(seed)
    ahead_env.reset()
    for _ in range(ahead):
        ahead_env.step(TensorDict({"action": torch.zeros(1)}))
    assert env.restore_episode(ahead_env.episode_state())
    return env


def test_each_of_several_collects_its_own_transitions_through_its_own_resets() -> None:
    envs = [puppet(seed, ahead=seed) for seed in range(3)]  # so that each ends its episodes at steps of its own
    stream = collect(EnvBatch(envs, first=4), 3)
    rows = [next(stream) for _ in range(2 * EPISODE_STEPS + 2)]
    ends = torch.stack([row["next", "done"].flatten() for row in rows])
    assert ends.sum(0).tolist() == [2, 2, 3]
    assert ends.sum(1).max() == 1
    for i, env in enumerate(envs):
        alone = puppet(i, ahead=i)
        now = alone.reset()
        for row in rows:
            assert int(row["env"][i]) == int(row["next", "env"][i]) == 4 + i
            assert torch.equal(row["pixels"][i], now["pixels"])
            step, now = alone.step_and_maybe_reset(TensorDict({"action": row["action"][i]}))
            for key in KEYS[2:]:
                assert torch.equal(row[key][i], step[key]), key
        assert env.episode_metrics() == alone.episode_metrics()


def test_specs_are_kept() -> None:
    check_env_specs(EnvBatch([Puppet().make(seed) for seed in range(3)]))


def test_a_partial_reset_leaves_the_others_alone() -> None:
    batch = EnvBatch([Puppet().make(seed) for seed in range(3)])
    batch.reset()
    before = batch.step(TensorDict({"action": torch.zeros(3, 1)}, [3]))["next"]
    which = torch.tensor([[False], [True], [False]])
    after = batch.reset(TensorDict({"_reset": which, **before.exclude("reward")}, [3]))
    for i in (0, 2):
        assert torch.equal(after["pixels"][i], before["pixels"][i])
    assert not torch.equal(after["pixels"][1], before["pixels"][1])
    assert [metrics["steps"] for metrics in batch.episode_metrics()] == [1.0, 0.0, 1.0]
    # What an environment in the middle of its episode shows is given without being asked for, too.
    bare = batch._reset(TensorDict({"_reset": which}, [3]))
    assert torch.equal(bare["pixels"][[0, 2]], before["pixels"][[0, 2]])
    later = batch.step(TensorDict({"action": torch.zeros(3, 1)}, [3]))["next"]
    assert later["reward"].flatten().tolist() == [2.0, 1.0, 2.0]


def test_episodes_are_restored_each_to_its_environment() -> None:
    batch, other = (EnvBatch([Puppet().make(seed) for seed in seeds]) for seeds in ((1, 2), (3, 4)))
    batch.reset()
    for i in range(3):
        batch.step(TensorDict({"action": torch.full((2, 1), i / 10)}, [2]))
    states = batch.episode_states()
    assert other.restore_episodes(states) == [True, True]
    seen = other.reset()["pixels"]
    assert torch.equal(seen, torch.stack([state["pixels"] for state in states]))
    states[1]["actions"][0] += 0.1  # Puppet does not care
    states[1]["pixels"] = None
    third = EnvBatch([Puppet().make(seed) for seed in (5, 6)])
    assert third.restore_episodes(states) == [True, False]
    assert torch.equal(third.reset()["pixels"][0], seen[0])
    with pytest.raises(ValueError, match="episodes of 1 environments, but 2"):
        third.restore_episodes(states[:1])


def test_what_a_batch_cannot_be_of() -> None:
    with pytest.raises(ValueError, match="one environment or more, all of the same EnvSpec"):
        EnvBatch([])
    with pytest.raises(ValueError, match="one environment or more, all of the same EnvSpec"):
        EnvBatch([Puppet().make(0), DMControl(size=32).make(0)])


def test_lost_episodes_are_added_up_and_all_are_closed_even_if_one_fails() -> None:
    envs = [Puppet().make(seed) for seed in range(3)]
    envs[0].lost_episodes, envs[2].lost_episodes = 2, 1
    batch = EnvBatch(envs)
    assert batch.lost_episodes == 3
    closed = []

    def close(i: int) -> None:
        closed.append(i)
        if i == 1:
            raise RuntimeError("stuck")

    for i, env in enumerate(envs):
        env.close = lambda i=i, **kwargs: close(i)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="stuck"):
        batch.close()
    assert closed == [0, 1, 2]
