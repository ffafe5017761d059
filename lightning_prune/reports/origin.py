"""Where a run's code comes from."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

_SECONDS = 5.0


def commit(folder: str | os.PathLike[str] | None = None) -> str | None:
    """The commit that a folder's git repository is at, with ``+`` where tracked files have been changed since.

    Args:
        folder: in the repository; ``None`` is the current one.

    Returns:
        40 hexadecimal digits; ``None`` outside of a repository, without git, or where git doesn't answer in time.

    >>> commit("/") is None
    True
    """
    where, git = Path(folder or "."), shutil.which("git")
    if git is None:
        return None
    found = _ask(git, where, "rev-parse", "--verify", "HEAD")
    if not found:
        return None
    return found + ("+" if _ask(git, where, "status", "--porcelain", "--untracked-files=no") else "")


def _ask(git: str, where: Path, *question: str) -> str | None:
    command = [git, "--no-optional-locks", "-C", str(where), *question]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
