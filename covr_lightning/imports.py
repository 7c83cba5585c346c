"""What must be so before Lightning, MuJoCo and PEFT are imported."""

from __future__ import annotations

import contextlib
from importlib.util import find_spec

from covr_lightning.errors import ConfigError
from covr_lightning.rendering import NoBackendError, choose_backend


def prepare_imports() -> None:
    """Choose the OpenGL backend, as MuJoCo reads MUJOCO_GL once, and check torchvision.

    A machine without any backend is no error yet: not every environment renders with MuJoCo.

    Raises:
        ConfigError: See :func:`check_torchvision`.
    """
    with contextlib.suppress(NoBackendError):
        choose_backend()
    check_torchvision()


def check_torchvision() -> None:
    """Refuse a torchvision that is installed but cannot be imported.

    Lightning, PEFT and transformers import it where it is there, and would end in its error.

    Raises:
        ConfigError: That is so.
    """
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"torchvision is installed but does not work with this torch ({error}): uninstall it, nothing here needs "
            "it, or install the version that belongs to this torch."
        ) from error
