"""Programs that a model might write, and that an enemy would: what they do, and what they cannot.

In namespaces that bubblewrap made, where it is installed, and in our own. Every test also checks
that the machine outside is as it was.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dftserve.evaluate.accuracy.isolation import cgroups, sandbox, seccomp
from dftserve.evaluate.accuracy.isolation.sandbox import STDERR_BYTES, USERS, Limits
from dftserve.evaluate.accuracy.isolation.sandbox_init import BUBBLEWRAP, OWN

ROOT = Path(__file__).resolve().parent.parent.parent
SHORT, AMPLE = 1.5, 60.0
"""Seconds, for what has no end, and for what has one on however busy a machine."""
QUICK = Limits(seconds=SHORT, memory=128 << 20)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


@pytest.fixture(autouse=True, scope="module")
def _here():
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
def _filtered():
    if (missing := sandbox._no_filter()) is not None:
        pytest.skip(missing)


def may_mount() -> bool:
    """Whether we have CAP_SYS_ADMIN, with which the sandbox can be had."""
    status = Path("/proc/self/status").read_text()
    return bool(int(status.partition("CapEff:")[2].split()[0], 16) >> 21 & 1)


@pytest.fixture(autouse=True)
def victim(tmp_path, monkeypatch):
    """A process and a file that must be as they were after each test, and nothing beside them."""
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    monkeypatch.chdir(tmp_path)
    mounts = Path("/proc/self/mounts").read_text()
    process = subprocess.Popen(["sleep", "60"])
    yield process
    assert process.poll() is None
    process.kill()
    process.wait()
    assert kept.read_text() == "as it was"
    assert Path("/proc/self/mounts").read_text() == mounts
    assert set(os.listdir()) <= {"kept", "sandbox_init.py", "bin"}
    waited(lambda: not survivors())
    waited(lambda: not groups())


def groups() -> list[Path]:
    """Control groups that runs of ours left behind."""
    own = f"{cgroups.PREFIX}{os.getpid()}-*"
    return [left for place in cgroups.places().values() for left in place.folder.glob(own)]


def survivors() -> list[str]:
    """Processes of the sandbox's users, and of its script. Those of neighbours end soon."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
            command = (folder / "cmdline").read_bytes()
        except OSError:  # It has ended since.
            continue
        user = int(status.partition("Uid:")[2].split()[0])
        if user in USERS or b"sandbox_init.py" in command:
            found.append(status)
    return found


def limits_for(end: str) -> Limits:
    return replace(QUICK, seconds=SHORT if end == "timeout" else AMPLE)


