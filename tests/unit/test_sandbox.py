"""The sandbox, tested with ordinary and with hostile programs.

In namespaces created by bubblewrap, where it is installed, and in our own. Every test also checks
that the machine outside is unchanged.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dftserve.evaluate.accuracy.isolation import cgroups, sandbox, seccomp
from dftserve.evaluate.accuracy.isolation.sandbox import STDERR_BYTES, USERS, Limits
from dftserve.evaluate.accuracy.isolation.sandbox_init import BUBBLEWRAP, OWN
from tests.conftest import PATIENCE
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
SHORT, AMPLE = 1.5, 60.0
"""Seconds: for programs that never end, and for those that must end even on a busy machine."""
QUICK = Limits(seconds=SHORT, memory=128 << 20)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


@pytest.fixture(autouse=True, scope="module")
def _needs_sandbox():
    if (missing := sandbox.available()) is not None:
        assert not may_mount(), missing
        pytest.skip(missing)


@pytest.fixture(params=[OWN, BUBBLEWRAP])
def namespaces(request) -> str:
    """What creates the namespaces."""
    if request.param == BUBBLEWRAP and (missing := sandbox._no_bubblewrap()) is not None:
        pytest.skip(missing)
    return request.param


@pytest.fixture
def _needs_filter():
    if (missing := sandbox._no_filter()) is not None:
        pytest.skip(missing)


def may_mount() -> bool:
    """Whether we have CAP_SYS_ADMIN, with which the sandbox must be available."""
    status = Path("/proc/self/status").read_text()
    return bool(int(status.partition("CapEff:")[2].split()[0], 16) >> 21 & 1)


@pytest.fixture(autouse=True)
def victim(tmp_path, monkeypatch):
    """A process and a file that must be unchanged after each test; no other file may appear."""
    file = tmp_path / "kept"
    file.write_text("as it was")
    monkeypatch.chdir(tmp_path)
    mounts = Path("/proc/self/mounts").read_text()
    process = subprocess.Popen(["sleep", "infinity"])
    yield process
    assert process.poll() is None
    process.kill()
    process.wait()
    assert file.read_text() == "as it was"
    assert Path("/proc/self/mounts").read_text() == mounts
    assert set(os.listdir()) <= {"kept", "sandbox_init.py", "bin"}
    wait_until(lambda: not survivors())
    wait_until(lambda: not groups())


def groups() -> list[Path]:
    """Control groups left behind by our runs."""
    own = f"{cgroups.PREFIX}{os.getpid()}-*"
    return [left for place in cgroups.places().values() for left in place.folder.glob(own)]


def survivors() -> list[str]:
    """Processes of the sandbox's users and of its script. Those of parallel tests end soon."""
    statuses = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
            command = (folder / "cmdline").read_bytes()
        except OSError:  # It has ended since.
            continue
        user = int(status.partition("Uid:")[2].split()[0])
        if user in USERS or b"sandbox_init.py" in command:
            statuses.append(status)
    return statuses


def limits_for(end: str) -> Limits:
    return replace(QUICK, seconds=SHORT if end == "timeout" else AMPLE)


ENDS = {
    "pass": "ok",
    "x = 1\nassert x == 1": "ok",
    "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()": "ok",
    "assert False": "exception",
    "this is no Python": "exception",
    "x = '\\ud800'; x.encode()": "exception",
    "def f(): f()\nf()": "exception",
    "import sys; sys.exit(0)\nassert False": "exception",
    "raise SystemExit": "exception",
    "import os; os._exit(0)\nassert False": "exit",
    "import os; os.write(3, b'a' * 32); os._exit(0)": "exit",
    "import os; os.close(3); assert False": "exception",
    "import subprocess, sys; subprocess.run([sys.executable, '-c', 'pass'], check=True)": "ok",
    "while True: pass": "timeout",
    "import time; time.sleep(60)": "timeout",
    "import signal, time\nfor s in (15, 2, 1, 24): signal.signal(s, signal.SIG_IGN)\n"
    "while True: time.sleep(1)": "timeout",
    "import sys\nwhile True: print('x' * 10_000)": "timeout",
    "x = [0] * 10**9": "memory",
    "x = []\nwhile True: x.append(bytearray(1 << 20))": "memory",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": "killed",
    "import ctypes; ctypes.string_at(0)": "killed",
}


@pytest.mark.parametrize("source", ENDS)
def test_the_end_of_a_program_is_reported(source, namespaces):
    result = sandbox.run(source, limits_for(ENDS[source]), namespaces=namespaces)
    assert (result.passed, result.ended) == (ENDS[source] == "ok", ENDS[source]), result
    assert result.ended in sandbox.ENDS


