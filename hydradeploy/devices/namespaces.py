"""Whether process numbers mean here what they mean to the kernel's drivers."""

from __future__ import annotations

import os

from hydradeploy.devices.reading import Tree

# The kernel's constant for the namespace it boots with (include/linux/proc_ns.h, PROC_PID_INIT_INO).
_FIRST = f"pid:[{0xEFFFFFFC}]"


def in_first_pid_namespace(tree: Tree) -> bool:
    """False in a container with process numbers of its own: drivers list those of the host."""
    try:
        return os.readlink(tree.path("proc/self/ns/pid")) == _FIRST
    except OSError:  # a kernel without namespaces
        return True
