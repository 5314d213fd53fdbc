"""A seccomp filter for programs that a model wrote, in classic BPF.

    code = program(os.uname().machine)      # None on an unsupported machine

It forbids what a program that computes an answer does not need:

- namespaces and mounts, in which an unprivileged user would be root again;
- memory that no per-process limit counts: System V shared memory, message queues and semaphores,
  POSIX message queues, memfd, inotify marks, file locks;
- other processes' memory, kernel keys, io_uring, BPF, performance counters, modules, kexec, clocks;
- sockets other than Unix and Internet ones: some, such as vsock, ignore network namespaces;
- calls newer than this list, and calls in another numbering (32-bit ones, x32).

A forbidden call fails (EPERM), so that a program can continue without it; a call in another
numbering kills its process. Threads and children without new namespaces remain possible: `clone3`,
whose flags a filter cannot read, fails with ENOSYS, and C libraries then use `clone`.

The numbers are the kernel's, which never change; tests compare them with its headers. The filter is
written by hand because libseccomp's Python bindings have no maintained release on PyPI.

Standard library only.
"""

import errno
import struct
from collections.abc import Iterable, Iterator, Mapping

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
"""Return values of a filter; an error number is added to ERRNO."""
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
"""Offsets in `struct seccomp_data`; an argument has eight bytes, the low four first."""
LOAD, RETURN = 0x20, 0x06
EQUAL, ABOVE, AT_LEAST, ANY_BIT = 0x15, 0x25, 0x35, 0x45

AUDIT: Mapping[str, int] = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The kernel's AUDIT_ARCH constant for the numbering of calls, by machine."""
X32 = 0x40000000
"""Set in the numbers of x86_64's calls with 32-bit pointers."""
NEWEST = 451
"""cachestat, of Linux 6.5. Later numbers are the same on every machine; they fail with ENOSYS."""

NEW_NAMESPACES = 0x7E020080
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME."""
FAMILIES = (1, 2, 10)
"""AF_UNIX, AF_INET, AF_INET6."""
TERMINAL = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX, which inject input into the terminal a process was started from."""
LOCKS = (6, 7, 37, 38)
"""F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW."""

# Numbers on x86_64 and aarch64; None where there is no such call.
CALLS: Mapping[str, tuple[int, int | None]] = {
    "clone": (56, 220),
    "clone3": (435, 435),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "ioctl": (16, 29),
    "fcntl": (72, 25),
}
FORBIDDEN: Mapping[str, tuple[int, int | None]] = {
    # Namespaces, mounts, and files by handle.
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # Other processes, and the kernel's own programs.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "lookup_dcookie": (212, 18),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_setup": (206, 0),
    # Memory that no per-process limit counts.
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "semctl": (66, 191),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "flock": (73, 32),
    # The whole machine.
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "create_module": (174, None),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "query_module": (178, None),
    "get_kernel_syms": (177, None),
    "nfsservctl": (180, 42),
    "reboot": (169, 142),
    "syslog": (103, 116),
    "acct": (163, 89),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "vhangup": (153, 58),
    "personality": (135, 92),
    "modify_ldt": (154, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    "uselib": (134, None),
    "ustat": (136, None),
    "sysfs": (139, None),
    "_sysctl": (156, None),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
}

Step = tuple[int, int, int, int]
"""code, steps to skip if the test holds, steps to skip if it does not, and the constant."""


def number(name: str, machine: str) -> int | None:
    """A call's number; None where the machine has no such call."""
    known = (CALLS | FORBIDDEN)[name]  # type: ignore[operator]
    return known[list(AUDIT).index(machine)]


def program(machine: str) -> bytes | None:
    """The filter for a machine, as an array of `struct sock_filter`; None if it is unsupported."""
    if machine not in AUDIT:
        return None
    return b"".join(struct.pack("<HBBI", *step) for step in _steps(machine))


def _steps(machine: str) -> Iterator[Step]:
    yield (LOAD, 0, 0, ARCHITECTURE)
    yield (EQUAL, 1, 0, AUDIT[machine])
    yield (RETURN, 0, 0, KILL)
    yield (LOAD, 0, 0, NUMBER)
    if machine == "x86_64":
        yield from _return_if(AT_LEAST, X32, KILL)
    yield from _return_if(ABOVE, NEWEST, ERRNO | errno.ENOSYS)
    for name in FORBIDDEN:
        if (call := number(name, machine)) is not None:
            yield from _return_if(EQUAL, call, ERRNO | errno.EPERM)
    yield from _return_if(EQUAL, _required_number("clone3", machine), ERRNO | errno.ENOSYS)
    yield from _by_argument(
        _required_number("clone", machine),
        0,
        _return_if(ANY_BIT, NEW_NAMESPACES, ERRNO | errno.EPERM),
        ALLOW,
    )
    for name in ("socket", "socketpair"):
        allowed = (step for family in FAMILIES for step in _return_if(EQUAL, family, ALLOW))
        yield from _by_argument(
            _required_number(name, machine), 0, allowed, ERRNO | errno.EAFNOSUPPORT
        )
    for name, refused, error in (("ioctl", TERMINAL, errno.EPERM), ("fcntl", LOCKS, errno.ENOLCK)):
        steps = (step for each in refused for step in _return_if(EQUAL, each, ERRNO | error))
        yield from _by_argument(_required_number(name, machine), 1, steps, ALLOW)
    yield (RETURN, 0, 0, ALLOW)


def _required_number(name: str, machine: str) -> int:
    call = number(name, machine)
    assert call is not None, f"{machine} has no {name}"
    return call


def _return_if(test: int, constant: int, answer: int) -> list[Step]:
    """Return `answer` if the test of the loaded value holds, otherwise continue."""
    return [(test, 0, 1, constant), (RETURN, 0, 0, answer)]


def _by_argument(call: int, argument: int, steps: Iterable[Step], otherwise: int) -> list[Step]:
    """For one call: run the steps on the low half of an argument, then return `otherwise`."""
    inside = [(LOAD, 0, 0, ARGUMENTS + 8 * argument), *steps, (RETURN, 0, 0, otherwise)]
    return [(EQUAL, 0, len(inside), call), *inside]
