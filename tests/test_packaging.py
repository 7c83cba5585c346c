"""One import package: callbacks and configs inside it, from a checkout and from the built wheel elsewhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROBE = """
import covr_lightning, covr_lightning.callbacks as c
from covr_lightning.config_files import bundled_configs, resolve, resolve_folder, yamls_in
from covr_lightning.vlm.loading import embedded_folder
assert "quickstart.yaml" in bundled_configs(), bundled_configs()
assert resolve("ablations/m5").name == "m5.yaml" and len(yamls_in(resolve_folder("ablations"))) == 12
assert (embedded_folder() / "model.safetensors").is_file()
from covr_lightning.callbacks import ProgressiveFineTune
from covr_lightning.published import published_results
assert len(published_results()) == 317
print(c.__file__)
"""


def run(code: str, cwd: Path, path: Path | None = None) -> str:
    # -P keeps the working directory off the import path, except where it is what is tested.
    flags = ["-c"] if path is None else ["-P", "-c"]
    prefix = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    done = subprocess.run(
        [sys.executable, *flags, prefix + code], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_from_the_checkout(tmp_path: Path) -> None:
    assert Path(run(PROBE, ROOT)).parent == ROOT / "callbacks"
    assert Path(run(PROBE, tmp_path)).parent == ROOT / "callbacks"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns(".venv", ".git", "runs", "build", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, timeout=300)
    return next(folder.glob("*.whl"))


def test_from_the_built_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"covr_lightning"}
    assert "covr_lightning/callbacks/progressive_finetune.py" in names
    assert "covr_lightning/configs/quickstart.yaml" in names
    assert "covr_lightning/configs/ablations/m1.yaml" in names
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert Path(run(PROBE, elsewhere, tmp_path / "site")).parent == tmp_path / "site" / "covr_lightning" / "callbacks"
