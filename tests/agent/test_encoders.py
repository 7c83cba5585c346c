"""Encoders against one-frame-at-a-time versions of themselves."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from covr_lightning.agent import ConvTrunk, DeepMDP, Encoder, Flare, RandomTranslate
from covr_lightning.envs import EnvSpec
from covr_lightning.errors import ConfigError
from tests.agent.small_agents import agent, batch, parameters, same


class PerFrame(Encoder):
    """One convolution trunk, one frame after the other, features side by side."""

    def build(self, channels: int, image_size: tuple[int, int], filters: int, strides: Sequence[int]) -> None:
        self.frame = ConvTrunk()
        self.frame.build(3, image_size, filters, strides)
        self.features = channels // 3 * self.frame.features

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.frame(frame) for frame in images.split(3, dim=1)], dim=1)


def built(encoder: Encoder, frames: int = 3) -> Encoder:
    torch.manual_seed(0)
    encoder.build(3 * frames, (20, 20), 4, (2, 1))
    return encoder


def test_stride_2_in_every_layer_takes_the_papers_driving_frames() -> None:
    # 128 → 63 → 31 → 15 → 7: 7² · 32.
    trunk = ConvTrunk()
    trunk.build(9, (128, 128), 32, (2, 2, 2, 2))
    assert trunk.features == 7 * 7 * 32
    assert trunk(torch.zeros(1, 9, 128, 128, dtype=torch.uint8)).shape == (1, 1568)


def test_kernels_begin_orthogonal_as_a_whole_or_in_their_centre() -> None:
    for init in ("delta_orthogonal", "orthogonal"):
        first = built(ConvTrunk(init)).layers[0].weight.detach()  # type: ignore[arg-type, index, union-attr]
        rows = first.flatten(1)  # 4 filters over 9 channels of 3×3: orthogonal, of length √2 (the gain of a ReLU)
        torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(4), rtol=1e-5, atol=1e-5)
        outside = first.clone()
        outside[:, :, 1, 1] = 0
        assert bool(outside.any()) == (init == "orthogonal")
    with pytest.raises(ConfigError, match=r"model.encoder.init is 'kaiming'; it can be 'delta_orthogonal' or"):
        ConvTrunk("kaiming")  # type: ignore[arg-type]


def test_the_default_encoder_keeps_its_place_and_its_names() -> None:
    module, named = agent(), agent(encoder=ConvTrunk())
    assert same(parameters(module), parameters(named))
    names = [name for name in parameters(module) if name.startswith(("trunk", "target_trunk"))]
    layers = [f"layers.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    assert names == [f"{which}.{layer}" for which in ("trunk", "target_trunk") for layer in layers]


@pytest.mark.parametrize("frames", [2, 3, 4])
def test_flare_by_frames_taken_apart(frames: int) -> None:
    flare = built(Flare(), frames)
    images = batch(spec=EnvSpec("x", 20, 20, frames, 2, 8, 1000))["pixels"]
    assert isinstance(flare, Flare)
    f = [flare.frame(images[:, 3 * t : 3 * t + 3]) for t in range(frames)]
    expected = f[1:] + [f[t] - f[t - 1] for t in range(1, frames)]
    torch.testing.assert_close(flare(images), torch.cat(expected, dim=1))
    assert flare(images).shape == (8, flare.features)
    assert flare.features == 2 * (frames - 1) * f[0].shape[1]


def test_no_gradient_comes_through_the_frame_that_is_taken_away() -> None:
    flare, images = built(Flare()), batch()["pixels"]
    assert isinstance(flare, Flare)
    weights = torch.randn(flare.features, generator=torch.Generator().manual_seed(1))
    f = [flare.frame(images[:, 3 * t : 3 * t + 3]) for t in range(3)]
    fixed = [x.detach() for x in f]
    expected = (torch.cat([f[1], f[2], f[1] - fixed[0], f[2] - fixed[1]], dim=1) @ weights).sum()
    through = (torch.cat([f[1], f[2], f[1] - f[0], f[2] - f[1]], dim=1) @ weights).sum()
    names = list(flare.parameters())
    got = torch.autograd.grad((flare(images) @ weights).sum(), names)
    wanted, wrong = (torch.autograd.grad(loss, names, retain_graph=True) for loss in (expected, through))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)
    assert all((a - b).abs().max() > 1 for a, b in zip(got, wrong, strict=True))


def test_flare_without_differences_is_the_per_frame_encoder() -> None:
    agents = [
        agent(encoder=encoder, augmentation=RandomTranslate(24), objectives=[DeepMDP()])
        for encoder in (Flare(differences=False), PerFrame())
    ]
    assert same(*map(parameters, agents))
    images = batch()["pixels"]
    assert torch.equal(*(module.trunk(images) for module in agents))
    # Of one update: the shared weights' gradients are summed in another order, and Adam makes much of the smallest.
    for module in agents:
        module.training_step(batch())
    for (name, one), (_, other) in zip(*(module.named_parameters() for module in agents), strict=True):
        assert (one.grad is None) == (other.grad is None) == (not name.startswith(("trunk", "critic", "objectives")))
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_an_agent_with_flare_learns_and_acts() -> None:
    module = agent(encoder=Flare())
    before = parameters(module)
    for update in range(2):
        module.training_step(batch(seed=update))
    after = parameters(module)
    for prefix in ("trunk.frame.", "target_trunk.frame.", "actor.", "critic."):
        assert not same(before, after, prefix), prefix
    assert module.act(batch()["pixels"]).shape == (8, 2)


def test_one_frame_is_too_few() -> None:
    with pytest.raises(ConfigError, match=r"Flare compares frames, but data\.env\.frame_stack is 1"):
        agent(spec=EnvSpec("x", 20, 20, 1, 2, 8, 1000), encoder=Flare())
