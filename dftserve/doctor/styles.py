"""The style profiles that a server would load, and why one is refused."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dftserve.doctor.findings import Finding, error, ok, warning
from dftserve.spec import STYLES_VARIABLE

if TYPE_CHECKING:
    from dftserve.styles.profile import Profile


def findings(environment: Mapping[str, str], model: str | None) -> Iterator[Finding]:
    """Which style profiles a server would load from the folder that the environment names.

    Args:
        model: the folder or the name of the model to be served; None: profiles are not checked
            against a model.
    """
    value = environment.get(STYLES_VARIABLE, "")
    if not value:
        return
    folder = Path(value)
    if not folder.is_dir():
        yield error(
            STYLES_VARIABLE,
            f"got {value!r}; accepted: a folder of profiles (dftserve style build).",
        )
        return
    try:
        yield from _of_folder(folder, model)
    except ModuleNotFoundError as missing:
        yield error(
            STYLES_VARIABLE, f"profiles cannot be read without {missing.name}: pip install it."
        )
    except (OSError, ValueError) as problem:
        yield error(STYLES_VARIABLE, str(problem))


def _of_folder(folder: Path, model: str | None) -> Iterator[Finding]:
    # Imported only if there is a folder: it imports torch, which nothing else here needs.
    from dftserve.styles.folder import check_depth, load

    check = check_depth if model is None else _fit(model)
    profiles, refused = load(folder, check)
    for profile in profiles:
        yield ok(f"style {profile.name}", _about(profile, model))
    for each in refused:
        yield error(f"style {each.name}", each.reason)
    if not profiles and not refused:
        yield warning(
            STYLES_VARIABLE, f"{folder} has no profile: no folder in it has a profile.json."
        )


def _fit(model: str) -> "Callable[[Profile], None]":
    from transformers import AutoConfig

    from dftserve.gguf import resolve
    from dftserve.hub import folder_of
    from dftserve.styles.folder import Reader
    from dftserve.targets.document import load_tokenizer

    model = resolve(model)
    tokenizer = load_tokenizer(model)
    config = AutoConfig.from_pretrained(folder_of(model), trust_remote_code=False)
    return Reader.of(tokenizer, config.get_text_config().vocab_size).check


def _about(profile: "Profile", model: str | None) -> str:
    fits = "it fits the model" if model is not None else "use --model to check whether it fits"
    return f"{len(profile.phrases)} phrases, counted on {profile.model}; {fits}."