def waited(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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
def test_how_a_program_ends(source, namespaces):
    result = sandbox.run(source, limits_for(ENDS[source]), namespaces=namespaces)
    assert (result.passed, result.ended) == (ENDS[source] == "ok", ENDS[source]), result
    assert result.ended in sandbox.ENDS


def test_an_assertion_is_reported():
    assert "AssertionError: 4 is no 5" in sandbox.run("assert 0, '4 is no 5'").stderr


def test_what_a_program_says_is_bounded(namespaces):
    source = "import sys\nwhile True: sys.stderr.write('x' * 10_000)"
    result = sandbox.run(source, QUICK, namespaces=namespaces)
    assert not result.passed
    assert len(result.stderr) <= STDERR_BYTES


HARMLESS = {
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


@pytest.mark.parametrize("name", HARMLESS)
def test_an_enemy_does_no_harm(name, namespaces):
    # A bomb that spreads has no end of its own; every other checks its failure and ends well.
    end = "timeout" if "spreads" in name else "ok"
    result = sandbox.run(HARMLESS[name], limits_for(end), namespaces=namespaces)
    assert result.ended == end, result


# What a filter of system calls forbids

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


@pytest.mark.usefixtures("_filtered")
def test_forbidden_calls_fail_and_the_program_goes_on(namespaces):
    source = f"for number in {numbers(*seccomp.FORBIDDEN)}:\n"
    source += "    assert call(number, 0, 0, 0, 0, 0, 0) == (-1, errno.EPERM), number"
    result = sandbox.run(CALLER + source, limits_for("ok"), namespaces=namespaces)
    assert result.ended == "ok", result


@pytest.mark.usefixtures("_filtered")
@pytest.mark.parametrize("flags", [NEW_USER, NEW_NET, NEW_USER | NEW_NET])
def test_no_namespace_in_the_namespace(namespaces, flags):
    clone, clone3, unshare = numbers("clone", "clone3", "unshare")
    source = f"""
assert call({unshare}, {flags}) == (-1, errno.EPERM)
assert call({clone}, {flags | 17}, 0, 0, 0, 0) == (-1, errno.EPERM)
arguments = (ctypes.c_uint64 * 8)({flags})
assert call({clone3}, ctypes.addressof(arguments), 64) == (-1, errno.ENOSYS)
"""
    result = sandbox.run(CALLER + source, limits_for("ok"), namespaces=namespaces)
    assert result.ended == "ok", result


def test_a_namespace_could_be_had_without_the_filter(monkeypatch):
    """Or the tests above would show nothing."""
    (unshare,) = numbers("unshare")
    monkeypatch.setattr(sandbox, "_no_filter", lambda: "for this test")
    result = sandbox.run(CALLER + f"assert call({unshare}, {NEW_USER}) == (0, 0)", namespaces=OWN)
    if not result.passed:
        pytest.skip("this kernel gives unprivileged users no namespace anyway")


@pytest.mark.usefixtures("_filtered")
@pytest.mark.parametrize("kind", ["vsock", "packet", "netlink"])
def test_sockets_that_know_no_network_namespace(namespaces, kind):
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


@pytest.mark.usefixtures("_filtered")
@pytest.mark.parametrize("kind", FOREIGN)
def test_calls_of_another_numbering_kill(namespaces, kind):
    if os.uname().machine != "x86_64":
        pytest.skip("x86_64 has them")
    assert sandbox.run(FOREIGN[kind], limits_for("killed"), namespaces=namespaces).ended == "killed"


def test_without_a_filter_it_is_said_and_shared_memory_has_none(monkeypatch):
    """As on a machine whose calls are not known: a bound of the namespace stands in."""
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


# What a control group counts

TOGETHER = """
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
def _counted():
    if not cgroups.places():
        pytest.skip(cgroups.described())


@pytest.mark.usefixtures("_counted")
def test_memory_is_counted_together(namespaces):
    """Seven processes of 100 MB each, every one within its own limit, cannot be at once."""
    source = f"{TOGETHER}\nassert not killed, 'some of them were'"
    limits = replace(QUICK, seconds=AMPLE, memory=256 << 20, processes=16)
    result = sandbox.run(source, limits, namespaces=namespaces)
    assert result.ended == "memory", result


def test_so_many_processes_could_be_without_the_group(monkeypatch):
    monkeypatch.setattr(cgroups, "places", dict)
    limits = replace(QUICK, seconds=AMPLE, memory=256 << 20, processes=16)
    assert sandbox.run(f"{TOGETHER}\nassert ready == 6", limits).ended == "ok"


@pytest.mark.usefixtures("_counted")
def test_a_program_alone_has_all_of_its_memory(namespaces):
    """The group's bound is not met by what one process may have: it is a MemoryError as before."""
    source = "x = []\ntry:\n  while True: x.append(bytearray(b'x') * (1 << 20))\n"
    source += "except MemoryError: n = len(x); x.clear(); assert n > 90, n\nelse: assert False\n"
    source += "open('full', 'wb').write(b'x' * (1 << 20))"
    result = sandbox.run(source, limits_for("ok"), namespaces=namespaces)
    assert result.ended == "ok", result


@pytest.mark.usefixtures("_counted")
def test_a_group_that_a_kill_left_is_removed_by_the_next():
    ended = subprocess.Popen(["true"])
    ended.wait()
    name = f"{cgroups.PREFIX}{ended.pid}-left"
    left = [place.folder / name for place in cgroups.places().values()]
    for folder in dict.fromkeys(left):
        folder.mkdir()
    assert sandbox.run("pass").passed
    assert not any(folder.exists() for folder in left)


def test_what_is_to_be_had_is_described():
    told = sandbox.described()
    assert told.startswith("bubblewrap;") == (sandbox._no_bubblewrap() is None)
    assert ("system calls filtered" in told) == (sandbox._no_filter() is None)
    assert ("counted together" in told) == bool(cgroups.places())


# The machine around it


def test_our_environment_is_not_theirs(monkeypatch, namespaces):
    monkeypatch.setenv("SECRET", "s3cret")
    source = "import os\nassert 's3cret' not in str(os.environ)\n"
    source += f"assert not os.path.exists('/proc/{os.getpid()}')\n"
    source += f"try: os.kill({os.getpid()}, 0)\nexcept ProcessLookupError: pass\nelse: assert False"
    assert sandbox.run(source, namespaces=namespaces).ended == "ok"


def test_a_given_process_cannot_be_killed(victim, namespaces):
    source = f"import os\ntry: os.kill({victim.pid}, 9)\nexcept ProcessLookupError: pass\n"
    assert sandbox.run(source + "else: assert False", namespaces=namespaces).ended == "ok"


@pytest.mark.parametrize("kind", ["tcp", "abstract"])
def test_our_servers_are_out_of_reach(kind, namespaces):
    family = socket.AF_INET if kind == "tcp" else socket.AF_UNIX
    with socket.socket(family) as server:
        server.bind(("127.0.0.1", 0) if kind == "tcp" else f"\0dftserve-{os.getpid()}")
        server.listen()
        server.settimeout(0.2)
        address = server.getsockname()
        call = f"import socket\nsocket.socket({int(family)}).connect({address!r})"
        with socket.socket(family) as reachable:
            reachable.connect(address)  # Or the test would show nothing.
            server.accept()[0].close()
        result = sandbox.run(call, limits_for("exception"), namespaces=namespaces)
        assert result.ended == "exception", result
        assert "OSError" in result.stderr or "ConnectionRefused" in result.stderr
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_daemon_is_gone_afterwards(namespaces):
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
    waited(lambda: not survivors())


def programs() -> list[str]:
    return [
        status
        for status in survivors()
        if int(status.partition("NSpid:")[2].splitlines()[0].split()[-1]) == 2
    ]


def test_all_processes_end_with_us(namespaces):
    """The caller is killed: nothing of the sandbox lives on, and the next run clears its group."""
    code = "from dftserve.evaluate.accuracy.isolation import sandbox\n"
    code += "limits = sandbox.Limits(seconds=60)\n"
    code += f"sandbox.run('while True: pass', limits, namespaces={namespaces!r})"
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        waited(lambda: bool(programs()))
    finally:
        caller.kill()
        caller.wait()
    waited(lambda: not programs())
    assert sandbox.run("pass").passed
    left = f"{cgroups.PREFIX}{caller.pid}-*"
    assert not any(list(place.folder.glob(left)) for place in cgroups.places().values())


def test_an_unprivileged_user_has_a_sandbox_too(namespaces):
    """By a user namespace: the same ends, and the same enemies without harm."""
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
    wanted = ENDS | dict.fromkeys(HARMLESS.values(), "ok")
    wanted[HARMLESS["fork bomb that spreads"]] = "timeout"
    done = subprocess.run(
        [*python, "-c", code, str(ROOT)],
        input=json.dumps([(source, vars(limits_for(end))) for source, end in wanted.items()]),
        capture_output=True,
        text=True,
        check=False,
        env={},
    )
    if done.returncode and "sandbox: unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == wanted


def python_for_nobody() -> list[str]:
    if os.geteuid() != 0:
        return [sys.executable]
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("no setpriv to become someone else with")
    become = [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups"]
    asks = (
        "import os, sys; from dftserve.evaluate.accuracy.isolation import sandbox_init\n"
        "sys.exit(sys.version_info < (3, 11) or not os.access(sandbox_init.INTERPRETER, os.X_OK))"
    )
    for python in (sys.executable, "/usr/bin/python3"):
        command = [*become, python, "-c", asks]
        if subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0:
            return [*become, python]
    pytest.skip("no Python that an unprivileged user may run")


def test_without_namespaces_it_refuses(monkeypatch, tmp_path):
    """Where unshare fails nothing is run, and the error says what helps."""
    original = sandbox.CONFINE.read_text()
    refusing = original.replace('call_libc("unshare", flags', 'call_libc("unshare", -1')
    assert refusing != original
    monkeypatch.setattr(sandbox, "CONFINE", tmp_path / "sandbox_init.py")
    sandbox.CONFINE.write_text(refusing)
    with pytest.raises(RuntimeError, match=r"unshare: .*--unsafe-no-sandbox"):
        sandbox.run("pass", namespaces=OWN)
    assert sandbox.run("pass", unsafe=True).passed


def test_a_bubblewrap_that_does_not_work_is_said_and_ours_is_taken(monkeypatch, tmp_path):
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
def test_without_the_sandbox_the_ends_are_the_same(source):
    result = sandbox.run(source, limits_for(ENDS[source]), unsafe=True)
    assert (result.passed, result.ended) == (ENDS[source] == "ok", ENDS[source]), result


def test_without_the_sandbox_the_group_is_killed():
    source = "import os, time\nos.fork()\ntime.sleep(60)"
    assert sandbox.run(source, QUICK, unsafe=True).ended == "timeout"


def test_some_at_once():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        sources = [f"assert {n} % 3" for n in range(12)]
        passed = [result.passed for result in pool.map(sandbox.run, sources)]
    assert passed == [n % 3 != 0 for n in range(12)]
