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
from tests.parity.test_groups import NEAR
from tests.reference import reference
from tests.served_distribution import (
    NEAR_THRESHOLD,
    NOTHING_CUT,
    SampledAnswer,
    log_guard,
    stop_ids,
    vocabulary_of,
    worst_difference,
)
from tests.style_reference import style_reference, style_rows

TOKENS, SIZE = 5, 4
DRY = {"multiplier": 1.5, "base": 1.75, "allowed_length": 2}


@pytest.mark.parametrize(
    ("engine", "count"),
    [("v1", 6), ("v2", 6), long("v1", 60), long("v2", 60)],
    indirect=["engine"],
)
def test_all_of_them_are_sampled_together(engine, count, styles_folder, record_values):
    source, vocabulary = random.Random(17), vocabulary_of(engine)
    tokenizer = Tokenizer.from_file(str(engine.model_folder / "tokenizer.json"))
    profile = profiles.read(styles_folder / "habits")
    stops = stop_ids(engine)
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
        answer = SampledAnswer(engine, body)
        code, bits = first_code_reference(group["id"], group["index"], SIZE), np.log2(SIZE)
        state, spent = 0, 0.0
        for step, token in enumerate(answer.tokens):
            before = answer.before(step)
            nats = penalties_reference(before, **DRY)
            factor_V, delta_V = style_rows(profile, state, before[-1], vocabulary)
            shaped = {"temperature": temperature, "stop_ids": stops}
            styled = style_reference(
                dry_reference(answer.logits_V(step), nats, log_guard=log_guard(level), **shaped),
                factor_V,
                delta_V,
                log_guard=log_guard(level),
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
            case = number, step
            found = worst_difference(answer.log_p_V(step), law.log_p_V, case, least=-20)
            worst = max(worst, found)
            compared += 1
    assert drawn >= count
    assert compared >= count
    assert penalised > count // 2
    record_values(drawn=drawn, compared=compared, penalised=penalised, worst_logprob=worst)