def test_an_assertion_is_reported():
    assert "AssertionError: 4 is no 5" in sandbox.run("assert 0, '4 is no 5'").stderr


def test_stderr_is_bounded(namespaces):
    source = "import sys\nwhile True: sys.stderr.write('x' * 10_000)"
    result = sandbox.run(source, QUICK, namespaces=namespaces)
    assert not result.passed
    assert len(result.stderr) <= STDERR_BYTES


HOSTILE = {
    "fork bomb": """
import os
made = 0
try:
    while True:
        if os.fork() == 0:
            while True: pass
        made += 1
except BlockingIOError:
    assert made < 16, made
""",
    "fork bomb that spreads": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "kills all it can see": """
import os, signal
try: os.kill(-1, signal.SIGKILL)
except ProcessLookupError: pass
for pid in [1, *range(3, 40_000)]:
    try: os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError): pass
assert os.getpid() == 2
""",
    "writes outside": """
import errno, os
for folder in ('/', '/usr', '/tmp', '/etc', '/root', '/home', '/dev', os.path.dirname(os.__file__)):
    try: open(os.path.join(folder, 'harm'), 'w')
    except OSError as error: assert error.errno in (errno.EROFS, errno.ENOENT), error
    else: assert False, folder
try: open(os.__file__, 'a')
except OSError: pass
else: assert False
open('inside', 'w').write('x')
""",
    "writes too much into one file": """
try:
    with open('big', 'wb') as file:
        for _ in range(64): file.write(bytes(1 << 16))
except OSError: pass
else: assert False
import os
assert os.path.getsize('big') <= 1 << 20
""",
    "writes too many files": """
written = 0
try:
    for n in range(64):
        with open(f'big{n}', 'wb') as file: written += file.write(bytes(1 << 19))
except OSError: pass
assert 0 < written <= 8 << 20, written
""",
    "opens too many": """
files = []
try:
    while True: files.append(open('/dev/null'))
except OSError: pass
assert len(files) < 64
""",
    "reads environments": """
import os
assert set(os.environ) <= {'LC_CTYPE'}, os.environ
for pid in ('self', '1', '2'):
    assert not os.path.exists(f'/proc/{pid}/environ')
""",
    "reads the machine": """
import os
for path in ('/etc/passwd', '/etc/shadow', '/proc', '/sys', '/work', '/home', '/var', '/tmp'):
    assert not os.path.exists(path), path
assert sorted(os.listdir('/dev')) == ['null', 'urandom']
""",
    "becomes someone else": """
import os
for become in (os.setuid, os.setgid, os.seteuid):
    try: become(0)
    except OSError: pass
    else: assert False
assert os.getuid() not in (0, None) and os.geteuid() == os.getuid()
try: os.chroot('.')
except PermissionError: pass
else: assert False
status = __import__('ctypes').CDLL(None).prctl(39, 0, 0, 0, 0)
assert status == 1, 'no_new_privs'
""",
    "has a capability": """
import ctypes
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capget(header, sets) == 0
assert list(sets) == [0] * 6, list(sets)
""",
    "writes too many small files": """
import errno, os
made = 0
try:
    while True:
        os.mkdir(f'{made}')
        made += 1
except OSError as error: assert error.errno == errno.ENOSPC, error
assert 512 <= made <= 1024, made
""",
    "asks for a name": """
import socket
for name in ('example.com', 'localhost.example'):
    try: socket.getaddrinfo(name, 80)
    except OSError: pass
    else: assert False
""",
    "dumps core": "import resource\nassert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)",
    "holds our descriptors": """
import os
for number in range(4, 64):
    try: os.fstat(number)
    except OSError: pass
    else: assert False, number
""",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_does_no_harm(name, namespaces):
    # The spreading bomb never ends by itself; the others check that they failed, and exit normally.
    end = "timeout" if "spreads" in name else "ok"
    result = sandbox.run(HOSTILE[name], limits_for(end), namespaces=namespaces)
    assert result.ended == end, result


# What the filter of system calls forbids

NEW_USER, NEW_NET = 0x10000000, 0x40000000
CALLER = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)

def call(number, *arguments):
    ctypes.set_errno(0)
    words = [ctypes.c_long(each) for each in (number, *arguments)]
    return libc.syscall(*words), ctypes.get_errno()
