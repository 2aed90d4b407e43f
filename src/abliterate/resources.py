"""Where the bundled prompts, configurations and demo model lie."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def data_dir() -> Path:
    """The bundled ``data`` folder: inside an installed wheel, or the checkout's own."""
    packaged = _PACKAGE / "_data"
    return packaged if packaged.is_dir() else _PACKAGE.parents[1] / "data"


def config_dir() -> Path:
    """The bundled ``configs`` folder."""
    packaged = data_dir() / "configs"
    return packaged if packaged.is_dir() else _PACKAGE.parents[1] / "configs"


def demo_model_dir() -> Path:
    """The bundled demo checkpoint."""
    return data_dir() / "demo-model"
