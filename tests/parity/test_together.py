"""DRY, a style, a law and a group in one request, in that order: over HTTP, against fp64.

A group's code determines the first tokens; when its bits are used up, the law samples.
"""

import random

import numpy as np
import pytest
from tokenizers import Tokenizer

from dftserve.stories.grammar import generate
from dftserve.styles import profile as profiles
from tests.conftest import long
from tests.dry_reference import dry_reference, penalties_reference
from tests.group_reference import drawn_reference, first_code_reference
from tests.parity.test_exactness import (
    LOG_PROBABILITY,
    NEAR_THRESHOLD,
    _answers,
    _log_p,
    _log_ps,
    _plain,
    _sampled_tokens,
    _stops,
    _vocabulary,
)
from tests.parity.test_groups import NEAR
from tests.parity.test_styles import NOTHING_CUT, _log_guard, _style_rows
from tests.reference import reference
from tests.style_reference import style_reference

TOKENS, SIZE = 5, 4
DRY = {"multiplier": 1.5, "base": 1.75, "allowed_length": 2}


@pytest.mark.parametrize(
    ("engine", "count"),
    [("v1", 6), ("v2", 6), long("v1", 60), long("v2", 60)],
    indirect=["engine"],
)
def test_all_of_them_are_sampled_together(engine, count, styles_folder, figure):
    source, vocabulary = random.Random(17), _vocabulary(engine)
    tokenizer = Tokenizer.from_file(str(engine.model_folder / "tokenizer.json"))
    profile = profiles.read(styles_folder / "habits")
    stops = _stops(engine, {"shaping": {}})
    drawn, compared, penalised, worst = 0, 0, 0, 0.0
    for number in range(count):
        text = tokenizer.encode(generate(source).text).ids[: source.randrange(20, 60)]
        prompt = [*text, *text[: source.randrange(4, 12)]]
        level, temperature = source.uniform(0.1, 1.0), source.uniform(0.5, 1.5)
        group = {"id": f"t{number}", "index": number % SIZE, "size": SIZE}
        dry = {f"dry_{name}": value for name, value in DRY.items()}
        style = {"name": "habits", "strength": source.uniform(0.2, 1.0), "max_kl": 0.05}
        diversity = {"level": level, "group": group, "dry_sequence_breakers": [], **dry}
        body = {"prompt": prompt, "diversity": diversity, "style": style, "seed": number}
        body |= {"temperature": temperature, "max_tokens": TOKENS}
        answer = _answers(engine, [body], vocabulary)[0]
        tokens = _sampled_tokens(answer.json()["choices"][0])
        code, bits = first_code_reference(group["id"], group["index"], SIZE), np.log2(SIZE)
        state, spent = 0, 0.0
        for step, token in enumerate(tokens):
            before = [*prompt, *tokens[:step]]
            logits_V = _log_ps(engine, [_plain({"prompt": before, "shaping": {}})], vocabulary)[0]
            nats = penalties_reference(before, **DRY)
            factor_V, delta_V = _style_rows(profile, state, before[-1], vocabulary)
            shaped = {"temperature": temperature, "stop_ids": stops}
            styled = style_reference(
                dry_reference(logits_V, nats, log_guard=_log_guard(level), **shaped),
                factor_V,
                delta_V,
                log_guard=_log_guard(level),
                strength=style["strength"],
                allowance=style["max_kl"] * (step + 1) - spent,
                **shaped,
            )
            if styled.margin < NEAR_THRESHOLD:
                break  # The KL spent so far is not known any more.
            spent += styled.tilt_kl
            state = profile.step(state, token)[0]
            penalised += bool(nats)
            row_V = np.where(np.isfinite(styled.log_p_V), styled.log_p_V * temperature, -np.inf)
            law = reference(row_V, level=level, min_p=NOTHING_CUT, **shaped)
            if bits > 0:
                expected, code = drawn_reference(np.exp(law.log_p_V), code)
                if not NEAR < code < 1 - NEAR:
                    break
                assert token == expected, (number, step)
                bits += law.log_p_V[token] / np.log(2)
                drawn += 1
                continue
            sampled_V = _log_p(answer, vocabulary, step)
            assert (np.isinf(sampled_V) == np.isinf(law.log_p_V)).all(), (number, step)
            likely_V = law.log_p_V > -20
            worst = max(worst, np.abs(sampled_V[likely_V] - law.log_p_V[likely_V]).max())
            assert worst <= LOG_PROBABILITY, (number, step)
            compared += 1
    assert drawn >= count
    assert compared >= count
    assert penalised > count // 2
    figure(drawn=drawn, compared=compared, penalised=penalised, worst_logprob=worst)
