"""The filter of system calls, run by a small interpreter for both architectures."""

import errno
import re
import struct
from pathlib import Path

import pytest

from dftserve.evaluate.accuracy.isolation import seccomp
from dftserve.evaluate.accuracy.isolation.seccomp import ALLOW, AUDIT, CALLS, ERRNO, FORBIDDEN, KILL

NEW_USER = 0x10000000
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


def answer(machine: str, call: int, *arguments: int, audit: int | None = None) -> int:
    """What the filter of a machine returns for a call."""
    words = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", call, audit or AUDIT[machine], 0, *words)
    code = seccomp.program(machine)
    assert code is not None
    steps = list(struct.iter_unpack("<HBBI", code))
    at, loaded = 0, 0
    while True:
        kind, where_so, where_not, constant = steps[at]
        at += 1
        if kind == seccomp.RETURN:
            return constant
        if kind == seccomp.LOAD:
            (loaded,) = struct.unpack_from("<I", data, constant)
            continue
        holds = {
            seccomp.EQUAL: loaded == constant,
            seccomp.ABOVE: loaded > constant,
            seccomp.AT_LEAST: loaded >= constant,
            seccomp.ANY_BIT: bool(loaded & constant),
        }[kind]
        at += where_so if holds else where_not


def call_of(machine: str, name: str) -> int:
    number = seccomp.number(name, machine)
    assert number is not None
    return number


@pytest.mark.parametrize("machine", AUDIT)
def test_every_forbidden_call_fails(machine):
    calls = [call for name in FORBIDDEN if (call := seccomp.number(name, machine)) is not None]
    assert len(calls) > 60
    assert {answer(machine, call) for call in calls} == {ERRNO | errno.EPERM}


@pytest.mark.parametrize("machine", AUDIT)
def test_every_other_known_call_passes(machine):
    named = {seccomp.number(name, machine) for name in (*FORBIDDEN, *CALLS)}
    others = [call for call in range(seccomp.NEWEST + 1) if call not in named]
    assert len(others) > 300
    assert {answer(machine, call) for call in others} == {ALLOW}


@pytest.mark.parametrize("machine", AUDIT)
def test_newer_calls_fail_as_unknown(machine):
    for call in (seccomp.NEWEST + 1, 500, 0x3FFFFFFF):
        assert answer(machine, call) == ERRNO | errno.ENOSYS


@pytest.mark.parametrize("machine", AUDIT)
def test_calls_of_another_architecture_kill(machine):
    for audit in (0x40000003, 0x40000028, *(each for each in AUDIT.values())):
        expected = ALLOW if audit == AUDIT[machine] else KILL
        assert answer(machine, 20, audit=audit) == expected


def test_x32_kills():
    assert answer("x86_64", seccomp.X32 | 39) == KILL
    assert answer("x86_64", 0xFFFFFFFF) == KILL


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("clone", (0x11,), ALLOW),
        ("clone", (0x3D0F00,), ALLOW),  # A thread of glibc's.
        ("clone", (NEW_USER | 0x11,), ERRNO | errno.EPERM),
        ("clone", (0x20000,), ERRNO | errno.EPERM),
        ("clone3", (), ERRNO | errno.ENOSYS),
        ("socket", (1,), ALLOW),
        ("socket", (2,), ALLOW),
        ("socket", (10,), ALLOW),
        ("socket", (40,), ERRNO | errno.EAFNOSUPPORT),  # vsock
        ("socket", (38,), ERRNO | errno.EAFNOSUPPORT),  # the kernel's ciphers
        ("socketpair", (1,), ALLOW),
        ("socketpair", (30,), ERRNO | errno.EAFNOSUPPORT),
        ("ioctl", (0, 0x5401), ALLOW),
        ("ioctl", (0, 0x5412), ERRNO | errno.EPERM),
        ("ioctl", (0, 0x5412 | 1 << 32), ERRNO | errno.EPERM),  # The kernel drops the high half.
        ("fcntl", (0, 3), ALLOW),
        ("fcntl", (0, 6), ERRNO | errno.ENOLCK),
    ],
)
@pytest.mark.parametrize("machine", AUDIT)
def test_some_calls_are_filtered_by_their_arguments(machine, name, arguments, expected):
    assert answer(machine, call_of(machine, name), *arguments) == expected


@pytest.mark.parametrize("machine", AUDIT)
def test_the_call_numbers_are_those_of_the_kernel_headers(machine):
    header = HEADERS[machine]
    if not header.is_file():
        pytest.skip(f"no {header}: the kernel's headers are not installed")
    define = re.compile(r"#define __NR(?:3264)?_(\w+)\s+(\d+)")
    numbers = {name: int(number) for name, number in define.findall(header.read_text())}
    ours = {name: seccomp.number(name, machine) for name in (*FORBIDDEN, *CALLS)}
    missing = {"memfd_secret"}  # The general header has it only where an architecture requires it.
    wrong = {n: c for n, c in ours.items() if numbers.get(n) != c and n not in missing}
    assert wrong == {}


def test_no_filter_exceeds_the_kernels_limit():
    for machine in AUDIT:
        assert len(seccomp.program(machine) or b"") <= 8 * 4096


@pytest.mark.parametrize("machine", ["riscv64", "i686", "armv7l", ""])
def test_a_machine_whose_calls_are_not_known_has_no_filter(machine):
    assert seccomp.program(machine) is None
