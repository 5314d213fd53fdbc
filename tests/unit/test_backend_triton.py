"""The kernels under Triton's interpreter, against the fp64 reference and plain torch. No GPU is
needed, and none is tested: `bench/sampler.py` times one.

Triton decides at import whether it interprets, so the kernels run in a separate process: this
file, run as a program, transforms the regimes and writes the results.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from dftserve.sampling import Controls, TokenClasses, control_row
from dftserve.sampling.backends.plain_torch import TorchBackend
from dftserve.sampling.draws import draw_key
from dftserve.sampling.transform import Statistics
from dftserve.sampling.transform import transform as plain
from dftserve.spec import parse
from tests.reference import reference
from tests.rows import KINDS, make_rows

LOG_PROBABILITY = 2e-4
NATS = 1e-3
GATED = {"level": 0.7}
WIDE = {"level": 1.0, "min_p": 1e-4}
RANGED = {"law": "dynatemp", "dynatemp_range": 0.8, "dynatemp_exponent": 0.7, "level": 1.0}
COOLED = {"law": "dynatemp", "dynatemp_range": 0.7, "level": 1.0}


def _near_tie(vocabulary: int, stop_logit: float) -> torch.Tensor:
    """Many tokens one nat below the first; token 3, a stop token, close to the first."""
    row_V = torch.zeros(vocabulary)
    row_V[7], row_V[3] = 1.0, stop_logit
    return row_V


def regimes() -> dict[str, tuple[torch.Tensor, list[tuple[dict, float, frozenset[int]]]]]:
    """Logits by name, and each row's diversity, temperature and stop tokens."""
    cases = [
        (GATED, 0.7, frozenset()),
        (WIDE, 1.0, frozenset({0})),
        (RANGED, 1.3, frozenset({1, 5, 9})),
        (COOLED, 0.8, frozenset({2})),
    ]
    made = {
        f"{kind}, V={vocabulary}": (make_rows([kind] * 4, vocabulary, seed), cases)
        for seed, kind in enumerate(sorted(KINDS))
        for vocabulary in (2, 257, 1024)
    }
    for vocabulary in (50_257, 262_144):
        made[f"peaked, V={vocabulary}"] = make_rows(["few", "grammar"], vocabulary, 1), cases[:2]
    # More survivors than `_decide` takes at once; heat until content and a stop token tie.
    made["everything survives"] = make_rows(["flat", "gaussian"], 9001, 2), [cases[0], cases[1]]
    near = torch.stack([_near_tie(300, 0.95), _near_tie(300, 1.05)])
    made["a stop token near the top"] = near, [({"level": 1.0}, 1.0, frozenset({3}))] * 2
    # Barely heated; the content ties with a stop token that is not the top token.
    tied = _near_tie(300, 1.5)[None]
    tied[0, 9] = 1.0
    made["two stop tokens at the top"] = tied, [({"level": 1e-6}, 1.0, frozenset({3, 9}))]
    # One block of stop tokens, a little more, and three; some are not in the vocabulary.
    many = [(GATED, 0.9, frozenset(range(0, 5 * count, 5))) for count in (1, 128, 129, 300)]
    made["many stop tokens"] = make_rows(["zipf", "gaussian", "peaky", "few"], 1024, 4), many
    return made


def controls_of(cases, *, divide: bool) -> Controls:
    rows = [
        control_row(parse(d), temperature=t, logits_divisor=t if divide else 1.0, stop_ids=stops)
        for d, t, stops in cases
    ]
    return Controls.stack(rows)


REGIMES = regimes()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    file = tmp_path_factory.mktemp("triton") / "after.npz"
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", __file__, str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(file) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _after(interpreted, name: str) -> tuple[torch.Tensor, Statistics]:
    values_FR = interpreted[f"{name}: statistics"]
    return interpreted[name], Statistics(*values_FR[:4], valid_R=values_FR[4] > 0)


@pytest.mark.parametrize("name", list(REGIMES))
def test_the_kernels_equal_plain_torch(interpreted, name):
    logits_RV, cases = REGIMES[name]
    after_RV, statistics = _after(interpreted, name)
    expected_RV = logits_RV.clone()
    expected = plain(expected_RV, controls_of(cases, divide=False))
    assert torch.equal(after_RV == -torch.inf, expected_RV == -torch.inf)
    torch.testing.assert_close(after_RV, expected_RV, rtol=1e-5, atol=2e-4)
    for value_R, expected_R in zip(statistics.values(), expected.values(), strict=True):
        torch.testing.assert_close(value_R, expected_R, rtol=1e-3, atol=NATS)
    best_R1 = logits_RV.argmax(dim=1, keepdim=True)
    assert torch.equal(after_RV.gather(1, best_R1)[:, 0], after_RV.amax(dim=1))


