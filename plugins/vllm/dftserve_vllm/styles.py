"""The styles that an engine has: profiles of the folder that `DFTSERVE_STYLES` names.

Each folder in it with a profile.json is one. A profile that does not fit the engine's model, or
cannot be read, is refused by its name: the server starts, and requests with it get the reason.
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
    """An engine's styles. Its workers load the same folder, and so have the same order."""

    profiles: "tuple[Profile, ...]" = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    """Why a profile is not among them, by its name, or its folder's where it could not be read."""
    unavailable: str | None = None
    """Why no style can be honoured on this engine."""

    def has(self, name: str) -> bool:
        """Whether there is a profile of this name, refused or not."""
        return self._place(name) is not None or name in self.refused

    def refusal_of(
        self, style: spec.Style, parameter: str = "style", others: Sequence[str] = ()
    ) -> str | None:
        """Why the style cannot be honoured, as the message of an error, or None.

        Args:
            others: names that a style may have and that are no profiles.
        """
        if self.unavailable is not None:
            beside = f"; accepted: {', '.join(others)}" if others else ""
            return f"{parameter}: {self.unavailable}{beside}."
        if self._place(style.name) is not None:
            return None
        got = f"{parameter}.name: got {spec.shown(style.name)}"
        if (reason := self.refused.get(style.name)) is not None:
            return f"{got}, which was refused: {reason}"
        return f"{got}; accepted: {self.accepted(others)}."

    def accepted(self, others: Sequence[str] = ()) -> str:
        """The names, as an error says them."""
        own = [profile.name for profile in self.profiles]
        names = ", ".join([*own, *(name for name in others if name not in own)])
        return names or (
            "none, since no profile is loaded: make one (`dftserve style build`), and start the "
            f"server with {spec.STYLES_VARIABLE}=FOLDER, the folder that it is in"
        )

    def controls(self, style: spec.Style) -> StyleControls:
        """As the workers read it.

        Raises:
            ValueError: the engine has no such style, or can honour none.
        """
        if (reason := self.refusal_of(style)) is not None:
            raise ValueError(reason)
        place = self._place(style.name)
        assert place is not None
        profile = self.profiles[place]
        return StyleControls(
            profile=place,
            strength=profile.strength if style.strength is None else style.strength,
            max_kl=profile.max_kl if style.max_kl is None else style.max_kl,
        )

    def completed(self, style: spec.Style) -> spec.Style:
        """With the profile's own numbers where the request names none."""
        place = self._place(style.name)
        if place is None:
            return style
        profile = self.profiles[place]
        return spec.Style(
            name=style.name,
            strength=profile.strength if style.strength is None else style.strength,
            max_kl=profile.max_kl if style.max_kl is None else style.max_kl,
        )

    def _place(self, name: str) -> int | None:
        names = [profile.name for profile in self.profiles]
        return names.index(name) if name in names else None


NONE = Styles()


def of_engine(vllm_config: Any) -> Styles:
    """Of the engine with this configuration, read once in a process."""
    model_config = getattr(vllm_config, "model_config", None)
    folder = os.environ.get(spec.STYLES_VARIABLE, "")
    if not folder or model_config is None:
        return NONE
    unavailable = None
    if vocabulary.hides_last_token(vllm_config):
        unavailable = (
            "styles need the text so far, which vLLM's V1 model runner does not tell under "
            "asynchronous scheduling; use --no-async-scheduling or the V2 runner "
            "(VLLM_USE_V2_MODEL_RUNNER=1)"
        )
    if unavailable is not None:
        _tell(unavailable)
        return Styles(unavailable=unavailable)
    return _load(Path(folder), vocabulary.Identity(model_config))


@lru_cache
def _tell(reason: str) -> None:
    """Once in a process."""
    logger.warning("styles: none are available: %s", reason)


@lru_cache(maxsize=8)
def _load(folder: Path, identity: vocabulary.Identity) -> Styles:
    try:
        # Not before there is a folder: it brings libraries that nothing else here needs.
        from dftserve.styles.folder import Reader, load

        model_config = identity.model_config
        reader = Reader.of(vocabulary.tokenizer(model_config), int(model_config.get_vocab_size()))
        made, found = load(folder, reader.check)
    except Exception:  # Code of the model's own among them; the server must start.
        logger.warning("styles: none are available", exc_info=True)
        return Styles(
            unavailable=f"no style could be loaded ({spec.STYLES_VARIABLE}); the log says why"
        )
    refused: dict[str, str] = {}
    for each in found:
        # The log has the whole path; who asks for the style is told the file alone.
        refused.setdefault(each.name, each.public_reason)
        logger.warning("styles: %r is refused: %s", each.name, each.reason)
    names = ", ".join(profile.name for profile in made)
    logger.info("styles: %s", names or f"no profile in {folder} is in force")
    return Styles(made, refused)
