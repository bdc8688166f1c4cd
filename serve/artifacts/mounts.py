"""Which directories are on file systems of other machines, whose clients remember listings for a while."""

from pathlib import Path

# NFS keeps attributes of directories for up to a minute (acdirmax), the others for less, by default.
NETWORK_STALENESS_S = 60.0
_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "fuse.sshfs", "fuse.glusterfs"}


def is_on_network(directory: Path, mounts: Path = _MOUNTS) -> bool:
    """Return whether a directory, which need not be there yet, is on such a file system. False if that is not known.

    Args:
        directory: Absolute.
        mounts: What the kernel says is mounted where.

    Source: proc_pid_mountinfo(5) for the format; nfs(5), acdirmax.
    """
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return False
    kind, longest = "", -1
    place = directory.resolve()
    for line in lines:
        left, _, right = line.partition(" - ")
        point = Path(left.split()[4].encode().decode("unicode_escape"))  # a blank is written as \\040
        if place.is_relative_to(point) and len(point.parts) >= longest:
            kind, longest = (
                right.split()[0],
                len(point.parts),
            )  # of several on one point, the last one covers the others
    return kind in _NETWORK
