"""A folder of style profiles, as a server is given it: which are in force, and why one is not."""

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
    """Its own, or its folder's where it could not be read."""
    place: Path
    reason: str

    @property
    def told(self) -> str:
        """The reason, for clients: with the folder's name in place of its path."""
        return self.reason.replace(str(self.place), self.place.name)


@dataclass(frozen=True)
class Reader:
    """What a profile has to fit: how a model reads text."""

    tokenizer: str
    template: str | None
    """Fingerprints."""
    vocabulary: int
    """Columns of its logits."""

    @classmethod
    def of(cls, tokenizer: Any, vocabulary: int) -> "Reader":
        fingerprints = tokenizer_fingerprint(tokenizer), template_fingerprint(tokenizer)
        return cls(*fingerprints, vocabulary)

    def check(self, profile: Profile) -> None:
        """
        Raises:
            ValueError: the profile does not fit, or no engine can follow its phrases.
        """
        profile.belongs_to(
            tokenizer=self.tokenizer, template=self.template, vocabulary=self.vocabulary
        )
        check_depth(profile)


def check_depth(profile: Profile) -> None:
    """Raises ValueError where a phrase has more tokens than an engine follows."""
    if depth_of([profile]) > DEEPEST:
        raise ValueError(f"phrases: got one of more than {DEEPEST} tokens; accepted: shorter ones.")


def load(
    folder: Path, check: Callable[[Profile], None]
) -> tuple[tuple[Profile, ...], tuple[Refused, ...]]:
    """The profiles of a folder in their order, and those that cannot be used.

    Args:
        check: raises where a profile does not fit.

    Raises:
        OSError: the folder cannot be listed.
    """
    made: dict[str, Profile] = {}
    refused: list[Refused] = []
    # os.path.exists is False for what may not be looked at, such as a volume's lost+found.
    for place in (each for each in sorted(folder.iterdir()) if os.path.exists(each / MANIFEST)):
        name = place.name
        try:
            profile = read(place)
            name = profile.name
            if name in made:
                raise ProfileError(f"another profile of the folder has the name {name!r}.")
            check(profile)
            made[name] = profile
        except Exception as error:  # noqa: BLE001 - the other profiles are loaded
            refused.append(Refused(name, place, str(error)))
    return tuple(made.values()), tuple(refused)
