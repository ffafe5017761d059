"""Files that come to be whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def draft_of(target: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty file beside a target, which takes the target's name in the end, or goes where something fails.

    A reader sees the old file or the new one, never a part. Who may read it is what the umask says, as of any new file.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     with draft_of(f"{folder}/a.txt") as draft:
    ...         _ = draft.write_text("all of it")
    ...     [path.name for path in Path(folder).iterdir()]
    ['a.txt']
    """
    whole = Path(target)
    draft = whole.with_name(f".{whole.name}.{secrets.token_hex(4)}")
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = draft.stat().st_mode
    try:
        yield draft
        draft.chmod(mode)  # safetensors may have put a file of its own there, for the owner alone
        draft.replace(whole)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
