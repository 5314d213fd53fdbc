"""Fine-tune the stories' model on a few hundred stories in two ways: plain SFT, and DFT.

    tune(Path("build/stories"))

Both runs start from the same model and train on the same stories for the same number of steps; only
the divergence differs. A user would do the same with `dftserve target build` and `dftserve train`.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dftserve.spec import FINAL
from dftserve.stories.grammar import PROMPTS, generate
from dftserve.stories.model import STEPS, build
from dftserve.targets.run import Job
from dftserve.targets.run import build as build_targets
from dftserve.train.config import DivergenceConfig, TrainConfig
from dftserve.train.run import train

RECIPE = Path(__file__).with_name("recipe.yaml")
STORIES = 400
SEED = 7
DIVERGENCES = {
    "sft": DivergenceConfig(name="sft"),
    "dft": DivergenceConfig(name="forward_kl", target_weight=0.9),
}


@dataclass(frozen=True)
class Tuned:
    """One of the two checkpoints."""

    name: str
    folder: Path


def tune(
    folder: Path,
    say: Callable[[str], None],
    *,
    steps: int = STEPS,
    stories: int = STORIES,
    epochs: float = 3.0,
    learning_rate: float = 1e-3,
) -> list[Tuned]:
    """Both checkpoints; the results of an earlier call are reused."""
    base, texts, targets = folder / "base", folder / "stories.jsonl", folder / "targets"
    if not base.exists():
        say("Writing stories and training a small model on them (about a minute):")
        folder.mkdir(parents=True, exist_ok=True)
        build({base: steps})
    if not targets.exists() or not (folder / "dft" / FINAL).exists():
        say(f"Writing {stories} more stories, and a target distribution for each of their tokens:")
        write_stories(texts, stories)
        build_targets(
            Job(
                corpus=texts,
                model=str(base),
                recipe=str(RECIPE),
                out=targets,
                values={"teacher": str(base)},
                heldout=0.15,
            ),
            lambda line: None,
        )
    return [
        _tuned(folder, name, say, epochs=epochs, learning_rate=learning_rate)
        for name in DIVERGENCES
    ]


def write_stories(path: Path, count: int) -> None:
    """Write `count` prompts and answers as .jsonl."""
    rng = random.Random(SEED)
    lines = []
    for _ in range(count):
        prompt = rng.choice(list(PROMPTS))
        lines.append(json.dumps({"prompt": prompt, "response": generate(rng, prompt).text}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _tuned(
    folder: Path, name: str, say: Callable[[str], None], *, epochs: float, learning_rate: float
) -> Tuned:
    final = folder / name / FINAL
    if not final.exists():
        words = {
            "sft": "Plain fine-tuning on them (SFT):",
            "dft": "Distribution fine-tuning (DFT):",
        }
        say(words[name])
        train(
            TrainConfig(
                model=str(folder / "base"),
                targets=str(folder / "targets"),
                output=str(folder / name),
                divergence=DIVERGENCES[name],
                epochs=epochs,
                max_length=512,
                batch_size=4,
                learning_rate=learning_rate,
                evaluate_every=1000,
                save_every=1000,
                log_every=1000,
            )
        )
    return Tuned(name, final)
