"""A second name for a file, or a copy of it."""

import shutil
from pathlib import Path


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where file systems differ or have no links. Replaces what is there.

    Args:
        source: The file; a symbolic link is followed.
        target: Its new name; directories are made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    real = source.resolve()
    try:
        target.hardlink_to(real)
    except OSError:
        shutil.copyfile(real, target)
