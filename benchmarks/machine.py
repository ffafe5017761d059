"""What a table of measurements was made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path


def machine(*packages: str) -> dict[str, str]:
    """The processor, Python, and versions of packages."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    model = next(models, platform.machine())
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"cpu": f"{model}, {os.cpu_count()} cores", "python": platform.python_version(), **versions}
