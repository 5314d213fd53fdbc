"""A server's folder of style profiles: which are in force, and why the others are not."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dftserve.fingerprints import template_fingerprint, tokenizer_fingerprint
from dftserve.sampling.style.tables import DEEPEST, depth_of
from dftserve.styles.profile import MANIFEST, Profile, ProfileError, read


@dataclass(frozen=True)
class Refused:
    """A profile that is not in force."""

    name: str
    """The profile's name, or its folder's if the profile could not be read."""
    place: Path
    reason: str

    @property
    def public_reason(self) -> str:
        """The reason as shown to clients: with the folder's name instead of its path."""
        return self.reason.replace(str(self.place), self.place.name)


@dataclass(frozen=True)
class Reader:
    """The model that a profile must fit: how it encodes text."""

    tokenizer: str
    template: str | None
    """Fingerprints of both."""
    vocabulary: int
    """Columns of the model's logits."""

    @classmethod
    def of(cls, tokenizer: Any, vocabulary: int) -> "Reader":
        fingerprints = tokenizer_fingerprint(tokenizer), template_fingerprint(tokenizer)
        return cls(*fingerprints, vocabulary)

    def check(self, profile: Profile) -> None:
        """Check that a profile belongs to this model.

        Raises:
            ValueError: the profile does not fit, or its phrases are longer than engines support.
        """
        profile.belongs_to(
            tokenizer=self.tokenizer, template=self.template, vocabulary=self.vocabulary
        )
        check_depth(profile)


def check_depth(profile: Profile) -> None:
    """Raises ValueError if a phrase has more tokens than engines support."""
    if depth_of([profile]) > DEEPEST:
        raise ValueError(f"phrases: got one of more than {DEEPEST} tokens; accepted: shorter ones.")


def load(
    folder: Path, check: Callable[[Profile], None]
) -> tuple[tuple[Profile, ...], tuple[Refused, ...]]:
    """The profiles of a folder, sorted by folder name, and those that cannot be used.

    Args:
        check: raises if a profile does not fit.

    Raises:
        OSError: the folder cannot be listed.
    """
    profiles: dict[str, Profile] = {}
    refused: list[Refused] = []
    # os.path.exists is False for folders without access, such as a volume's lost+found.
    for place in (each for each in sorted(folder.iterdir()) if os.path.exists(each / MANIFEST)):
        name = place.name
        try:
            profile = read(place)
            name = profile.name
            if name in profiles:
                raise ProfileError(f"another profile of the folder has the name {name!r}.")
            check(profile)
            profiles[name] = profile
        except Exception as error:  # noqa: BLE001 - the other profiles are loaded
            refused.append(Refused(name, place, str(error)))
    return tuple(profiles.values()), tuple(refused)