"""


def numbers(*names: str) -> list[int]:
    machine = os.uname().machine
    return [n for name in names if (n := seccomp.number(name, machine)) is not None]


@pytest.mark.usefixtures("_needs_filter")
def test_forbidden_calls_fail_and_the_program_continues(namespaces):
    source = f"for number in {numbers(*seccomp.FORBIDDEN)}:\n"
    source += "    assert call(number, 0, 0, 0, 0, 0, 0) == (-1, errno.EPERM), number"
    result = sandbox.run(CALLER + source, limits_for("ok"), namespaces=namespaces)
    assert result.ended == "ok", result


@pytest.mark.usefixtures("_needs_filter")
@pytest.mark.parametrize("flags", [NEW_USER, NEW_NET, NEW_USER | NEW_NET])
def test_a_program_cannot_create_namespaces(namespaces, flags):
    clone, clone3, unshare = numbers("clone", "clone3", "unshare")
    source = f"""
assert call({unshare}, {flags}) == (-1, errno.EPERM)
assert call({clone}, {flags | 17}, 0, 0, 0, 0) == (-1, errno.EPERM)
arguments = (ctypes.c_uint64 * 8)({flags})
assert call({clone3}, ctypes.addressof(arguments), 64) == (-1, errno.ENOSYS)
"""
    result = sandbox.run(CALLER + source, limits_for("ok"), namespaces=namespaces)
    assert result.ended == "ok", result


def test_without_the_filter_a_program_can_create_a_namespace(monkeypatch):
    """Otherwise the tests above would prove nothing."""
    (unshare,) = numbers("unshare")
    monkeypatch.setattr(sandbox, "_no_filter", lambda: "for this test")
    result = sandbox.run(CALLER + f"assert call({unshare}, {NEW_USER}) == (0, 0)", namespaces=OWN)
    if not result.passed:
        pytest.skip("this kernel gives unprivileged users no namespace anyway")


@pytest.mark.usefixtures("_needs_filter")
@pytest.mark.parametrize("kind", ["vsock", "packet", "netlink"])
def test_only_unix_and_internet_sockets_can_be_created(namespaces, kind):
    family = {"vsock": 40, "packet": 17, "netlink": 16}[kind]
    source = f"""
import errno, socket
try: socket.socket({family}, socket.SOCK_DGRAM)
except OSError as error: assert error.errno == errno.EAFNOSUPPORT, error
else: assert False
for each in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6): socket.socket(each).close()
a, b = socket.socketpair()
a.send(b'x'); assert b.recv(1) == b'x'
"""
    result = sandbox.run(source, limits_for("ok"), namespaces=namespaces)
    assert result.ended == "ok", result


FOREIGN = {
    "x32": f"{CALLER}\ncall(0x40000000 | 39)",
    "32-bit": """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex('b814000000cd80c3'))  # getpid of i386
start = ctypes.addressof(ctypes.c_char.from_buffer(page))
ctypes.CFUNCTYPE(ctypes.c_int)(start)()
""",
}


@pytest.mark.usefixtures("_needs_filter")
@pytest.mark.parametrize("kind", FOREIGN)
def test_calls_of_another_abi_kill_the_program(namespaces, kind):
    if os.uname().machine != "x86_64":
        pytest.skip("x86_64 has them")
    assert sandbox.run(FOREIGN[kind], limits_for("killed"), namespaces=namespaces).ended == "killed"


def test_a_missing_filter_is_described_and_shared_memory_is_still_refused(monkeypatch):
    """As on a machine whose calls are not known: a limit of the namespace applies instead."""
    (shmget,) = numbers("shmget")
    source = f"assert call({shmget}, 0, 1 << 20, 0o1600) == (-1, errno.ENOSPC)"
    monkeypatch.setattr(seccomp, "AUDIT", {"other": 1})
    for each in (sandbox._no_filter, sandbox._no_bubblewrap):
        each.cache_clear()
    try:
        assert "no filter of calls (the calls of" in sandbox.described()
        result = sandbox.run(CALLER + source, limits_for("ok"))
    finally:
        for each in (sandbox._no_filter, sandbox._no_bubblewrap):
            each.cache_clear()
    assert result.ended == "ok", result


# Limits of a control group

SEVEN_PROCESSES = """
import os, time
held, killed, ready = bytearray(b'x') * (100 << 20), 0, 0
reader, writer = os.pipe()
os.set_blocking(reader, False)
for _ in range(6):
    if os.fork() == 0:
        held = bytearray(b'y') * (100 << 20)
        os.write(writer, b'.')
        while True: time.sleep(60)
