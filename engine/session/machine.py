"""Tells machines apart, and which file systems they may share."""

import functools
import os
import re
from pathlib import Path

NETWORK_FILE_SYSTEMS = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "afs", "ceph",
    "9p", "glusterfs", "fuse.sshfs", "fuse.glusterfs", "fuse.juicefs",
}  # fmt: skip
"""File systems on which the shared memory of WAL does not work between hosts."""


@functools.cache
def boot_id() -> str:
    """The id of this kernel's start, which no two machines share; "" if it cannot be read.

    Containers of one machine have the same, and see each other's locks.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def on_network(folder: Path) -> bool:
    """Whether a folder is on a network file system, according to /proc/self/mountinfo."""
    longest, kind = -1, ""
    path = str(folder.resolve())
    mounts = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())  # of any names
    for line in mounts.rstrip("\n").split("\n"):
        before, _, after = line.partition(" - ")
        # Of white space and backslashes in a path, some are written as octal numbers: \040.
        mount = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), before.split(" ")[4])
        inside = path == mount or path.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= longest:
            longest, kind = len(mount), after.split()[0]
    return kind in NETWORK_FILE_SYSTEMS
