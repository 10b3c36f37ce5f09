"""System calls that a confined process is refused: a filter in the kernel, installed without any rights (seccomp(2)).

Refused are new processes, sockets, signals to others, looking into others, and changes to files that Landlock does not
cover. What is left out here falls to the other layers: fcntl(F_SETOWN), for one, sends signals too.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

REFUSED = {  # name: number on x86_64 and on aarch64, None where there is no such call
    **{"fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281)},
    **{"unshare": (272, 97), "setns": (308, 268)},
    **{"socket": (41, 198), "io_uring_setup": (425, 425)},  # io_uring opens sockets past any filter
    **{"tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)},
    **{"pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438)},
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271)},
    **{"process_madvise": (440, 440), "kcmp": (312, 272), "perf_event_open": (298, 241), "bpf": (321, 280)},
    **{"setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122)},
    **{"sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274)},
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "userfaultfd": (323, 282)},
    **{"shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180)},  # outlive a process
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447)},  # memory beside the address space
    **{"chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452)},
    **{"chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54)},
    **{"utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88)},
    **{"setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7)},
    **{"removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "truncate": (76, 45)},
}
CLONE, CLONE3 = (56, 220), (435, 435)
KILL, TGKILL, PRLIMIT = (62, 129), (234, 131), (302, 261)
NEWEST = 462
"""Calls added to Linux after this one (6.10) are unknown here, and refused; so is the x32 set of x86_64."""
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
CLONE_THREAD = 0x10000

# Instructions of the filter (linux/bpf_common.h); offsets are those of struct seccomp_data.
LOAD, EQUAL, GREATER, HAS_BITS, RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
ALLOW, REFUSE, UNKNOWN, DIE = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x80000000


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def install() -> None:
    """Refuse the calls from here on, for this thread and those that it starts; no_new_privs is set already.

    Raises:
        OSError: the kernel, or this table, does not know how.
    """
    machine = os.uname().machine
    if machine not in ARCHITECTURES or sys.platform != "linux" or sys.maxsize < 1 << 32:
        raise OSError(errno.ENOSYS, f"no table of system calls for {sys.platform} on {machine}")
    content = instructions(*ARCHITECTURES[machine], os.getpid())
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(22, 2, ctypes.byref(_Filter(len(content) // 8, content)), 0, 0):  # PR_SET_SECCOMP, a filter
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def instructions(column: int, architecture: int, pid: int) -> bytes:
    """The filter as the kernel takes it: 8 bytes an instruction."""
    found = [
        *(_step(LOAD, ARCHITECTURE), _step(EQUAL, architecture, 1, 0), _step(RETURN, DIE)),
        *(_step(LOAD, NUMBER), _step(GREATER, NEWEST, 0, 1), _step(RETURN, UNKNOWN)),
        *(_step(EQUAL, CLONE3[column], 0, 1), _step(RETURN, UNKNOWN)),  # libraries then use clone, whose flags are seen
    ]
    for numbers in REFUSED.values():
        if (number := numbers[column]) is not None:
            found += [_step(EQUAL, number, 0, 1), _step(RETURN, REFUSE)]
    for numbers, condition, value in (
        (CLONE, HAS_BITS, CLONE_THREAD),  # a thread, not a process
        (KILL, EQUAL, pid),
        (TGKILL, EQUAL, pid),
        (PRLIMIT, EQUAL, 0),  # one's own
    ):
        found += [
            *(_step(EQUAL, numbers[column], 0, 4), _step(LOAD, FIRST_ARGUMENT)),
            *(_step(condition, value, 1, 0), _step(RETURN, REFUSE), _step(RETURN, ALLOW)),
        ]
    return b"".join([*found, _step(RETURN, ALLOW)])


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One instruction; jumps are over so many instructions."""
    return struct.pack("HBBI", code, if_true, if_false, value)