while killed + ready < 6:
    time.sleep(.01)
    try: ready += len(os.read(reader, 6))
    except BlockingIOError: pass
    killed += os.waitpid(-1, os.WNOHANG)[0] != 0
"""


@pytest.fixture
def _needs_cgroups():
    if not cgroups.places():
        pytest.skip(cgroups.described())


@pytest.mark.usefixtures("_needs_cgroups")
def test_memory_is_counted_over_all_processes(namespaces):
    """Seven processes of 100 MB each, all within their own limit, exceed the group's."""
    source = f"{SEVEN_PROCESSES}\nassert not killed, 'some of them were'"
    limits = replace(QUICK, seconds=AMPLE, memory=256 << 20, processes=16)
    result = sandbox.run(source, limits, namespaces=namespaces)
    assert result.ended == "memory", result


def test_without_the_group_the_same_processes_all_run(monkeypatch):
    monkeypatch.setattr(cgroups, "places", dict)
    limits = replace(QUICK, seconds=AMPLE, memory=256 << 20, processes=16)
    assert sandbox.run(f"{SEVEN_PROCESSES}\nassert ready == 6", limits).ended == "ok"


@pytest.mark.usefixtures("_needs_cgroups")
def test_a_single_process_can_use_all_of_its_memory(namespaces):
    """It reaches its own limit, a MemoryError, before the group's."""
    source = "x = []\ntry:\n  while True: x.append(bytearray(b'x') * (1 << 20))\n"
    source += "except MemoryError: n = len(x); x.clear(); assert n > 90, n\nelse: assert False\n"
    source += "open('full', 'wb').write(b'x' * (1 << 20))"
    result = sandbox.run(source, limits_for("ok"), namespaces=namespaces)
    assert result.ended == "ok", result


@pytest.mark.usefixtures("_needs_cgroups")
def test_a_group_left_by_a_killed_run_is_removed_by_the_next():
    ended = subprocess.Popen(["true"])
    ended.wait()
    name = f"{cgroups.PREFIX}{ended.pid}-left"
    folders = [place.folder / name for place in cgroups.places().values()]
    for folder in dict.fromkeys(folders):
        folder.mkdir()
    assert sandbox.run("pass").passed
    assert not any(folder.exists() for folder in folders)


def test_the_available_protection_is_described():
    description = sandbox.described()
    assert description.startswith("bubblewrap;") == (sandbox._no_bubblewrap() is None)
    assert ("system calls filtered" in description) == (sandbox._no_filter() is None)
    assert ("counted together" in description) == bool(cgroups.places())


# The machine outside


def test_the_callers_environment_and_process_are_not_visible(monkeypatch, namespaces):
    monkeypatch.setenv("SECRET", "s3cret")
    source = "import os\nassert 's3cret' not in str(os.environ)\n"
    source += f"assert not os.path.exists('/proc/{os.getpid()}')\n"
    source += f"try: os.kill({os.getpid()}, 0)\nexcept ProcessLookupError: pass\nelse: assert False"
    assert sandbox.run(source, namespaces=namespaces).ended == "ok"


def test_a_process_outside_cannot_be_killed(victim, namespaces):
    source = f"import os\ntry: os.kill({victim.pid}, 9)\nexcept ProcessLookupError: pass\n"
    assert sandbox.run(source + "else: assert False", namespaces=namespaces).ended == "ok"


@pytest.mark.parametrize("kind", ["tcp", "abstract"])
def test_servers_outside_cannot_be_reached(kind, namespaces):
    family = socket.AF_INET if kind == "tcp" else socket.AF_UNIX
    with socket.socket(family) as server:
        server.bind(("127.0.0.1", 0) if kind == "tcp" else f"\0dftserve-{os.getpid()}")
        server.listen()
        server.settimeout(0.2)
        address = server.getsockname()
        call = f"import socket\nsocket.socket({int(family)}).connect({address!r})"
        with socket.socket(family) as reachable:
            reachable.connect(address)  # Otherwise the test would prove nothing.
            server.accept()[0].close()
        result = sandbox.run(call, limits_for("exception"), namespaces=namespaces)
        assert result.ended == "exception", result
        assert "OSError" in result.stderr or "ConnectionRefused" in result.stderr
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_daemon_is_killed_at_the_end(namespaces):
    source = """
import os, signal, time
if os.fork() == 0:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
    if os.fork() == 0:
        while True: time.sleep(60)
    os._exit(0)
time.sleep(.3)
"""
    assert sandbox.run(source, namespaces=namespaces).ended == "ok"
    wait_until(lambda: not survivors())


