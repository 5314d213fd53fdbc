"""What stands between sandbox.py and untrusted code: a script that it starts, never imported.

    python -I -S sandbox_init.py < order.json > report.json

Namespaces of its own (mounts, processes, network, IPC; users too where we are not root), a root of
its own that holds the interpreter read-only and one small tmpfs, an unprivileged user without
capabilities, resource limits, a filter of system calls (seccomp.py), then the program in a fresh
interpreter. The three processes:

    supervisor   on the host's side; ends the whole namespace at the time limit
    init         process 1 inside; when it ends the kernel kills all that is left there
    program      the interpreter that runs the untrusted source

Namespaces and root are bubblewrap's where the order names it, else made here; all else is the same.
bubblewrap's init is this script again. The filter is set after init is done, not by bubblewrap:
init mounts the tmpfs, for bubblewrap's have no bound on their inodes.

Linux only, kernel 5.12 or newer. Standard library only.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import stat
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
ATTR_RDONLY, ATTR_NOSUID = 1, 2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 38, 22, 2
CAPABILITY_VERSION = 0x20080522

OWN, BUBBLEWRAP, UNSAFE = "own", "bubblewrap", "unsafe"
"""Who makes the namespaces."""
INSIDE = "inside"
"""The argument of the script that bubblewrap starts."""
NOBODY = 65534
PROOF = 3
"""The descriptor to which the program's last act writes the token."""
OUT_OF_MEMORY = 77
"""The exit code of a program that met a MemoryError."""
SEEN = ("/usr", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
"""What the program sees of the host beside the interpreter, read-only, where it exists."""
IPC = ("kernel/shmmni", "kernel/msgmni", "fs/mqueue/queues_max")
"""Under /proc/sys: how many of each there may be in a namespace; 0 where no filter forbids them."""
ROOT_INODES = 4096
SIGNALS = 256
"""Queued ones, and timers: they are the kernel's memory."""
NEW_ROOT = "/proc"
"""Where the new root is put together: a folder that every host has and no one reads below us."""
INTERPRETER = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
"""The one below a virtual environment, which is of no use to the program."""

PROGRAM = f"""
import os, sys, traceback
write, leave = os.write, os._exit
token, _, source = sys.stdin.buffer.read().partition(b"\\n")
try:
    exec(compile(source, "<program>", "exec"), {{"__name__": "__main__"}})
except MemoryError:
    leave({OUT_OF_MEMORY})
except BaseException:
    traceback.print_exc()
    sys.stderr.flush()
    leave(1)
write({PROOF}, token)
leave(0)
"""

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    order = json.load(sys.stdin)
    if sys.argv[1:] == [INSIDE]:
        os.set_inheritable(order["report"], False)
        report_and_leave(init_of_bubblewrap, order, order["report"])
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        report = WAYS[order["way"]](order)
    except OSError as error:
        report = refusal(error)
    json.dump(report, sys.stdout)


def confined(order: Mapping[str, Any]) -> dict[str, Any]:
    """{"status": the program's wait status}, {"late": true} or {"refused": why}."""
    own_namespaces()
    return supervised(order, lambda order, report: report_and_leave(init, order, report))


def bubblewrapped(order: Mapping[str, Any]) -> dict[str, Any]:
    """The same in bubblewrap's namespaces."""
    return supervised(order, become_bubblewrap)


def unconfined(order: Mapping[str, Any]) -> dict[str, Any]:
    """The same without the sandbox: only limits, and the end of the process group."""

    def direct(order: Mapping[str, Any]) -> dict[str, Any]:
        os.setpgid(0, 0)
        return {"status": spawned(order, lambda: os.chdir(order["folder"]))}

    return supervised(order, lambda order, report: report_and_leave(direct, order, report))


WAYS = {OWN: confined, BUBBLEWRAP: bubblewrapped, UNSAFE: unconfined}


def supervised(
    order: Mapping[str, Any], child: Callable[[Mapping[str, Any], int], NoReturn]
) -> dict[str, Any]:
    """Fork `child`, end it and its group at the time limit, and give back what it reported."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        child(order, writer)
    os.close(writer)
    ended, _, _ = select.select([os.pidfd_open(process)], [], [], order["seconds"])
    for kill in (os.killpg, os.kill):  # An init has no group of its own, and needs none.
        with contextlib.suppress(ProcessLookupError):
            kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with open(reader, "rb") as pipe:
        said = pipe.read()
    if not ended:
        return {"late": True}
    if not said:
        return {"refused": f"{order['way']}: it did not begin"}
    return json.loads(said) if said.strip() else {}


def report_and_leave(
    work: Callable[[Mapping[str, Any]], dict[str, Any]], order: Mapping[str, Any], writer: int
) -> NoReturn:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.write(writer, b"\n")  # Begun; what follows is missing where it was killed.
    try:
        report = work(order)
    except OSError as error:
        report = refusal(error)
    os.write(writer, json.dumps(report).encode())
    os._exit(0)


def refusal(error: OSError) -> dict[str, Any]:
    return {"refused": f"{error.filename or 'the system'}: {error.strerror}"}


def init(order: Mapping[str, Any]) -> dict[str, Any]:
    if order["filter"] is None:
        own_ipc()
    own_files()
    return process_one(order)


def init_of_bubblewrap(order: Mapping[str, Any]) -> dict[str, Any]:
    return process_one(order)


def process_one(order: Mapping[str, Any]) -> dict[str, Any]:
    """In a root of which nothing can be written."""
    own_folder(order["disk"], order["inodes"])
    return {"status": spawned(order, lambda: drop_privileges(order["user"], order["processes"]))}


def become_bubblewrap(order: Mapping[str, Any], report: int) -> NoReturn:
    """This script again, as process 1 in its namespaces; the order is its standard input."""
    try:
        inside = os.memfd_create("order")
        with open(inside, "w", closefd=False) as file:
            json.dump({**order, "report": report}, file)
        os.lseek(inside, 0, os.SEEK_SET)
        os.dup2(inside, 0)
        for kept in (report, order["proof"]):
            os.set_inheritable(kept, True)
        os.execve(order["bubblewrap"], ["bwrap", *bubblewrap_arguments()], {})
    except OSError as error:
        os.write(report, json.dumps(refusal(error)).encode())
    os._exit(1)


def bubblewrap_arguments() -> list[str]:
    """A root of which only `seen` is there, and what init needs to become the program's user."""
    arguments = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    arguments += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--as-pid-1"]
    capabilities = ["CAP_SYS_ADMIN"]
    if os.geteuid() == 0:
        arguments += ["--cap-drop", "ALL"]
        capabilities += ["CAP_SETUID", "CAP_SETGID"]
    else:
        arguments += ["--unshare-user", "--uid", f"{NOBODY}", "--gid", f"{NOBODY}"]
    for capability in capabilities:
        arguments += ["--cap-add", capability]
    for folder in sorted({folder for path in seen() for folder in folders_above(path)}):
        arguments += ["--dir", folder]  # Those that it makes by itself are its user's alone.
    for path in seen():
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        else:
            is_device = stat.S_ISCHR(os.stat(path).st_mode)
            arguments += ["--dev-bind" if is_device else "--ro-bind", path, path]
    arguments += ["--dir", "/program", "--remount-ro", "/", "--chdir", "/"]
    with open(__file__) as script:
        return [*arguments, "--", INTERPRETER, "-I", "-S", "-B", "-c", script.read(), INSIDE]


def spawned(order: Mapping[str, Any], prepare: Callable[[], None]) -> int:
    """The wait status of a fresh interpreter with the program in it."""
    reader, writer = os.pipe()
    failure_reader, failure_writer = os.pipe()  # Closed by a successful exec.
    program = os.fork()
    if program == 0:
        try:
            prepare()
            become_program(reader, order)
        except OSError as error:
            os.write(failure_writer, json.dumps([error.errno, error.filename or "exec"]).encode())
        os._exit(1)
    os.close(reader)
    os.close(failure_writer)
    with open(failure_reader, "rb") as pipe:
        if failed := pipe.read():
            number, what = json.loads(failed)
            raise OSError(number, os.strerror(number), what)
    with contextlib.suppress(BrokenPipeError), open(writer, "wb") as pipe:
        pipe.write(order["token"].encode() + b"\n" + order["source"].encode(errors="replace"))
    while True:  # Orphans come here to be reaped.
        ended, status = os.wait()
        if ended == program:
            return status


def become_program(source: int, order: Mapping[str, Any]) -> NoReturn:
    """Standard streams, the proof and nothing else open; an empty environment; limits."""
    proof, nothing = order["proof"], os.open("/dev/null", os.O_WRONLY)
    os.dup2(source, 0)
    os.dup2(nothing, 1)
    if proof != PROOF:
        os.dup2(proof, PROOF)
        os.close(proof)
    os.set_inheritable(PROOF, True)
    for limit, most in {
        resource.RLIMIT_CPU: int(order["seconds"]) + 1,
        resource.RLIMIT_AS: order["memory"],
        resource.RLIMIT_FSIZE: order["file"],
        resource.RLIMIT_NOFILE: order["descriptors"],
        resource.RLIMIT_CORE: 0,
    }.items():
        resource.setrlimit(limit, (most, most))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if order["filter"] is not None:
        filter_calls(bytes.fromhex(order["filter"]))
    os.execve(INTERPRETER, [INTERPRETER, "-I", "-S", "-B", "-c", PROGRAM], {})


def filter_calls(code: bytes) -> None:
    """From here on, and in all that is started from here; seccomp.py makes the code."""

    class Program(ctypes.Structure):
        _fields_ = (("steps", ctypes.c_ushort), ("code", ctypes.c_char_p))

    program = Program(len(code) // 8, code)
    pointer = ctypes.c_void_p(ctypes.addressof(program))
    zeros = (ctypes.c_ulong(0), ctypes.c_ulong(0))
    called("prctl", PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), pointer, *zeros)


def own_ipc() -> None:
    """No System V memory, messages or POSIX queues: of this namespace alone."""
    for name in IPC:
        with open(f"/proc/sys/{name}", "w") as file:
            file.write("0")


def own_namespaces() -> None:
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        called("unshare", flags)
        return
    called("unshare", flags | CLONE_NEWUSER)
    for name, line in {
        "setgroups": "deny",
        "uid_map": f"{NOBODY} {user} 1",
        "gid_map": f"{NOBODY} {group} 1",
    }.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def own_files() -> None:
    """A root of which only the interpreter and `SEEN` are there, and an empty /program."""
    os.umask(0o022)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    options = f"size=1m,nr_inodes={ROOT_INODES},mode=755"
    mount("tmpfs", NEW_ROOT, "tmpfs", MS_NOSUID | MS_NODEV, options)
    for path in seen():
        show(path)
    os.mkdir(f"{NEW_ROOT}/program")
    make_read_only(NEW_ROOT, 0)
    os.chdir(NEW_ROOT)
    called("pivot_root", b".", b".")
    called("umount2", b".", MNT_DETACH)


def own_folder(disk: int, inodes: int) -> None:
    """So many bytes and files at /program; the folder itself is one more."""
    options = f"size={disk},nr_inodes={inodes + 1},mode=1777"
    mount("tmpfs", "/program", "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir("/program")


def seen() -> list[str]:
    """`SEEN` and the interpreter's folders; what lies in another of them is left out."""
    folders = (sys.base_prefix, sys.base_exec_prefix, os.path.dirname(INTERPRETER))
    interpreter = {os.path.realpath(path) for path in folders}
    paths: list[str] = []
    for path in sorted({path for path in SEEN if os.path.exists(path)} | interpreter):
        if not any(path.startswith(f"{other}/") for other in paths):
            paths.append(path)
    return paths


def folders_above(path: str) -> list[str]:
    parts = path.split("/")[1:-1]
    return ["/" + "/".join(parts[: i + 1]) for i in range(len(parts))]


def show(path: str) -> None:
    """A host's file, folder or link, at its own place in the new root."""
    target = NEW_ROOT + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    mount(path, target, None, MS_BIND | MS_REC)
    make_read_only(target, AT_RECURSIVE)


def make_read_only(path: str, flags: int) -> None:
    attributes = (ctypes.c_uint64 * 4)(ATTR_RDONLY | ATTR_NOSUID, 0, 0, 0)
    numbers = (ctypes.c_long(SYS_MOUNT_SETATTR), ctypes.c_long(AT_FDCWD))
    size = ctypes.c_long(ctypes.sizeof(attributes))
    called("syscall", *numbers, path.encode(), ctypes.c_long(flags), attributes, size)


def drop_privileges(user: int, processes: int) -> None:
    """An unprivileged user, without capabilities in whatever user namespace this is."""
    for limit, most in {
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_SIGPENDING: SIGNALS,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }.items():
        resource.setrlimit(limit, (most, most))
    os.setsid()
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    called("capset", header, (ctypes.c_uint32 * 6)())


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    called("mount", *texts, ctypes.c_ulong(flags), options.encode())


def prctl(option: int, value: int) -> None:
    called("prctl", option, *(ctypes.c_ulong(number) for number in (value, 0, 0, 0)))


def called(name: str, *arguments: Any) -> None:
    """Call libc; OSError with the call's name as its file name where it fails."""
    if getattr(libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        paths = [word.decode() for word in arguments if isinstance(word, bytes) and word]
        raise OSError(number, os.strerror(number), " ".join([name, *paths]))


if __name__ == "__main__":
    main()
