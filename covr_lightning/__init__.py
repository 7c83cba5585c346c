"""COVR: a visual RL agent and a vision-language model that improve each other."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    __version__ = version("covr_lightning")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

# In a checkout (an editable install, or Python started in the repository) `callbacks/` and `configs/` lie beside
# this folder, not in it. A built wheel carries them inside, and nothing happens here.
_root = Path(__file__).parent.parent
if not (Path(__file__).parent / "callbacks").is_dir() and (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))
del _root
