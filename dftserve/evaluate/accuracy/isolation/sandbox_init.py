"""The script that sandbox.py starts to run untrusted code in isolation.

    python -I -S sandbox_init.py < order.json > report.json

It creates namespaces (mounts, processes, network, IPC; also users if we are not root) and a root
that holds only the interpreter, read-only, and one small tmpfs; becomes an unprivileged user
without capabilities; sets resource limits and a filter of system calls (seccomp.py); and runs the
program in a fresh interpreter. There are three processes:

    supervisor   outside the namespaces; kills everything inside at the time limit
    init         process 1 inside; when it ends the kernel kills all processes left there
    program      the interpreter that runs the untrusted source

The namespaces and the root are created by bubblewrap if the order says so, otherwise here; all else
is the same. Under bubblewrap, init is this script again. The filter is installed after init's work
and not by bubblewrap, since init must mount the tmpfs: bubblewrap's have no limit on inodes.

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
"""What creates the namespaces."""
INSIDE = "inside"
"""The argument of this script when bubblewrap starts it."""
NOBODY = 65534
"""The user and group of a program in its own user namespace: the kernel's overflow id."""
PROOF = 3
"""The descriptor to which the token is written after the program's last statement."""
OUT_OF_MEMORY = 77
"""The exit code of a program that raised a MemoryError."""
VISIBLE = ("/usr", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
"""Paths of the host that the program sees read-only, if they exist, besides the interpreter."""
IPC = ("kernel/shmmni", "kernel/msgmni", "fs/mqueue/queues_max")
"""Limits under /proc/sys, per IPC namespace; set to 0 where no filter forbids the calls."""
ROOT_INODES = 4096
"""Maximum files and folders of the new root, a tmpfs."""
SIGNALS = 256
"""Limit on queued signals and timers, which use kernel memory."""
NEW_ROOT = "/proc"
"""Where the new root is assembled: a folder that every host has and that is not needed by then."""
INTERPRETER = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
"""The base interpreter of a virtual environment, which itself is of no use to the program."""

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
        report = RUN[order["namespaces"]](order)
    except OSError as error:
        report = refusal(error)
    json.dump(report, sys.stdout)


def run_confined(order: Mapping[str, Any]) -> dict[str, Any]:
    """Run an order in namespaces made here; the report is {"status": the program's wait status},
    {"late": true} or {"refused": why}."""
    own_namespaces()
    return supervise(order, lambda order, report: report_and_leave(init, order, report))


def run_in_bubblewrap(order: Mapping[str, Any]) -> dict[str, Any]:
    """Run an order in bubblewrap's namespaces."""
    return supervise(order, become_bubblewrap)


def run_unconfined(order: Mapping[str, Any]) -> dict[str, Any]:
    """Run an order without the sandbox: with limits, and its process group killed at the end."""

    def direct(order: Mapping[str, Any]) -> dict[str, Any]:
        os.setpgid(0, 0)
        return {"status": spawn(order, lambda: os.chdir(order["folder"]))}

    return supervise(order, lambda order, report: report_and_leave(direct, order, report))


RUN = {OWN: run_confined, BUBBLEWRAP: run_in_bubblewrap, UNSAFE: run_unconfined}


def supervise(
    order: Mapping[str, Any], child: Callable[[Mapping[str, Any], int], NoReturn]
) -> dict[str, Any]:
    """Fork `child`, kill it and its group when it ends or at the time limit, and return its
    report."""
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
        report = pipe.read()
    if not ended:
        return {"late": True}
    if not report:
        return {"refused": f"{order['namespaces']}: it did not start"}
    return json.loads(report) if report.strip() else {}


def report_and_leave(
    work: Callable[[Mapping[str, Any]], dict[str, Any]], order: Mapping[str, Any], writer: int
) -> NoReturn:
    """Do the work, write its report to the pipe `writer`, and exit."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.write(writer, b"\n")  # Started; the report is missing if this process is killed.
    try:
        report = work(order)
    except OSError as error:
        report = refusal(error)
    os.write(writer, json.dumps(report).encode())
    os._exit(0)


def refusal(error: OSError) -> dict[str, Any]:
    """The report for an isolation that the system refuses."""
    return {"refused": f"{error.filename or 'the system'}: {error.strerror}"}


def init(order: Mapping[str, Any]) -> dict[str, Any]:
    """Process 1 in namespaces of our own."""
    if order["filter"] is None:
        own_ipc()
    own_files()
    return process_one(order)


def init_of_bubblewrap(order: Mapping[str, Any]) -> dict[str, Any]:
    """Process 1 in bubblewrap's namespaces, which it has made already."""
    return process_one(order)


def process_one(order: Mapping[str, Any]) -> dict[str, Any]:
    """Run the program as process 1, in a read-only root."""
    own_folder(order["disk"], order["inodes"])
    return {"status": spawn(order, lambda: drop_privileges(order["user"], order["processes"]))}


def become_bubblewrap(order: Mapping[str, Any], report: int) -> NoReturn:
    """Run this script again as process 1 in bubblewrap's namespaces, with the order as input."""
    try:
        inside = os.memfd_create("order")
        with open(inside, "w", closefd=False) as file:
            json.dump({**order, "report": report}, file)
        os.lseek(inside, 0, os.SEEK_SET)
        os.dup2(inside, 0)
        for descriptor in (report, order["proof"]):
            os.set_inheritable(descriptor, True)
        os.execve(order["bubblewrap"], ["bwrap", *bubblewrap_arguments()], {})
    except OSError as error:
        os.write(report, json.dumps(refusal(error)).encode())
    os._exit(1)


def bubblewrap_arguments() -> list[str]:
    """Arguments for a root with only the visible paths, and for the capabilities that init needs to
    become the program's user."""
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
    for folder in sorted({folder for path in visible_paths() for folder in folders_above(path)}):
        arguments += ["--dir", folder]  # Those it makes implicitly only its user can enter.
    for path in visible_paths():
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        else:
            is_device = stat.S_ISCHR(os.stat(path).st_mode)
            arguments += ["--dev-bind" if is_device else "--ro-bind", path, path]
    arguments += ["--dir", "/program", "--remount-ro", "/", "--chdir", "/"]
    with open(__file__) as script:
        return [*arguments, "--", INTERPRETER, "-I", "-S", "-B", "-c", script.read(), INSIDE]


def spawn(order: Mapping[str, Any], prepare: Callable[[], None]) -> int:
    """Run the program in a fresh interpreter, and return its wait status."""
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
    while True:  # Orphans are reaped here too.
        ended, status = os.wait()
        if ended == program:
            return status


def become_program(source: int, order: Mapping[str, Any]) -> NoReturn:
    """Exec the interpreter with limits, an empty environment, and only the standard streams and the
    proof open."""
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
    """Install the filter, made by seccomp.py, for this process and its future children."""

    class Program(ctypes.Structure):
        _fields_ = (("steps", ctypes.c_ushort), ("code", ctypes.c_char_p))

    program = Program(len(code) // 8, code)
    pointer = ctypes.c_void_p(ctypes.addressof(program))
    zeros = (ctypes.c_ulong(0), ctypes.c_ulong(0))
    call_libc("prctl", PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), pointer, *zeros)


def own_ipc() -> None:
    """Forbid System V memory, messages and POSIX queues in this IPC namespace."""
    for name in IPC:
        with open(f"/proc/sys/{name}", "w") as file:
            file.write("0")


def own_namespaces() -> None:
    """Leave the namespaces of mounts, processes, network, IPC and host name; of users too, unless
    root."""
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        call_libc("unshare", flags)
        return
    call_libc("unshare", flags | CLONE_NEWUSER)
    for name, line in {
        "setgroups": "deny",
        "uid_map": f"{NOBODY} {user} 1",
        "gid_map": f"{NOBODY} {group} 1",
    }.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def own_files() -> None:
    """Switch to a root that has only the interpreter, `VISIBLE` and an empty /program."""
    os.umask(0o022)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    options = f"size=1m,nr_inodes={ROOT_INODES},mode=755"
    mount("tmpfs", NEW_ROOT, "tmpfs", MS_NOSUID | MS_NODEV, options)
    for path in visible_paths():
        make_visible(path)
    os.mkdir(f"{NEW_ROOT}/program")
    make_read_only(NEW_ROOT, 0)
    os.chdir(NEW_ROOT)
    call_libc("pivot_root", b".", b".")
    call_libc("umount2", b".", MNT_DETACH)


def own_folder(disk: int, inodes: int) -> None:
    """Mount a tmpfs with these limits at /program; the folder itself takes one more inode."""
    options = f"size={disk},nr_inodes={inodes + 1},mode=1777"
    mount("tmpfs", "/program", "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir("/program")


def visible_paths() -> list[str]:
    """`VISIBLE` and the interpreter's folders, without those that lie in another of them."""
    folders = (sys.base_prefix, sys.base_exec_prefix, os.path.dirname(INTERPRETER))
    interpreter = {os.path.realpath(path) for path in folders}
    paths: list[str] = []
    for path in sorted({path for path in VISIBLE if os.path.exists(path)} | interpreter):
        if not any(path.startswith(f"{other}/") for other in paths):
            paths.append(path)
    return paths


def folders_above(path: str) -> list[str]:
    """The folders that an absolute path lies in, outermost first, without the root."""
    parts = path.split("/")[1:-1]
    return ["/" + "/".join(parts[: i + 1]) for i in range(len(parts))]


def make_visible(path: str) -> None:
    """Make a file, folder or link of the host visible at the same path in the new root."""
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
    """Make a mount read-only; `flags`: AT_RECURSIVE for those below it too, or 0."""
    attributes = (ctypes.c_uint64 * 4)(ATTR_RDONLY | ATTR_NOSUID, 0, 0, 0)
    numbers = (ctypes.c_long(SYS_MOUNT_SETATTR), ctypes.c_long(AT_FDCWD))
    size = ctypes.c_long(ctypes.sizeof(attributes))
    call_libc("syscall", *numbers, path.encode(), ctypes.c_long(flags), attributes, size)


def drop_privileges(user: int, processes: int) -> None:
    """Become an unprivileged user without capabilities, in any user namespace."""
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
    call_libc("capset", header, (ctypes.c_uint32 * 6)())


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2); raises OSError."""
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    call_libc("mount", *texts, ctypes.c_ulong(flags), options.encode())


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument; raises OSError."""
    call_libc("prctl", option, *(ctypes.c_ulong(number) for number in (value, 0, 0, 0)))


def call_libc(name: str, *arguments: Any) -> None:
    """Call a function of libc. If it fails, raise OSError with the call as its file name."""
    if getattr(libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        paths = [word.decode() for word in arguments if isinstance(word, bytes) and word]
        raise OSError(number, os.strerror(number), " ".join([name, *paths]))


if __name__ == "__main__":
    main()