@pytest.mark.parametrize("name", list(REGIMES))
def test_the_kernels_match_the_fp64_reference(interpreted, name):
    logits_RV, cases = REGIMES[name]
    if name == "everything survives":
        logits_RV, cases = logits_RV[:1], cases[:1]  # The reference is quadratic in the survivors.
    after_RV, statistics = _after(interpreted, name)
    for r, (diversity, temperature, stops) in enumerate(cases):
        expected = reference(
            logits_RV[r].numpy(), temperature=temperature, stop_ids=stops, **diversity
        )
        if expected.margin < 1e-4:
            continue
        got_V = torch.log_softmax(after_RV[r].double() / temperature, dim=0).numpy()
        assert (np.isinf(got_V) == np.isinf(expected.log_p_V)).all()
        likely_V = expected.log_p_V > -30
        np.testing.assert_allclose(
            got_V[likely_V], expected.log_p_V[likely_V], atol=LOG_PROBABILITY
        )
        assert statistics.entropy_before_R[r] == pytest.approx(expected.entropy_before, abs=NATS)
        assert statistics.entropy_after_R[r] == pytest.approx(expected.entropy_after, abs=NATS)
        assert statistics.temperature_R[r] == pytest.approx(expected.temperature, rel=NATS)


def test_unselected_and_invalid_rows_keep_their_bits(interpreted):
    before_XV, rows_R = mixed()
    after_XV, statistics = _after(interpreted, "mixed")
    assert statistics.valid_R.tolist() == [True, False, False, False, True]
    changed = {int(rows_R[0]), int(rows_R[-1])}
    for x in range(len(before_XV)):
        same = torch.equal(after_XV[x].view(torch.int32), before_XV[x].view(torch.int32))
        assert same == (x not in changed)


def mixed() -> tuple[torch.Tensor, torch.Tensor]:
    """Seven rows, five of them selected, three of those invalid."""
    logits_XV = make_rows(["peaky"] * 7, 300, seed=5)
    logits_XV[2, 17], logits_XV[3, 299], logits_XV[4] = torch.nan, torch.inf, -torch.inf
    return logits_XV, torch.tensor([6, 2, 3, 4, 0])


def test_a_slice_of_wider_rows(interpreted):
    """As in an engine that pads its vocabulary: the padding keeps its bits."""
    logits_RV, cases = divided()
    wide_RW, _ = _after(interpreted, "padded")
    expected_RV = logits_RV.clone()
    plain(expected_RV, controls_of(cases, divide=False))
    torch.testing.assert_close(wide_RW[:, :300], expected_RV, rtol=1e-5, atol=2e-4)
    assert (wide_RW[:, 300:] == 7).all()


def padded() -> torch.Tensor:
    logits_RV, _ = divided()
    return torch.cat((logits_RV, torch.full((len(logits_RV), 20), 7.0)), dim=1)


def test_logits_that_are_already_divided_by_the_temperature(interpreted):
    logits_RV, cases = divided()
    after_RV, _ = _after(interpreted, "divided")
    expected_RV = logits_RV.clone()
    plain(expected_RV, controls_of(cases, divide=True))
    assert torch.equal(after_RV == -torch.inf, expected_RV == -torch.inf)
    torch.testing.assert_close(after_RV, expected_RV, rtol=1e-5, atol=2e-4)


def test_a_row_reads_its_own_stop_tokens_only(interpreted):
    """Values after the first -1 have no effect."""
    expected_RV, _ = _after(interpreted, "own stops")
    after_RV, _ = _after(interpreted, "own stops, others behind")
    assert torch.equal(after_RV, expected_RV)


def own_stops() -> tuple[Controls, Controls]:
    controls = controls_of([(GATED, 1.0, frozenset({3}))] * 2, divide=False)
    stops_RE = torch.full((2, 8), -1)
    stops_RE[0, 0], stops_RE[1, :2] = 7, torch.tensor([3, 9])
    other_RE = stops_RE.clone()
    other_RE[0, 2:], other_RE[1, 3:] = 11, 12
    return Controls(controls.numbers_RF, stops_RE), Controls(controls.numbers_RF, other_RE)


def test_the_law_words_equals_plain_torch(interpreted):
    """Mixed with another law; with random token classes, and last tokens of any id or none."""
    for seed in WORDS_SEEDS:
        logits_RV, controls, classes = words(seed)
        after_RV, statistics = _after(interpreted, f"words {seed}")
        expected_RV = logits_RV.clone()
        expected = TorchBackend("cpu", token_classes=classes)(expected_RV, controls)
        assert torch.equal(after_RV == -torch.inf, expected_RV == -torch.inf)
        torch.testing.assert_close(after_RV, expected_RV, rtol=1e-5, atol=2e-4)
        for value_R, expected_R in zip(statistics.values(), expected.values(), strict=True):
            torch.testing.assert_close(value_R, expected_R, rtol=1e-3, atol=NATS)


WORDS_SEEDS = range(6)


