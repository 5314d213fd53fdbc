"""Tune the demo's model toward a distribution, on paragraphs by eighteen authors, by LoRA.

Equivalent to `dftserve target build` and `dftserve train`; `prose.md` lists the texts.
"""

from collections.abc import Callable
from pathlib import Path

from dftserve.bounded_files import read_json
from dftserve.spec import FINAL
from dftserve.targets.run import Job
from dftserve.targets.run import build as build_targets
from dftserve.train.config import DivergenceConfig, LoraConfig, TrainConfig
from dftserve.train.run import train

HERE = Path(__file__).parent
PROSE, RECIPE = HERE / "prose.jsonl", HERE / "recipe.yaml"
HELDOUT = 0.1
"""Share of the paragraphs that are held out for measurement."""


def tune(model: Path, folder: Path, say: Callable[[str], None]) -> Path:
    """Tune the model, unless an earlier call has; returns the tuned checkpoint's folder."""
    targets, output = folder / "targets", folder / "dft"
    if (output / FINAL).exists():
        return output / FINAL
    build_targets(
        Job(
            corpus=PROSE,
            model=str(model),
            recipe=str(RECIPE),
            out=targets,
            values={"teacher": str(model)},
            heldout=HELDOUT,
        ),
        say,
    )
    return train(
        TrainConfig(
            model=str(model),
            targets=str(targets),
            output=str(output),
            divergence=DivergenceConfig(name="forward_kl", target_weight=0.5),
            lora=LoraConfig(rank=16, alpha=32),
            max_length=256,
            batch_size=4,
            learning_rate=2e-3,
            save_every=5,
            keep=1,
            evaluate_every=1000,
            log_every=1000,
        )
    )


def held_out_metrics(final: Path) -> dict[str, float]:
    """The run's metrics, among them the loss in nats per token on the held-out paragraphs."""
    run = read_json(final / "run.json", within=final, largest=1 << 20, finite=False)
    return run["metrics"]
