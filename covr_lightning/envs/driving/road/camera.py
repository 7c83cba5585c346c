"""Off-screen pictures of a MuJoCo model through one of its cameras.

Not `mujoco.Renderer`: that takes the OpenGL backend that MuJoCo found in the environment when it was first imported,
and other packages import it before anybody can choose one.
"""

from __future__ import annotations

import atexit
import importlib

import mujoco
import numpy as np

from covr_lightning.errors import ConfigError
from covr_lightning.rendering import INSTALL_HINT, choose_backend


class Camera:
    """One camera, without shadows and reflections, with haze.

    Args:
        model: The model.
        name: The camera's name.
        size: Height and width in pixels.

    Raises:
        ConfigError: No OpenGL backend works.
    """

    def __init__(self, model: mujoco.MjModel, name: str, size: int) -> None:
        self.model = model
        backend = choose_backend()
        try:
            self._context = importlib.import_module(f"mujoco.{backend}").GLContext(size, size)
            self._context.make_current()
            self._mjr = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except Exception as error:
            # The OpenGL layer of the day raises whatever it likes; all mean the same to the user.
            raise ConfigError(f"No rendering backend works ({backend}: {error}); {INSTALL_HINT}.") from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._mjr)
        self._rect = mujoco.MjrRect(0, 0, size, size)
        self._scene = mujoco.MjvScene(model, maxgeom=2000)
        flags = self._scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        flags[mujoco.mjtRndFlag.mjRND_FOG] = 1
        self._option = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._camera.fixedcamid = model.camera(name).id
        # Freed by the interpreter's end it would be too late: OpenGL's modules go first.
        atexit.register(self.close)
        self._pixels = np.zeros((size, size, 3), np.uint8)

    def picture(self, data: mujoco.MjData) -> np.ndarray:
        """The picture (size, size, 3) uint8 of a state whose kinematics are up to date."""
        self._context.make_current()
        everything = mujoco.mjtCatBit.mjCAT_ALL
        # mjv_updateScene lays the endless ground around where the scene's camera was in the picture before.
        mujoco.mjv_updateCamera(self.model, data, self._camera, self._scene)
        mujoco.mjv_updateScene(self.model, data, self._option, None, self._camera, everything, self._scene)
        mujoco.mjr_render(self._rect, self._scene, self._mjr)
        mujoco.mjr_readPixels(self._pixels, None, self._rect, self._mjr)
        return self._pixels[::-1].copy()

    def close(self) -> None:
        """Free the OpenGL context. Safe to call twice."""
        if self._context is not None:
            atexit.unregister(self.close)
            self._mjr.free()
            self._context.free()
            self._context = None
