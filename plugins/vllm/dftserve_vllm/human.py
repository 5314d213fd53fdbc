"""`"diversity": "human"`: the law `budget` at the target entropy of the served checkpoint.

The entropy is read from dft.json in the folder that the engine was started with.
"""

from functools import lru_cache
from pathlib import Path

from dftserve.spec import ACCEPTED, HUMAN, CheckpointInfo, Diversity, DiversityError
from dftserve_vllm import engine
from dftserve_vllm.log import logger


def resolved(parameter: str) -> Diversity:
    """What `human` means on this server.

    Raises:
        DiversityError: the served model states no target entropy.
    """
    meaning = diversity()
    if meaning is None:
        accepted = (
            f"{ACCEPTED}; {HUMAN!r} where the served model's folder has a {CheckpointInfo.FILE} "
            "with a target_entropy above 0"
        )
        raise DiversityError(parameter, HUMAN, accepted)
    return meaning


def diversity() -> Diversity | None:
    """What `human` means on this server; None if the served model states no target entropy."""
    model = engine.model()
    return None if model is None else _of_checkpoint(model)


@lru_cache(maxsize=8)
def _of_checkpoint(model: str) -> Diversity | None:
    """Cached: a folder does not change while it is served."""
    folder = Path(model)
    if not (folder / CheckpointInfo.FILE).is_file():
        return None
    try:
        return CheckpointInfo.read(folder).human_diversity
    except (OSError, ValueError) as error:
        logger.warning("diversity: %r is not available: %s", HUMAN, error)
        return None