def words(seed: int) -> tuple[torch.Tensor, Controls, TokenClasses]:
    source = np.random.default_rng(seed)
    vocabulary = (2, 17, 257, 300, 1024, 2500)[seed]
    kinds = sorted(KINDS)[seed % 3 :: 3]
    packed_V = source.integers(0, 3, (4, max(vocabulary - 9, 1)))
    classes = TokenClasses(sum(packed_V << 2 * np.arange(4)[:, None]).astype(np.uint8))
    cases = []
    for r in range(len(kinds)):
        diversity = {"law": "words", "level": float(source.uniform(0.01, 1)), "min_p": 1e-3}
        stops = frozenset(source.integers(0, 20, 2).tolist())
        cases.append((diversity if r % 3 else GATED, float(source.uniform(0.3, 1.8)), stops))
    last_R = torch.from_numpy(source.integers(-1, vocabulary + 2, len(kinds)))
    controls = controls_of(cases, divide=False).after(last_R)
    return make_rows(kinds, vocabulary, seed), controls, classes


def test_the_laws_that_only_cut_equal_plain_torch(interpreted):
    """Mixed with another law; with rows longer than a tile, and positions with different draws."""
    for seed in CUT_SEEDS:
        logits_RV, controls = cut(seed)
        after_RV, statistics = _after(interpreted, f"cut {seed}")
        expected_RV = logits_RV.clone()
        expected = plain(expected_RV, controls)
        assert torch.equal(after_RV == -torch.inf, expected_RV == -torch.inf)
        torch.testing.assert_close(after_RV, expected_RV, rtol=1e-5, atol=2e-4)
        for value_R, expected_R in zip(statistics.values(), expected.values(), strict=True):
            torch.testing.assert_close(value_R, expected_R, rtol=1e-3, atol=NATS)


CUT = (
    {"law": "top_n_sigma", "n_sigma": 1.3},
    {"law": "xtc", "xtc_probability": 0.7, "xtc_threshold": 0.01},
    {"law": "guard", "min_p": 0.03},
    GATED,
    {"law": "xtc", "xtc_probability": 0.5, "xtc_threshold": 0.003, "min_p": 0.02},
)
CUT_SEEDS = range(6)


def cut(seed: int) -> tuple[torch.Tensor, Controls]:
    source = np.random.default_rng(seed)
    vocabulary = (3, 17, 257, 1024, 2500, 5000)[seed]
    kinds = sorted(KINDS)
    rows = [
        control_row(
            parse(CUT[(r + seed) % len(CUT)]),
            temperature=(temperature := float(source.uniform(0.3, 1.8))),
            logits_divisor=temperature if r % 2 else 1.0,
            stop_ids=frozenset(source.integers(0, 20, 2).tolist()),
            draw_key=draw_key(seed, r),
        )
        for r in range(len(kinds))
    ]
    controls = Controls.stack(rows)
    logits_RV = make_rows(kinds, vocabulary, seed) / controls.logits_divisor_R[:, None]
    return logits_RV, controls.at(torch.from_numpy(source.integers(0, 2**40, len(kinds))))


def divided():
    _, cases = REGIMES["few, V=257"]
    return make_rows(["few", "gaussian", "zipf", "peaky"], 300, seed=8), cases


def main(file: str) -> None:
    from dftserve.sampling.backends.triton import TritonBackend

    backend = TritonBackend(torch.device("cpu"))
    arrays = {}

    def store(name, after_XV, statistics):
        arrays[name] = after_XV.numpy()
        values = (*statistics.values(), statistics.valid_R.float())
        arrays[f"{name}: statistics"] = torch.stack(values).numpy()

    for name, (logits_RV, cases) in REGIMES.items():
        after_RV = logits_RV.clone()
        store(name, after_RV, backend(after_RV, controls_of(cases, divide=False)))
    after_XV, rows_R = mixed()
    cases = [(GATED, 1.0, frozenset({3}))] * len(rows_R)
    store("mixed", after_XV, backend(after_XV, controls_of(cases, divide=False), rows_R))
    after_RV, cases = divided()
    store("divided", after_RV, backend(after_RV, controls_of(cases, divide=True)))
    wide_RW = padded()
    store("padded", wide_RW, backend(wide_RW[:, :300], controls_of(cases, divide=False)))
    for name, controls in zip(("own stops", "own stops, others behind"), own_stops(), strict=True):
        after_RV = make_rows(["few", "gaussian"], 300, seed=8)
        store(name, after_RV, backend(after_RV, controls))
    for seed in WORDS_SEEDS:
        after_RV, controls, classes = words(seed)
        with_classes = TritonBackend("cpu", token_classes=classes)
        store(f"words {seed}", after_RV, with_classes(after_RV, controls))
    for seed in CUT_SEEDS:
        after_RV, controls = cut(seed)
        store(f"cut {seed}", after_RV, backend(after_RV, controls))
    np.savez(file, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
