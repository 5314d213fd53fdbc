"""The curl command of the README works as written."""

import json
import re
import subprocess

from tests.conftest import KEY, ROOT


def readme_curl() -> str:
    text = (ROOT / "README.md").read_text()
    block = re.search(r"^    (curl .*?\}')$", text, re.DOTALL | re.MULTILINE)
    assert block is not None, "the README has no curl line"
    return re.sub(r"^    ", "", block[1], flags=re.MULTILINE)


def test_the_curl_command_returns_its_diversity(v1):
    line = (
        readme_curl()
        .replace("http://localhost:8000", v1.url)
        .replace("build/demo/dft/final", "demo")
    )
    line = line.replace("curl ", f"curl --noproxy '*' -H 'Authorization: Bearer {KEY}' ", 1)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["diversity"]["level"] == 0.5
    assert answer["diversity"]["choices"][0]["tokens"] == answer["usage"]["completion_tokens"]
