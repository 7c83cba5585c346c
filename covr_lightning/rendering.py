"""Headless rendering: which OpenGL backend MuJoCo uses, and what to install where there is none."""

from __future__ import annotations

import ctypes
import os
import sys

from covr_lightning.errors import ConfigError

BACKENDS = ("egl", "osmesa", "glfw")
_LIBRARIES = {"egl": "libEGL.so.1", "osmesa": "libOSMesa.so.8", "glfw": "libGL.so.1"}
INSTALL_HINT = (
    "install one with `apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri` (MUJOCO_GL=egl) "
    "or `apt-get install libosmesa6` (MUJOCO_GL=osmesa)"
)


class NoBackendError(ConfigError):
    """No OpenGL library for headless rendering was found."""


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def choose_backend() -> str:
    """Settle on an OpenGL backend before MuJoCo is imported, and set ``MUJOCO_GL`` to it.

    An existing ``MUJOCO_GL`` is kept. Otherwise the first of egl and osmesa whose library loads is taken (on macOS and
    Windows, where MuJoCo has its own default, nothing is set).

    Returns:
        The backend's name.

    Raises:
        ConfigError: ``MUJOCO_GL`` names an unknown backend.
        NoBackendError: No library can be loaded.
    """
    named = os.environ.get("MUJOCO_GL", "").lower()
    if named:
        if named not in (*BACKENDS, "cgl", "wgl"):
            raise ConfigError(f"MUJOCO_GL is {named!r}; it can be one of {', '.join(BACKENDS)}.")
        if sys.platform == "linux" and named in _LIBRARIES and not _loads(_LIBRARIES[named]):
            raise NoBackendError(
                f"No rendering backend: MUJOCO_GL is {named!r} but {_LIBRARIES[named]} is not there; {INSTALL_HINT}."
            )
        return named
    if sys.platform != "linux":
        return "glfw"
    for backend in ("egl", "osmesa"):
        if _loads(_LIBRARIES[backend]):
            os.environ["MUJOCO_GL"] = backend
            return backend
    raise NoBackendError(f"No rendering backend: neither libEGL nor libOSMesa is there; {INSTALL_HINT}.")
