"""`llm -m MODEL -o diversity 0.5` for a vLLM server with dftserve.

The models are listed in `dftserve-models.yaml` in LLM's folder, in the format of LLM's
extra-openai-models.yaml: model_id, model_name, api_base, api_key_name, headers, aliases.
"""

import contextlib
import copy
import json
from collections.abc import Iterable, Iterator
from typing import Any

import click
import llm
import yaml
from llm.default_plugins.openai_models import Chat


class DiverseChat(Chat):
    """LLM's own chat model, with one more option."""

    key_env_var = None  # Not OPENAI_API_KEY: that key is for another server.
    _diversity: Any = None
    """The `diversity` object of a streamed answer."""

    class Options(Chat.Options):
        diversity: str | float | dict | None = None
        """A number from 0 to 1, or the object; from the command line, its JSON text."""

    def execute(self, prompt, stream, response, *more: Any, **named: Any) -> Iterator[Any]:
        one = copy.copy(self)  # `_diversity` belongs to a single request.
        yield from Chat.execute(one, prompt, stream, response, *more, **named)
        if one._diversity is not None:
            response.response_json["diversity"] = one._diversity

    def build_kwargs(self, prompt, stream) -> dict[str, Any]:
        kwargs = super().build_kwargs(prompt, stream)
        if (asked := kwargs.pop("diversity", None)) is not None:
            with contextlib.suppress(TypeError, json.JSONDecodeError):
                asked = json.loads(asked)  # If this fails, the server reports what it accepts.
            kwargs["extra_body"] = {"diversity": asked}
        return kwargs

    def get_client(self, *arguments: Any, **named: Any) -> Any:
        client = super().get_client(*arguments, **named)
        create = client.chat.completions.create

        def recording(**body: Any) -> Any:
            answer = create(**body)
            return self._recorded(answer) if body.get("stream") else answer

        client.chat.completions.create = recording
        return client

    def _recorded(self, chunks: Iterable[Any]) -> Iterator[Any]:
        """Passes the chunks on, and records their `diversity` object, which LLM drops."""
        for chunk in chunks:
            self._diversity = (chunk.model_extra or {}).get("diversity", self._diversity)
            yield chunk


@llm.hookimpl
def register_models(register) -> None:
    """LLM's hook: register the models of dftserve-models.yaml.

    Raises:
        click.ClickException: the file is not such a list; names the entry.
    """
    path = llm.user_dir() / "dftserve-models.yaml"
    entry: Any = None
    try:
        for entry in yaml.safe_load(path.read_text("utf-8")) or [] if path.exists() else []:
            named = dict(entry)
            aliases, key = named.pop("aliases", []), named.pop("api_key_name", None)
            model = DiverseChat(**named)
            model.needs_key = key
            register(model, aliases=aliases)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        accepted = "a list of models, each with model_id and api_base"
        raise click.ClickException(f"{path}: {entry!r}: {error}; accepted: {accepted}") from None
