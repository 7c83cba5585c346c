"""Small agents that update without a Trainer, and batches for them."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from covr_lightning.agent import SACModule
from covr_lightning.envs import EnvSpec

SPEC = EnvSpec("cartpole-swingup", 20, 20, 3, 2, 8, 1000)


def batch(n: int = 8, seed: int = 0, labelled: float = 0.5, spec: EnvSpec = SPEC) -> TensorDict:
    """Random transitions (n,) of an environment."""
    g = torch.Generator().manual_seed(seed)
    frames = (n, spec.channels, spec.frame_height, spec.frame_width)
    data = TensorDict(
        {
            "pixels": torch.randint(0, 256, frames, dtype=torch.uint8, generator=g),
            "action": torch.rand(n, spec.action_dim, generator=g) * 2 - 1,
            "a_v": torch.rand(n, spec.action_dim, generator=g) * 2 - 1,
            "a_v_valid": torch.rand(n, 1, generator=g) < labelled,
            "next": {
                "pixels": torch.randint(0, 256, frames, dtype=torch.uint8, generator=g),
                "reward": torch.rand(n, 1, generator=g),
                "terminated": torch.rand(n, 1, generator=g) < 0.3,
            },
            "previous_action": torch.rand(n, spec.action_dim, generator=g) * 2 - 1,
        },
        [n],
    )
    truncated = torch.rand(n, 1, generator=g) < 0.3
    data["next", "truncated"], data["next", "done"] = truncated, truncated | data["next", "terminated"]
    return data


def agent(spec: EnvSpec = SPEC, **settings) -> SACModule:
    """A small agent, the same for the same settings, whose `training_step` needs no Trainer."""
    torch.manual_seed(0)
    module = SACModule(spec, **{"hidden": 16, "filters": 4, "strides": (2, 1), "latent": 8, **settings})
    return without_trainer(module)


def without_trainer(module: SACModule) -> SACModule:
    """Give a module its optimizers and the backward pass that a Trainer would bring."""
    optimizers = module.configure_optimizers()
    module.optimizers = lambda *a, **k: optimizers  # type: ignore[method-assign]
    module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]
    return module


def parameters(module: SACModule) -> dict[str, torch.Tensor]:
    """A copy of a module's state."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], prefix: str = "") -> bool:
    """Whether the entries of `a` that begin with a prefix are the same in `b`, bit for bit."""
    names = [name for name in a if name.startswith(prefix)]
    assert names, f"nothing begins with {prefix!r}"
    return all(torch.equal(a[name], b[name]) for name in names)
