"""The diversity transform for transformers' `generate()`.

processor = DiversityProcessor(0.5, temperature=0.8, stop_ids=[tokenizer.eos_token_id])
model.generate(**inputs, logits_processor=[processor], generation_config=sampling(0.8))
"""

import math
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase

from dftserve import spec
from dftserve.fingerprints import template_fingerprint, tokenizer_fingerprint
from dftserve.sampling import (
    Controls,
    Statistics,
    Step,
    StyleControls,
    StyleStage,
    Texts,
    TokenClasses,
    control_row,
    get_backend,
    get_style_stage,
    transform_step,
)
from dftserve.sampling.draws import draw_key
from dftserve.sampling.dry import NO_BREAKERS, Breakers, DryControls, SlotRepeats
from dftserve.sampling.group import GroupCodes, GroupRow, first_code
from dftserve.sampling.step import Penalties

if TYPE_CHECKING:
    from dftserve.styles.profile import Profile

NO_BEAMS = "accepted: 1, for diversity is for sampling, and beam search ranks texts. Leave it out."


class DiversityProcessor(LogitsProcessor):
    """Applies a request's `diversity` to every row of a `generate()` call.

    It runs before transformers' own temperature, which must be the same `temperature`: use
    `sampling(temperature)`. One processor serves one call at a time. A new call is detected from
    the token ids: the rows belong to the current call if each is the last step's row plus one
    token, and that token had a nonzero probability in at least one row. A prompt that equals the
    complete output of the previous call cannot be distinguished from that call's next step: call
    `reset` first. `statistics` holds the last step's statistics.

    Args:
        diversity: a number from 0 to 1, or the object form of the request field.
        temperature: T, above 0.
        stop_ids: the tokens that end the text; they keep their probability. As in configurations
            and tokenizers: one id, several, or None; a None among several is ignored.
        tokenizer: the model's, required by the law `words` and by DRY's sequence breakers.
        seed: of the random numbers of the law `xtc` and of groups, which are independent of
            transformers' own sampling; None: a new seed for each call. The rows of a batch draw
            independently, or as a group.
        style: the name of one of `profiles`, or the object form of the request field. It can be
            combined with a diversity of 0, and follows the answer of each row.
        profiles: from `dftserve.styles.profile.read`.
        top_k, top_p: for a diversity with `"group": true`, under which the rows with equal prompts
            form a group. Set them here: those of the GenerationConfig are applied only after a
            group's tokens are drawn.

    Raises:
        DiversityError: the diversity or the style is invalid.
        ProfileError: the style was built with another tokenizer or template than `tokenizer`'s.
        ValueError: the temperature is not above 0; a stop token is not a token id; the tokenizer is
            required but missing, or of an unknown form; the group is that of a single request; or
            the style is not among `profiles`, or cannot be combined with the law.
    """

    def __init__(
        self,
        diversity: float | Mapping[str, object],
        *,
        temperature: float = 1.0,
        stop_ids: int | Iterable[int | None] | None = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        style: str | Mapping[str, object] | None = None,
        profiles: "Sequence[Profile]" = (),
    ) -> None:
        self.diversity = spec.parse(diversity)
        self._reads_last_token = self.diversity.law == "words"
        if self._reads_last_token and tokenizer is None:
            raise ValueError(
                "tokenizer: got none; accepted: the model's tokenizer, whose tokens the law "
                "'words' divides into classes."
            )
        self._token_classes = (
            TokenClasses.from_tokenizer(tokenizer) if self._reads_last_token else None
        )
        self._dry = _dry_controls(self.diversity.dry, tokenizer)
        if isinstance(self.diversity.group, spec.Group):
            raise ValueError(
                "diversity.group: got the object form; accepted: true, which groups the rows with "
                "equal prompts."
            )
        self._profile, self._style = _resolve_style(style, profiles, self.diversity, tokenizer)
        self._stages: dict[torch.device, StyleStage] = {}
        self.statistics: Statistics | None = None
        self._seed = seed
        self._row = partial(
            control_row,
            self.diversity,
            temperature=temperature,
            logits_divisor=1.0,
            stop_ids=_stop_ids(stop_ids),
            style=self._style,
        )
        self._row()  # Raises for invalid arguments.
        self._group_row = partial(GroupRow, scale=1.0 / temperature, top_k=top_k, top_p=top_p)
        self.reset()
        self._begin(self._ids_RL)

    def reset(self) -> None:
        """Discard the state of the last call: the next step begins a new one."""
        self._ids_RL = torch.empty(0, 0)
        self._drawn_from_RV = torch.empty(0, 0)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Returns the rewritten rows of `scores` [R, V] as float32; the input is not modified.

        Raises:
            ValueError: beam search, which ranks texts and does not sample.
        """
        if self.diversity.is_off and self._style is None:
            return scores
        rows, length = input_ids.shape
        if not self._continues_call(input_ids):
            _refuse_beams(input_ids, scores)
            self._begin(input_ids)
        self._ids_RL = input_ids
        position_R = torch.full_like(self._slot_R, length)
        logits_RV = scores.float().clone(memory_format=torch.contiguous_format)
        last_token_R = input_ids[:, -1].int() if self._reads_last_token else None
        step = Step(
            *(self._controls, self._slot_R, position_R, self._zero_R, last_token_R),
            texts=None if self._style is None else self._texts(input_ids),
            penalties=() if self._dry is None else self._penalties(input_ids),
        )
        self.statistics = transform_step(logits_RV, step, self._slots, self._backend, self._stage)
        if self._codes is not None and (drawn := self._codes.draws(np.arange(rows)).sum()):
            self._codes.draw(logits_RV, step, int(drawn))
        self._drawn_from_RV = logits_RV
        return cast(torch.FloatTensor, logits_RV)

    def _continues_call(self, input_ids: torch.Tensor) -> bool:
        """Whether the rows continue the last step's. Lengths are not enough: another call's rows
        may happen to be one token longer, so the token ids are compared.

        The new token must also have had a nonzero probability in at least one row: all rows that
        have not ended satisfy this, and the others are padded.
        """
        before_RL = input_ids[:, :-1]
        if not (
            before_RL.shape == self._ids_RL.shape
            and before_RL.device == self._ids_RL.device
            and torch.equal(before_RL, self._ids_RL)
        ):
            return False
        drawn_R = self._drawn_from_RV.gather(1, input_ids[:, -1:])[:, 0]
        return bool((drawn_R > -torch.inf).any())

    def _begin(self, input_ids: torch.Tensor) -> None:
        rows, device = len(input_ids), input_ids.device
        self._backend = get_backend(device, token_classes=self._token_classes)
        self._slots = self._backend.create_slots(rows, 1)
        if self._profile is not None and device not in self._stages:
            self._stages[device] = get_style_stage(device, [self._profile])
        self._stage = self._stages.get(device)
        self._slot_R = torch.arange(rows, device=device)
        self._zero_R = torch.zeros_like(self._slot_R, dtype=torch.int32)
        self._answer_R = torch.full_like(self._zero_R, input_ids.shape[1])
        seed = secrets.randbits(64) if self._seed is None else self._seed
        rows_R = [self._row(draw_key=draw_key(seed, r)) for r in range(rows)]
        self._controls = Controls.stack(rows_R, device)
        self._repeats = SlotRepeats(rows, device)
        if self._dry is not None:
            for row in range(rows):
                self._repeats.put(row, self._dry)
        self._codes = self._groups(input_ids, seed) if self.diversity.group else None

    def _penalties(self, input_ids: torch.LongTensor) -> Iterable[Penalties]:
        return self._repeats.penalties(
            *(self._texts(input_ids), self._slot_R, self._zero_R),
            slots=np.arange(len(input_ids)),
            most_rows=len(input_ids),
        )

    def _texts(self, input_ids: torch.LongTensor) -> Texts:
        ids_RL = input_ids.int()
        at_R = torch.full_like(self._slot_R, ids_RL.shape[1] - 1)
        return Texts(ids_RL, self._answer_R, at_R, ids_RL[:, -1].contiguous())

    def _groups(self, input_ids: torch.Tensor, seed: int) -> GroupCodes:
        """The codes of the rows; rows with equal prompts form a group."""
        codes = GroupCodes(len(input_ids), 1, input_ids.device)
        prompts = [tuple(prompt) for prompt in input_ids.tolist()]
        sizes, seen = Counter(prompts), Counter[tuple[int, ...]]()
        for row, prompt in enumerate(prompts):
            name = f"{seed} {list(sizes).index(prompt)}"
            code = first_code(name, seen[prompt], sizes[prompt])
            codes.open(row, self._group_row(code=code, bits=math.log2(sizes[prompt])))
            seen[prompt] += 1
        return codes


def sampling(temperature: float = 1.0, **settings: object) -> GenerationConfig:
    """A GenerationConfig that samples at `temperature` without any cut after the processor.

    By default, transformers samples from the 50 most likely tokens only. `settings` are any other
    GenerationConfig fields (`max_new_tokens=…`).

    Raises:
        ValueError: beam search, which does not sample.
    """
    if (beams := settings.get("num_beams")) not in (None, 1):
        raise ValueError(f"num_beams: got {beams}; {NO_BEAMS}")
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0}
    neutral |= {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None}
    return GenerationConfig(do_sample=True, temperature=temperature, **{**neutral, **settings})


def _resolve_style(
    style: str | Mapping[str, object] | None,
    profiles: "Sequence[Profile]",
    diversity: spec.Diversity,
    tokenizer: PreTrainedTokenizerBase | None,
) -> "tuple[Profile, StyleControls] | tuple[None, None]":
    """The profile and the controls of the requested style; None for both if it has no effect."""
    if style is None:
        return None, None
    requested = spec.parse_style(style)
    named = {profile.name: profile for profile in profiles}.get(requested.name)
    if named is None:
        names = ", ".join(profile.name for profile in profiles) or "none; give `profiles`"
        raise ValueError(f"style.name: got {spec.quoted(requested.name)}; accepted: {names}.")
    if tokenizer is not None:
        named.belongs_to(
            tokenizer=tokenizer_fingerprint(tokenizer),
            template=template_fingerprint(tokenizer),
            vocabulary=max(len(tokenizer), named.vocabulary),
        )
    strength = named.strength if requested.strength is None else requested.strength
    if strength == 0:
        return None, None
    if diversity.law in spec.WHOLE_ROW_LAWS:
        accepted = ", ".join(law for law in spec.LAWS if law not in spec.WHOLE_ROW_LAWS)
        raise ValueError(
            f"style: got it with the law {diversity.law!r}; accepted with a style: {accepted}."
        )
    max_kl = named.max_kl if requested.max_kl is None else requested.max_kl
    return named, StyleControls(profile=0, strength=strength, max_kl=max_kl)


def _dry_controls(
    dry: spec.Dry | None, tokenizer: PreTrainedTokenizerBase | None
) -> DryControls | None:
    if dry is None:
        return None
    if not dry.sequence_breakers:
        return DryControls.of(dry, NO_BREAKERS)
    if tokenizer is None:
        raise ValueError(
            "tokenizer: got none; accepted: the model's tokenizer, whose tokens "
            f"{spec.DRY_BREAKERS} are looked up in (an empty list needs none)."
        )
    return DryControls.of(dry, Breakers.from_tokenizer(tokenizer).tokens(dry.sequence_breakers))


def _stop_ids(ids: int | Iterable[int | None] | None) -> frozenset[int]:
    listed = [ids] if ids is None or isinstance(ids, int) else list(ids)
    stop_ids = {each for each in listed if each is not None}
    for each in stop_ids:
        if not isinstance(each, int) or isinstance(each, bool) or each < 0:
            raise ValueError(f"stop_ids: got {each!r}; accepted: token ids, which are 0 or more.")
    return frozenset(stop_ids)


def _refuse_beams(input_ids: torch.Tensor, scores: torch.Tensor) -> None:
    """Raise ValueError for beam search, which is recognised by its equal first rows and by scores
    that are log-probabilities instead of logits."""
    if len(input_ids) < 2 or not bool((input_ids[0] == input_ids[1]).all()):
        return
    if bool((scores.float().logsumexp(-1).abs() < 1e-4).all()):
        raise ValueError(f"generate() with several beams; {NO_BEAMS}")