def programs() -> list[str]:
    return [
        status
        for status in survivors()
        if int(status.partition("NSpid:")[2].splitlines()[0].split()[-1]) == 2
    ]


def test_killing_the_caller_ends_all_processes(namespaces):
    """The next run removes its control group."""
    code = "from dftserve.evaluate.accuracy.isolation import sandbox\n"
    # Longer than we wait: their own limit must not be what ends them.
    code += f"limits = sandbox.Limits(seconds={2 * PATIENCE})\n"
    code += f"sandbox.run('while True: pass', limits, namespaces={namespaces!r})"
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        wait_until(lambda: bool(programs()))
    finally:
        caller.kill()
        caller.wait()
    wait_until(lambda: not programs())
    assert sandbox.run("pass").passed
    pattern = f"{cgroups.PREFIX}{caller.pid}-*"
    assert not any(list(place.folder.glob(pattern)) for place in cgroups.places().values())


def test_the_sandbox_works_for_an_unprivileged_user(namespaces):
    """In a user namespace: programs end the same, and hostile ones do no harm."""
    python = python_for_nobody()
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1])\n"
        "from dftserve.evaluate.accuracy.isolation import sandbox\n"
        "if missing := sandbox.available(): sys.exit(json.dumps(missing))\n"
        "asked = {s: sandbox.Limits(**limits) for s, limits in json.load(sys.stdin)}\n"
        f"run = lambda s, limits: sandbox.run(s, limits, namespaces={namespaces!r}).ended\n"
        "ended = {s: run(s, limits) for s, limits in asked.items()}\n"
        "print(json.dumps(ended))"
    )
    expected = ENDS | dict.fromkeys(HOSTILE.values(), "ok")
    expected[HOSTILE["fork bomb that spreads"]] = "timeout"
    done = subprocess.run(
        [*python, "-c", code, str(ROOT)],
        input=json.dumps([(source, vars(limits_for(end))) for source, end in expected.items()]),
        capture_output=True,
        text=True,
        check=False,
        env={},
    )
    if done.returncode and "sandbox: unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def python_for_nobody() -> list[str]:
    if os.geteuid() != 0:
        return [sys.executable]
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("no setpriv to become someone else with")
    become = [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups"]
    check = (
        "import os, sys; from dftserve.evaluate.accuracy.isolation import sandbox_init\n"
        "sys.exit(sys.version_info < (3, 11) or not os.access(sandbox_init.INTERPRETER, os.X_OK))"
    )
    for python in (sys.executable, "/usr/bin/python3"):
        command = [*become, python, "-c", check]
        if subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0:
            return [*become, python]
    pytest.skip("no Python that an unprivileged user may run")


def test_without_namespaces_nothing_is_run(monkeypatch, tmp_path):
    """Where unshare fails, the error names the option that helps."""
    original = sandbox.CONFINE.read_text()
    refusing = original.replace('call_libc("unshare", flags', 'call_libc("unshare", -1')
    assert refusing != original
    monkeypatch.setattr(sandbox, "CONFINE", tmp_path / "sandbox_init.py")
    sandbox.CONFINE.write_text(refusing)
    with pytest.raises(RuntimeError, match=r"unshare: .*--unsafe-no-sandbox"):
        sandbox.run("pass", namespaces=OWN)
    assert sandbox.run("pass", unsafe=True).passed


def test_a_broken_bubblewrap_is_described_and_our_namespaces_are_used(monkeypatch, tmp_path):
    broken = tmp_path / "bin" / "bwrap"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho 'bwrap: no namespaces for you' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(broken.parent), prepend=os.pathsep)
    sandbox._no_bubblewrap.cache_clear()
    try:
        assert "bwrap: no namespaces for you" in sandbox.described()
        assert sandbox.run("pass").passed
    finally:
        sandbox._no_bubblewrap.cache_clear()


@pytest.mark.parametrize("source", ENDS)
def test_programs_end_the_same_without_the_sandbox(source):
    result = sandbox.run(source, limits_for(ENDS[source]), unsafe=True)
    assert (result.passed, result.ended) == (ENDS[source] == "ok", ENDS[source]), result


def test_without_the_sandbox_the_process_group_is_killed():
    source = "import os, time\nos.fork()\ntime.sleep(60)"
    assert sandbox.run(source, QUICK, unsafe=True).ended == "timeout"


def test_concurrent_runs():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        sources = [f"assert {n} % 3" for n in range(12)]
        passed = [result.passed for result in pool.map(sandbox.run, sources)]
    assert passed == [n % 3 != 0 for n in range(12)]
