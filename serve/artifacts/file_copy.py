"""Copies between files of this machine, in the kernel where it can.

There is no detour through this process then, and no copy at all on file systems that share blocks (XFS, Btrfs).
"""

import errno
import os
from pathlib import Path

CHUNK_BYTES = 8 << 20
# What `copy_file_range` says where it does not work: other file systems, old kernels, some network file systems.
_NOT_HERE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.EIO}


def copy_file(source: Path, target: Path) -> int:
    """Copy a file's content into a new file, and flush it to the disk; return its size in bytes.

    Raises:
        FileExistsError: There is such a file.
    """
    with open(source, "rb", buffering=0) as reader, open(target, "xb", buffering=0) as writer:
        size = os.fstat(reader.fileno()).st_size
        copied = copy_range(reader.fileno(), writer.fileno(), 0, size)
        os.fsync(writer.fileno())
    return copied


def copy_range(source: int, target: int, start: int, length: int) -> int:
    """Copy part of one open file into another, at the same offset.

    Returns:
        Bytes copied; fewer than `length` if the source ends before.
    """
    done = 0
    in_kernel = hasattr(os, "copy_file_range")
    while done < length:
        offset, count = start + done, min(CHUNK_BYTES, length - done)
        if in_kernel:
            try:
                copied = os.copy_file_range(source, target, count, offset, offset)
            except OSError as exc:
                if exc.errno not in _NOT_HERE:
                    raise
                in_kernel = False
                continue
            if copied == 0:
                in_kernel = False  # the end, or a file system that pretends: reading tells
                continue
        else:
            copied = write_all(target, os.pread(source, count, offset), offset)
            if copied == 0:
                break
        done += copied
    return done


def write_all(descriptor: int, data: bytes, offset: int) -> int:
    """Write all of `data` at an offset; return its length."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
    return len(data)


def flush_directory(directory: Path) -> None:
    """Make names that were given in a directory outlast a power cut, where that can be asked for."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
