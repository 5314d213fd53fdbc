"""An engine's styles: the profiles in the folder that `DFTSERVE_STYLES` names.

Each folder in it with a profile.json is a profile. One that does not fit the engine's model, or
cannot be read, is refused: the server starts, and requests that name it get the reason.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dftserve import spec
from dftserve.sampling import StyleControls
from dftserve_vllm import vocabulary
from dftserve_vllm.log import logger

if TYPE_CHECKING:
    from dftserve.styles.profile import Profile


@dataclass(frozen=True)
class Styles:
    """An engine's styles. Its workers load the same folder, and so have them in the same order."""

    profiles: "tuple[Profile, ...]" = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    """Why profiles were refused, by name, or by folder if the profile cannot be read."""
    unavailable: str | None = None
    """Why this engine can honour no style, or None."""

    def has(self, name: str) -> bool:
        """Whether there is a profile of this name, refused or not."""
        return self._index(name) is not None or name in self.refused

    def refusal_of(
        self, style: spec.Style, parameter: str = "style", others: Sequence[str] = ()
    ) -> str | None:
        """Why the style cannot be honoured, as an error message, or None.

        Args:
            others: accepted names that are not profiles.
        """
        if self.unavailable is not None:
            accepted = f"; accepted: {', '.join(others)}" if others else ""
            return f"{parameter}: {self.unavailable}{accepted}."
        if self._index(style.name) is not None:
            return None
        got = f"{parameter}.name: got {spec.quoted(style.name)}"
        if (reason := self.refused.get(style.name)) is not None:
            return f"{got}, which was refused: {reason}"
        return f"{got}; accepted: {self.accepted(others)}."

    def accepted(self, others: Sequence[str] = ()) -> str:
        """The accepted names, for an error message."""
        own = [profile.name for profile in self.profiles]
        names = ", ".join([*own, *(name for name in others if name not in own)])
        return names or (
            "none, since no profile is loaded: make one (`dftserve style build`), and start the "
            f"server with {spec.STYLES_VARIABLE}=FOLDER, the folder that it is in"
        )

    def controls(self, style: spec.Style) -> StyleControls:
        """The style in the form that the workers read.

        Raises:
            ValueError: the engine has no such style, or can honour none.
        """
        if (reason := self.refusal_of(style)) is not None:
            raise ValueError(reason)
        index = self._index(style.name)
        assert index is not None
        return StyleControls(profile=index, **_completed_numbers(style, self.profiles[index]))

    def completed(self, style: spec.Style) -> spec.Style:
        """The style with the profile's own numbers where the request gives none."""
        index = self._index(style.name)
        if index is None:
            return style
        return spec.Style(name=style.name, **_completed_numbers(style, self.profiles[index]))

    def _index(self, name: str) -> int | None:
        names = [profile.name for profile in self.profiles]
        return names.index(name) if name in names else None


def _completed_numbers(style: spec.Style, profile: "Profile") -> dict[str, float]:
    """A style's strength and max_kl, from its profile where the request gives none."""
    return {
        "strength": profile.strength if style.strength is None else style.strength,
        "max_kl": profile.max_kl if style.max_kl is None else style.max_kl,
    }


NONE = Styles()


def of_engine(vllm_config: Any) -> Styles:
    """The styles of the engine with this configuration, read once per process."""
    model_config = getattr(vllm_config, "model_config", None)
    folder = os.environ.get(spec.STYLES_VARIABLE, "")
    if not folder or model_config is None:
        return NONE
    unavailable = None
    if vocabulary.hides_last_token(vllm_config):
        unavailable = (
            "styles need the text so far, which vLLM's V1 model runner does not provide under "
            "asynchronous scheduling; use --no-async-scheduling or the V2 runner "
            "(VLLM_USE_V2_MODEL_RUNNER=1)"
        )
    if unavailable is not None:
        _warn_unavailable(unavailable)
        return Styles(unavailable=unavailable)
    return _load(Path(folder), vocabulary.Identity(model_config))


@lru_cache
def _warn_unavailable(reason: str) -> None:
    """Logged once per process, by the cache."""
    logger.warning("styles: none are available: %s", reason)


@lru_cache(maxsize=8)
def _load(folder: Path, identity: vocabulary.Identity) -> Styles:
    try:
        # Imported only if there is a folder: it needs libraries that nothing else here uses.
        from dftserve.styles.folder import Reader, load

        model_config = identity.model_config
        reader = Reader.of(vocabulary.tokenizer(model_config), int(model_config.get_vocab_size()))
        profiles, refusals = load(folder, reader.check)
    except Exception:  # May run the model's own code; the server must start.
        logger.warning("styles: none are available", exc_info=True)
        return Styles(
            unavailable=f"no style could be loaded ({spec.STYLES_VARIABLE}); the log says why"
        )
    refused: dict[str, str] = {}
    for each in refusals:
        # The log has the whole path; clients see only the file's name.
        refused.setdefault(each.name, each.public_reason)
        logger.warning("styles: %r is refused: %s", each.name, each.reason)
    names = ", ".join(profile.name for profile in profiles)
    logger.info("styles: %s", names or f"no profile in {folder} is in force")
    return Styles(profiles, refused)
