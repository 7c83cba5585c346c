"""What benchmarks.update times: an update in RAD's setting by this package, and by RAD's published code.

Nothing here imports PyTorch before it is called: a benchmark's first process has no need of it.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZE, CROP, STACK, FILTERS, HIDDEN, ACTIONS = 100, 84, 3, 32, 1024, 1
ROWS = 1000


def ours(
    batch: int,
    device: str = "cpu",
    torch_compile: str | None = None,
    replay_device: str = "cpu",
    cuda_graphs: bool = False,
) -> Any:
    """The agent, and a function that samples and makes one update."""
    import torch
    from tensordict import TensorDict
    from torchrl.data import RandomSampler, TensorDictReplayBuffer

    from covr_lightning.agent import RandomCrop, SACModule
    from covr_lightning.data.frame_storage import FrameStackStorage
    from covr_lightning.envs import EnvSpec

    torch.manual_seed(0)
    spec = EnvSpec("cartpole-swingup", SIZE, SIZE, STACK, ACTIONS, 8, 1000)
    agent = SACModule(
        spec, augmentation=RandomCrop(CROP), hidden=HIDDEN, torch_compile=torch_compile, cuda_graphs=cuda_graphs
    ).to(device)
    optimizers = agent.configure_optimizers()
    agent.optimizers = lambda *args, **kwargs: optimizers  # type: ignore[method-assign, assignment]
    agent.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign, misc]
    agent.compile_networks()
    replay = TensorDictReplayBuffer(
        storage=FrameStackStorage(ROWS, STACK, device=replay_device),
        sampler=RandomSampler(),
        batch_size=batch,
        generator=torch.Generator().manual_seed(0),
    )
    g = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (ROWS + STACK, 3, SIZE, SIZE), dtype=torch.uint8, generator=g)
    for first in range(0, ROWS, 250):  # an episode each
        stacks = torch.stack([frames[i : i + STACK].flatten(0, 1) for i in range(first, first + 251)])
        flag = torch.zeros(250, 1, dtype=torch.bool)
        done = flag.clone()
        done[-1] = True
        replay.extend(
            TensorDict(
                {
                    "pixels": stacks[:-1], "action": torch.rand(250, ACTIONS, generator=g) * 2 - 1,
                    "a_v": torch.zeros(250, ACTIONS), "a_v_valid": flag,
                    "next": {"pixels": stacks[1:], "reward": torch.rand(250, 1, generator=g), "done": done,
                             "terminated": flag, "truncated": done},
                },
                [250],
            )
        )  # fmt: skip

    def update() -> None:
        agent.training_step(replay.sample().to(device, non_blocking=True))  # as the data module moves it

    return agent, update


def rad(checkout: Path, batch: int, device_name: str = "cpu") -> Callable[[], None]:
    """RAD's sampling and update, as its ``train.py`` sets them up for cartpole with crops."""
    import numpy as np
    import torch

    # Imported there, used by its environments and by an augmentation that is not in use here.
    gym, skimage, util = types.ModuleType("gym"), types.ModuleType("skimage"), types.ModuleType("skimage.util")
    shape = types.ModuleType("skimage.util.shape")
    gym.Wrapper, shape.view_as_windows = object, None  # type: ignore[attr-defined]
    plots, pyplot = types.ModuleType("matplotlib"), types.ModuleType("matplotlib.pyplot")
    sys.modules |= {"gym": gym, "skimage": skimage, "skimage.util": util, "skimage.util.shape": shape}
    sys.modules |= {"matplotlib": plots, "matplotlib.pyplot": pyplot}
    sys.path.insert(0, str(checkout))
    import curl_sac
    import utils

    for stand_in in ("gym", "skimage", "skimage.util", "skimage.util.shape", "matplotlib", "matplotlib.pyplot"):
        del sys.modules[stand_in]  # others ask whether these are installed

    np.random.seed(0)  # noqa: NPY002 (what it draws from)
    torch.manual_seed(0)
    device = torch.device(device_name)
    nothing = lambda *args: None  # noqa: E731
    quiet = types.SimpleNamespace(log=nothing, log_histogram=nothing, log_param=nothing)
    agent = curl_sac.RadSacAgent(
        (3 * STACK, CROP, CROP), (ACTIONS,), device, hidden_dim=HIDDEN, init_temperature=0.1, alpha_lr=1e-4,
        alpha_beta=0.5, critic_tau=0.01, encoder_tau=0.05, num_filters=FILTERS, log_interval=10**9, data_augs="crop",
    )  # fmt: skip
    replay = utils.ReplayBuffer((3 * STACK, SIZE, SIZE), (ACTIONS,), ROWS, batch, device, image_size=CROP)
    g = np.random.default_rng(0)
    frames = g.integers(0, 256, (ROWS + STACK + 1, 3, SIZE, SIZE), dtype=np.uint8)
    for i in range(ROWS):
        o, o_next = frames[i : i + STACK].reshape(-1, SIZE, SIZE), frames[i + 1 : i + 1 + STACK].reshape(-1, SIZE, SIZE)
        replay.add(o, g.uniform(-1, 1, ACTIONS), g.random(), o_next, False)
    steps = iter(range(1, 10**9))  # 0 would log histograms

    return lambda: agent.update(replay, quiet, next(steps))
