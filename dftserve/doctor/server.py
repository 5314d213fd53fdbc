"""Reads a running server's capabilities, and diagnoses a server that has none."""

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import BadStatusLine, HTTPException
from typing import Any
from urllib.parse import urlsplit

import dftserve
from dftserve.doctor.findings import Finding, error, ok, warning
from dftserve.doctor.packages import PLUGIN
from dftserve.serve import root_of

ROUTE = "/v1/dft/capabilities"
ANSWER_SECONDS = 10.0
"""How long the server may take to answer about itself; it computes nothing for it."""
LARGEST_ANSWER = 1 << 20
"""Maximum number of bytes that are read of an answer."""


def ask(url: str, api_key: str | None = None) -> list[Finding]:
    """Findings from a running server's capabilities; `url` with or without /v1.

    Raises:
        ValueError: not an http or https address.
    """
    return capabilities_of(url, api_key)[0]


def capabilities_of(
    url: str, api_key: str | None = None
) -> tuple[list[Finding], dict[str, Any] | None]:
    """As `ask`, and the capabilities themselves; None if it has none of ours."""
    base = root_of(url)
    try:
        answer = _get(base + ROUTE, api_key)
    except (OSError, HTTPException) as problem:
        return [error("server", _unreachable(base, problem))], None
    if answer.status != 200:
        return [error("server", _refused(base, answer, has_key=api_key is not None))], None
    content = answer.content()
    if not isinstance(content, dict) or "active" not in content:
        return [error("server", _foreign(base, answer))], None
    return list(_capabilities(content)), content


# HTTP


@dataclass(frozen=True)
class _Answer:
    status: int
    media_type: str
    location: str | None
    body: bytes

    def content(self) -> Any:
        """The body as JSON; None if it is not JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would send the key to another address."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        return None


def _get(address: str, api_key: str | None = None) -> _Answer:
    """The answer, whatever its status."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(address, headers=headers)
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        return _read(opener.open(request, timeout=ANSWER_SECONDS))
    except urllib.error.HTTPError as refusal:
        return _read(refusal)


def _read(response: Any) -> _Answer:
    with response:
        headers = response.headers
        return _Answer(
            response.status,
            headers.get_content_type(),
            headers.get("Location"),
            response.read(LARGEST_ANSWER),
        )


def _vllm_version(base: str) -> str | None:
    """The version that vLLM reports to anybody; requested without the key."""
    try:
        answer = _get(f"{base}/version")
    except (OSError, HTTPException):
        return None
    content = answer.content()
    version = content.get("version") if isinstance(content, dict) else None
    return version if answer.status == 200 and isinstance(version, str) else None


# Answers of servers without the plug-in


def _unreachable(base: str, problem: OSError | HTTPException) -> str:
    why = getattr(problem, "reason", problem)
    _, _, place = base.partition("://")
    if isinstance(why, ssl.SSLCertVerificationError):
        return (
            f"{base} has a certificate that is not trusted here ({why.verify_message}); set "
            "SSL_CERT_FILE to the certificate file of an authority to trust."
        )
    if isinstance(why, ssl.SSLError):
        return f"{base} does not speak TLS: try http://{place}."
    if base.startswith("http:") and isinstance(why, BadStatusLine | ConnectionResetError):
        return f"{base} does not answer in HTTP: try https://{place}."
    return f"{base}{ROUTE} cannot be reached: {why}. Is the server up?"


def _refused(base: str, answer: _Answer, *, has_key: bool) -> str:
    route = base + ROUTE
    if answer.status == 404:
        return _not_found(base)
    if answer.status in (401, 403) and has_key:
        return f"{route} answers {answer.status}: the key that was sent is not that server's."
    if answer.status in (401, 403):
        cure = "give the variable with the server's key, --api-key-env NAME"
        return f"{route} answers {answer.status}: {cure}."
    if answer.status == 400 and base.startswith("http:") and b"HTTPS" in answer.body:
        return f"{base} expects TLS: try https://{base.partition('://')[2]}."
    if answer.location:
        return (
            f"{route} answers {answer.status}: it has moved to {answer.location}; use that address."
        )
    return f"{route} answers {answer.status}: see that server's log."


def _not_found(base: str) -> str:
    if version := _vllm_version(base):
        return (
            f"the plug-in is not active there: vLLM {version} answers, but not {base}{ROUTE}. "
            f"In that server's environment {PLUGIN} is not installed (pip install {PLUGIN}), or "
            "DFTSERVE_DISABLE is set, or VLLM_PLUGINS leaves dftserve out: run dftserve doctor "
            "there to see which. Then restart the server."
        )
    parts = urlsplit(base)
    origin = f"{parts.scheme}://{parts.netloc}"
    if base != origin and (version := _vllm_version(origin)):
        return f"that server, vLLM {version}, has nothing at {parts.path}: use --url {origin}"
    return (
        f"{base}{ROUTE} is not found, and {base}/version is not vLLM's: is it another web server, "
        "or is vLLM behind another path?"
    )


def _foreign(base: str, answer: _Answer) -> str:
    what = "JSON, but not dftserve's" if answer.content() is not None else answer.media_type
    return (
        f"{base}{ROUTE} does not answer as dftserve does (it sends {what}): is this the address "
        "of a vLLM server?"
    )


# Answers of the plug-in


def _capabilities(answer: dict[str, Any]) -> Iterator[Finding]:
    yield _server(answer)
    if answer["active"]:
        yield ok("server plug-in", "active.")
    else:
        yield error("server plug-in", f"not active: {answer.get('reason')}")
    yield _default(answer)
    yield from _styles(answer)
    if not answer.get("answers"):
        yield warning("server answers", "without header and statistics.")
    yield _faults(answer)


def _server(answer: dict[str, Any]) -> Finding:
    theirs, ours = answer.get("dftserve"), dftserve.__version__
    text = f"dftserve {theirs} on vLLM {answer.get('vllm')}, runner {answer.get('runner')}"
    if method := answer.get("speculative_decoding"):
        text += f", speculative decoding {method}"
    if theirs != ours:
        return warning("server", f"{text}; here dftserve {ours}.")
    return ok("server", f"{text}.")


def _default(answer: dict[str, Any]) -> Finding:
    default = answer.get("default")
    if not default:
        return ok("server default", "off unless a request asks.")
    shown = json.dumps(default)
    refused = answer.get("default_refused")
    if answer["active"] and not refused:
        return ok("server default", shown)
    why = refused or "this engine cannot honour it"
    return warning("server default", f"{shown} is set but not applied: {why}.")


def _styles(answer: dict[str, Any]) -> Iterator[Finding]:
    if reason := answer.get("styles_unavailable"):
        yield warning("server styles", f"none: {reason}.")
    elif names := answer.get("styles"):
        yield ok("server styles", ", ".join(names))
    for name, reason in (answer.get("styles_refused") or {}).items():
        yield warning(f"server style {name}", f"refused: {reason}")


def _faults(answer: dict[str, Any]) -> Finding:
    faults, nan_rows = answer.get("faults"), answer.get("nan_rows")
    if faults or nan_rows:
        text = f"{faults} steps and {nan_rows} NaN rows were left unchanged: see its log."
        return warning("server faults", text)
    return ok("server faults", "none.")
