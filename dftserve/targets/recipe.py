"""Recipes: which texts to use, which source computes the targets, and how much a store keeps.

    recipe = load("creative", {"teacher": "/models/base"})
    source = source_of(recipe, tokenizer=tokenizer, documents=documents, vocabulary=32_000)

A recipe is a YAML file, shipped under recipes/ or written by the user:

    name: mine                          # default: the file's name
    about: What it is for, and the reasons for its settings.
    text: What texts it suits.          # these three are optional
    defaults: {order: 5}                # of placeholders
    corpus: {min_words: 50}             # fields of corpus.filters.Filters
    store: {k: 6, draws: 6}
    source:                             # one kind and its settings; some contain other sources
      mix:
        - {weight: 0.6, ngram: {order: "${order}"}}
        - {weight: 0.4, when: teacher, teacher: {model: "${teacher}"}}

`${name}` is replaced by the value of `--set name=value`, which becomes a number, true or false if
it reads like one. A part with `when` is left out unless that name is set. The weights of `mix` are
shares, so the other parts then share its weight; those of `geomix` are exponents and stay the same.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dftserve import settings
from dftserve.corpus.filters import Filters
from dftserve.targets.bins import Bins
from dftserve.targets.limits import LARGEST_KEPT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dftserve.targets.document import Document
    from dftserve.targets.ngram import Ngram
    from dftserve.targets.source import DenseSource, Source
    from dftserve.targets.teacher import Teacher

FOLDER = Path(__file__).parent / "recipes"
"""The recipes that come with dftserve."""
SUFFIXES = (".yaml", ".yml")
DEEPEST = 16
"""Levels of nested sources."""
OF_CORPUS = "corpus."
DTYPES = ("auto", "float32", "bfloat16", "float16")
"""In which a teacher may be loaded; `auto` is that of its weights."""
_DEVICE = re.compile(r"cpu|mps|(cuda|xpu)(:\d{1,3})?")
_PLACEHOLDER = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """How much of each target the store keeps."""

    k: int = 6
    """Likeliest tokens, with their probabilities."""
    draws: int = 6
    """Draws from the rest."""

    def __post_init__(self) -> None:
        if not (1 <= self.k <= LARGEST_KEPT and 0 <= self.draws <= LARGEST_KEPT):
            raise ValueError(
                f"k {self.k} and draws {self.draws}; accepted: k from 1, draws from 0, to "
                f"{LARGEST_KEPT}."
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which texts are used, which source computes their targets, and what is stored of these."""

    name: str
    """Default: the name of its file."""
    about: str = ""
    text: str = ""
    corpus: Filters = field(default_factory=Filters)
    store: Kept = field(default_factory=Kept)
    source: Mapping[str, Any]
    """One kind and its settings, with all placeholders filled."""

    def __post_init__(self) -> None:
        _checked(self.source, "source")


def shipped() -> list[str]:
    """The names of the recipes that come with dftserve."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str, values: Mapping[str, str] | None = None) -> Recipe:
    """A shipped recipe by its name, or one from a .yaml file.

    Args:
        values: the values of its placeholders.

    Raises:
        ValueError: no such recipe, too large or not YAML, an unknown key (with the nearest name), a
            placeholder without a value, or a value that no placeholder uses.
    """
    path = _path(name)
    content = settings.read_yaml(path)
    where = path.name
    settings.check_mapping(content, where)
    known = [each.name for each in dataclasses.fields(Recipe)]
    settings.refuse_unknown(content, [*known, "defaults"], where)
    content.setdefault("name", path.stem)
    defaults = content.pop("defaults", None) or {}
    settings.check_mapping(defaults, f"{where}.defaults")
    values = dict(values or {})
    content["corpus"] = _with_filters(content.get("corpus"), values, where)
    settings.refuse_unknown(values, sorted(_names(content)), f"--set for the recipe {where}")
    filled = {**defaults, **{key: _parsed_scalar(value) for key, value in values.items()}}
    return settings.load(Recipe, _filled(content, filled, where), where)


def source_of(
    recipe: Recipe,
    *,
    tokenizer: "PreTrainedTokenizerBase",
    documents: "Mapping[str, Sequence[Document]]",
    vocabulary: int,
    known: "Mapping[str, Any] | None" = None,
    say: "Callable[[str], object]" = lambda line: None,
) -> "Source":
    """The source that a recipe describes.

    Args:
        documents: by split; n-grams are counted in the training part alone.
        vocabulary: one more than the largest token id that it may contain.
        known: the description of the same source from an earlier run, whose fits are reused.
        say: receives progress messages of long steps.

    Raises:
        ValueError: a source that cannot be built.
    """
    return _built(recipe.source, _BuildInputs(tokenizer, documents, vocabulary, known, say))


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────


def _path(name: str) -> Path:
    if name in shipped():
        return FOLDER / f"{name}.yaml"
    path = Path(name)
    if path.suffix in SUFFIXES and path.exists():
        return path
    if path.suffix in SUFFIXES:
        raise ValueError(
            f"{path}: no such file; accepted: a .yaml file, or a shipped recipe: "
            f"{settings.accepted_names(path.stem, shipped())}."
        )
    raise ValueError(
        f"no recipe has the name {name!r}; accepted: {settings.accepted_names(name, shipped())}, "
        "or the path of a .yaml file."
    )


def _with_filters(corpus: Any, values: dict[str, str], where: str) -> Any:
    """The recipe's filters, overridden by `corpus.FIELD` values, which are removed from
    `values`."""
    named = [name for name in values if name.startswith(OF_CORPUS)]
    if not named:
        return corpus or {}
    if corpus is not None and not isinstance(corpus, dict):
        raise ValueError(f"{where}.corpus: got {corpus!r}; accepted: keys and values.")
    texts = {name.removeprefix(OF_CORPUS): values.pop(name) for name in named}
    known = [each.name for each in dataclasses.fields(Filters)]
    settings.refuse_unknown(texts, known, f"--set {OF_CORPUS}…")
    read = {name: settings.parse_yaml(texts[name], f"--set {OF_CORPUS}{name}") for name in texts}
    for name, value in read.items():
        settings.check_field(Filters, name, value, f"--set {OF_CORPUS}{name}")
    return {**(corpus or {}), **read}


def _parsed_scalar(value: str) -> Any:
    """`0.5` becomes a number and `true` a boolean; everything else stays a string."""
    try:
        parsed = settings.parse_yaml(value, "--set")
    except ValueError:  # A string need not be valid YAML.
        return value
    return parsed if isinstance(parsed, int | float) else value


def _names(value: Any) -> set[str]:
    """All names for which a value may be set."""
    if isinstance(value, str):
        return set(_PLACEHOLDER.findall(value))
    if isinstance(value, dict):
        named = {value["when"]} if isinstance(value.get("when"), str) else set()
        return named.union(*map(_names, value.values()))
    return set().union(*map(_names, value)) if isinstance(value, list) else set()


def _filled(value: Any, known: Mapping[str, Any], where: str) -> Any:
    if isinstance(value, str):
        return _filled_text(value, known, where)
    if isinstance(value, dict):
        return {key: _filled(each, known, f"{where}.{key}") for key, each in value.items()}
    if isinstance(value, list):
        parts = [
            (f"{where}[{i}]", _without_when(each))
            for i, each in enumerate(value)
            if _is_included(each, known, f"{where}[{i}]")
        ]
        return [_filled(each, known, place) for place, each in parts]
    return value


def _is_included(part: Any, known: Mapping[str, Any], where: str) -> bool:
    if not (isinstance(part, dict) and "when" in part):
        return True
    name = part["when"]
    if not isinstance(name, str):
        raise ValueError(f"{where}.when: got {name!r:.80}; accepted: a name, as in --set NAME=.")
    return known.get(name) is not None


def _without_when(part: Any) -> Any:
    """A part of a list, without the condition under which it is used."""
    if not (isinstance(part, dict) and "when" in part):
        return part
    return {key: each for key, each in part.items() if key != "when"}


def _filled_text(text: str, known: Mapping[str, Any], where: str) -> Any:
    for name in _PLACEHOLDER.findall(text):
        if name not in known:
            raise ValueError(f"{where}: ${{{name}}} has no value; give one: --set {name}=VALUE.")
    if whole := _PLACEHOLDER.fullmatch(text):
        return known[whole[1]]
    return _PLACEHOLDER.sub(lambda match: str(known[match[1]]), text)


# ── Kinds of sources ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _BuildInputs:
    """What a source is built from, in addition to its settings."""

    tokenizer: "PreTrainedTokenizerBase"
    documents: "Mapping[str, Sequence[Document]]"
    vocabulary: int
    known: "Mapping[str, Any] | None"
    say: "Callable[[str], object]"
    leaves_out: Literal["document", "group"] = "document"
    """As in `ngram.Ngram`."""

    @property
    def all_documents(self) -> "list[Document]":
        return [document for split in self.documents.values() for document in split]


def teacher_models(recipe: Recipe) -> Iterator[str]:
    """Folders or names of all models that a recipe's sources load, including those of
    principles."""
    for each in _loaded(recipe.source):
        if isinstance(each, _Teacher):
            yield each.model
        elif isinstance(each, _Principles | _Calibrated):
            yield each.teacher.model


def students(recipe: Recipe) -> Iterator[str]:
    """The folders of cross-fitted students that a recipe's sources load."""
    for each in _loaded(recipe.source):
        if isinstance(each, _Calibrated) and each.students is not None:
            yield each.students


def counts_answers(recipe: Recipe) -> bool:
    """Whether any source counts how often each answer is given to a prompt."""
    return any(isinstance(each, _References) for each in _loaded(recipe.source))


def check_inputs(recipe: Recipe) -> None:
    """Check the files and environment variables that a recipe's sources read, without reading texts
    or models.

    Raises:
        ValueError: one is missing, or not what the source reads.
    """
    for each in _loaded(recipe.source):
        if isinstance(each, _Served | _Tilt | _Calibrated):
            each.check_inputs()


def principles(recipe: Recipe) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The model and the principles of each source that reads documents under principles."""
    for each in _loaded(recipe.source):
        if isinstance(each, _Principles):
            yield each.teacher.model, each.principles


def _loaded(source: Any) -> Iterator[object]:
    """The settings of a source and of those nested in it."""
    loaded, nested = _read(*_kind_and_config(source, "source"), "source")
    if loaded is not None:
        yield loaded
    for part in nested.values():
        yield from _loaded(part)


def _read(kind: str, config: Any, where: str) -> tuple[object | None, dict[str, Any]]:
    """The settings of a source, None of a mix, and the sources directly in it by their places."""
    where = f"{where}.{kind}"
    if kind in _MIXES:
        parts = enumerate(_weighted_parts(config, where))
        return None, {f"{where}[{i}]": part for i, (part, _) in parts}
    loaded = settings.load(_KINDS[kind], config, where)
    if isinstance(loaded, _Temper | _Tilt):
        return loaded, {f"{where}.of": loaded.of}
    others = loaded.others if isinstance(loaded, _Calibrated) else ()
    return loaded, {f"{where}.others[{i}]": part for i, part in enumerate(others)}


@dataclass(frozen=True)
class _Within:
    """The sources that a source is nested in."""

    depth: int = 0
    fitted: bool = False
    """Whether its weight is fitted to how well it predicts held-out texts."""
    combined: str | None = None
    """The kind that reads its probability of every token."""

    def of(self, kind: str) -> "_Within":
        return dataclasses.replace(
            self,
            depth=self.depth + 1,
            fitted=self.fitted or kind == "calibrated",
            combined=kind,
        )


def _checked(value: Any, where: str, within: _Within = _Within()) -> None:
    """Refuse a source that `_built` could not build, before anything is loaded."""
    if within.depth > DEEPEST:
        raise ValueError(f"{where}: more than {DEEPEST} sources within sources.")
    kind, config = _kind_and_config(value, where)
    if within.fitted and kind in _KNOW_THE_TEXT:
        raise ValueError(f"{where}: got {kind}, {_KNOW_THE_TEXT[kind]}.")
    if kind == "served" and within.combined is not None:
        raise ValueError(
            f"{where}: got served, which gives a server's top tokens only, and {within.combined} "
            "reads every token's probability; accepted: served as the only source, or the model "
            "loaded as a teacher."
        )
    _, nested = _read(kind, config, where)
    inner = within.of(kind)
    if kind in _MIXES and _is_used_alone(kind, _weighted_parts(config, kind)):
        inner = dataclasses.replace(inner, combined=within.combined)
    for place, part in nested.items():
        _checked(part, place, inner)


_KNOW_THE_TEXT = {
    "references": "which hold the texts that the weights are fitted on; accepted: sources built "
    "without them; mix references with `calibrated` instead",
    "calibrated": "whose targets of a training text contain the text's own tokens; accepted: "
    "sources built without them; give its parts to the outer `calibrated` instead",
}
"""Kinds that cannot be a part of a fitted mixture: why, and what to do."""


def _is_used_alone(kind: str, parts: Iterable[tuple[Mapping[str, Any], float]]) -> bool:
    """Whether one part of a mix may be used as it is: without another, or with references that are
    left out if no prompt has two answers."""
    others = [(part, weight) for part, weight in parts if "references" not in part]
    return len(others) == 1 and (kind == "mix" or others[0][1] == 1)


def _kind_and_config(value: Any, where: str) -> tuple[str, Any]:
    if not isinstance(value, Mapping) or len(value) != 1:
        listed = list(value) if isinstance(value, Mapping) else value
        raise ValueError(f"{where}: got {listed!r}; accepted: one of {', '.join(_ALL)}.")
    kind, config = next(iter(value.items()))
    settings.refuse_unknown(value, _ALL, where)
    return kind, {} if config is None else config


def _weighted_parts(value: Any, where: str) -> Iterator[tuple[Mapping[str, Any], float]]:
    """The sources of a mix and their weights."""
    parts = [part for part in value if isinstance(part, Mapping)] if isinstance(value, list) else []
    if not parts or len(parts) != len(value):
        raise ValueError(f"{where}: got {value!r}; accepted: a list of weights and sources.")
    for i, part in enumerate(parts):
        weight = part.get("weight")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
            raise ValueError(f"{where}[{i}].weight: got {weight!r}; accepted: a number above 0.")
        yield {key: part[key] for key in part if key != "weight"}, weight


def _built(source: Mapping[str, Any], inputs: _BuildInputs) -> "Source":
    kind, config = _kind_and_config(source, "source")
    if kind in _MIXES:
        return _mixed(kind, config, inputs)
    return settings.load(_KINDS[kind], config, kind).build(inputs)


def _mixed(kind: str, config: Any, inputs: _BuildInputs) -> "Source":
    from dftserve.targets import combine

    parts = [
        part for part in _weighted_parts(config, kind) if not _is_unused_references(part[0], inputs)
    ]
    if not parts:
        raise ValueError(f"{kind}: no prompt has two answers, and there is no other source.")
    sources = [_built(part, inputs) for part, _ in parts]
    weights = [weight for _, weight in parts]
    if len(sources) == 1:
        # The weights of a mix are shares; those of a geomix are exponents, which apply to one
        # source too.
        power = weights[0] if kind == "geomix" else 1
        return sources[0] if power == 1 else combine.Temper(sources[0], power)
    cls = {"mix": combine.Mix, "geomix": combine.Geomix}[kind]
    return cls(sources, weights)


def _is_unused_references(source: Mapping[str, Any], inputs: _BuildInputs) -> bool:
    """Whether a source is optional references and no prompt has two answers."""
    kind, config = _kind_and_config(source, "source")
    if kind != "references" or not settings.load(_References, config, kind).optional:
        return False
    questions = [document.question for document in inputs.all_documents if document.has_prompt]
    return len(set(questions)) == len(questions)


def _between(least: float, most: float, **values: float) -> None:
    """Check ranges before anything is loaded: a typo of some zeros could cost a lot of time."""
    for name, value in values.items():
        if not least <= value <= most:
            raise ValueError(f"{name}: got {value}; accepted: from {least:g} to {most:g}.")


@dataclass(frozen=True, kw_only=True)
class _Ngram:
    order: int = 6
    min_count: int = 2

    def __post_init__(self) -> None:
        _between(1, 64, order=self.order)
        _between(1, 1 << 30, min_count=self.min_count)

    def build(self, inputs: _BuildInputs) -> "Source":
        from dftserve.targets.ngram import Ngram

        return Ngram(
            inputs.documents["train"],
            vocabulary=inputs.vocabulary,
            order=self.order,
            min_count=self.min_count,
            leaves_out=inputs.leaves_out,
        )


@dataclass(frozen=True, kw_only=True)
class _References:
    optional: bool = False
    """Leave it out of a mix if no prompt has two answers."""

    def build(self, inputs: _BuildInputs) -> "Source":
        from dftserve.targets.references import References

        # All answers to one question are in the same split, so nothing leaks between splits.
        return References(inputs.all_documents, vocabulary=inputs.vocabulary)


@dataclass(frozen=True, kw_only=True)
class _Teacher:
    model: str
    dtype: str = "auto"
    device: str | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _between(1e-3, 100, temperature=self.temperature)
        if self.dtype not in DTYPES:
            accepted = settings.accepted_names(self.dtype, DTYPES)
            raise ValueError(f"dtype: got {self.dtype!r:.80}; accepted: {accepted}.")
        if self.device is not None and not _DEVICE.fullmatch(self.device):
            raise ValueError(
                f"device: got {self.device!r:.80}; accepted: cpu, cuda, cuda:N, mps, xpu, xpu:N."
            )

    def build(self, inputs: _BuildInputs) -> "Teacher":
        from dftserve.targets.teacher import Teacher

        return Teacher.load(
            self.model,
            vocabulary=inputs.vocabulary,
            dtype=self.dtype,
            device=self.device,
            temperature=self.temperature,
        )


@dataclass(frozen=True, kw_only=True)
class _Served:
    url: str
    model: str
    key_variable: str | None = None
    """The environment variable that holds the server's API key."""
    at_once: int = 4

    def __post_init__(self) -> None:
        _between(1, 1024, at_once=self.at_once)

    def check_inputs(self) -> None:
        from dftserve.openai_client import key_of

        key_of(self.key_variable)

    def build(self, inputs: _BuildInputs) -> "Source":
        from dftserve.targets.served import ServedTeacher

        return ServedTeacher(
            self.url,
            self.model,
            vocabulary=inputs.vocabulary,
            key_variable=self.key_variable,
            at_once=self.at_once,
        )


@dataclass(frozen=True, kw_only=True)
class _Principles:
    teacher: _Teacher
    principles: Mapping[str, str]
    """Name → text."""
    weights: Mapping[str, float] | None = None
    posterior_power: float = 1.0

    def __post_init__(self) -> None:
        from dftserve.targets.principles import check_principles, prior

        _between(1e-6, 1, posterior_power=self.posterior_power)
        check_principles(self.principles, "principles")
        prior(self.principles, self.weights)

    def build(self, inputs: _BuildInputs) -> "Source":
        from dftserve.targets.principles import Principles

        return Principles(
            self.teacher.build(inputs),
            inputs.tokenizer,
            self.principles,
            weights=self.weights,
            posterior_power=self.posterior_power,
        )


@dataclass(frozen=True, kw_only=True)
class _Temper:
    power: float
    of: Mapping[str, Any]

    def __post_init__(self) -> None:
        _between(1e-6, 1e6, power=self.power)

    def build(self, inputs: _BuildInputs) -> "Source":
        from dftserve.targets.combine import Temper

        return Temper(_built(self.of, inputs), self.power)


@dataclass(frozen=True, kw_only=True)
class _Tilt:
    of: Mapping[str, Any]
    phrases: tuple[str, ...]
    samples: str
    """A file or folder, read by `corpus.read`, of texts generated by the source `of`."""

    def __post_init__(self) -> None:
        if not self.phrases or not all(phrase.strip() for phrase in self.phrases):
            raise ValueError(
                f"phrases: got {list(self.phrases)!r:.80}; accepted: one text at least, none empty."
            )

    def check_inputs(self) -> None:
        from dftserve.corpus.read import check

        try:
            check(Path(self.samples))
        except ValueError as error:
            raise ValueError(f"tilt.samples: {error}") from None

    def build(self, inputs: _BuildInputs) -> "Source":
        from dftserve.corpus.read import read
        from dftserve.targets.encoding import encode
        from dftserve.targets.tilt import Tilt, phrases_of

        written = [encode(inputs.tokenizer, text).document for text in read(Path(self.samples))]
        return Tilt(
            _built(self.of, inputs),
            phrases_of(inputs.tokenizer, self.phrases),
            human=inputs.documents["train"],
            samples=written,
        )


@dataclass(frozen=True, kw_only=True)
class _Calibrated:
    teacher: _Teacher
    """The model before tuning."""
    in_context: int = 0
    """Documents of the corpus that the model reads before each document, in a separate component;
    0: no such component."""
    context_tokens: int = 768
    """Most tokens of these documents."""
    orders: tuple[int, ...] = (1, 2, 3, 5)
    """Orders of n-gram models, each a component."""
    min_count: int = 1
    decays: tuple[float, ...] = (0.95, 0.995)
    """Decays of caches of the document's own words, each a component."""
    students: str | None = None
    """A folder written by `train.cross_fit`."""
    others: tuple[Mapping[str, Any], ...] = ()
    """Further sources, each a component."""
    bins: Bins = field(default_factory=Bins)
    tokens: int = 30_000
    folds: int = 5
    shrinkage: float = 200.0
    """These three as in `calibrated.Fit`."""

    def __post_init__(self) -> None:
        _between(0, 1 << 10, in_context=self.in_context)
        _between(1, 1 << 20, context_tokens=self.context_tokens)
        _between(1, 1 << 30, min_count=self.min_count)
        _between(1000, 1 << 30, tokens=self.tokens)
        _between(2, 100, folds=self.folds)
        _between(0, 1e9, shrinkage=self.shrinkage)
        for order in self.orders:
            _between(1, 64, orders=order)
        for decay in self.decays:
            _between(1e-3, 1 - 1e-6, decays=decay)
        if not self.orders:
            raise ValueError("orders: got none; accepted: one at least, as [1, 2, 3].")
        for name in ("orders", "decays"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: got {list(values)}; accepted: each once.")

    def check_inputs(self) -> None:
        from dftserve.targets.students import CrossFitted

        if self.students is not None:
            CrossFitted.read(Path(self.students))

    def build(self, inputs: _BuildInputs) -> "Source":
        from dftserve.targets.calibrated import Calibrated, Fit, calibrate
        from dftserve.targets.ngram import Ngram

        teacher = self.teacher.build(inputs)
        # Weights are fitted on held-out texts, whose groups are not counted at all: to match,
        # the counts for a training text leave out its group.
        inputs = dataclasses.replace(inputs, leaves_out="group")
        ngram = Ngram(
            inputs.documents["train"],
            vocabulary=inputs.vocabulary,
            order=max(self.orders),
            min_count=self.min_count,
            leaves_out=inputs.leaves_out,
        )
        parts, heldout = self._parts(teacher, ngram, inputs), inputs.documents["heldout"]
        calibration = calibrate(
            parts,
            ngram,
            heldout,
            bins=self.bins,
            fit=Fit(tokens=self.tokens, folds=self.folds, shrinkage=self.shrinkage),
            known=inputs.known,
            say=inputs.say,
        )
        return Calibrated(parts, ngram, calibration, bins=self.bins, heldout=heldout)

    def _parts(
        self, teacher: "Teacher", ngram: "Ngram", inputs: _BuildInputs
    ) -> "dict[str, DenseSource]":
        """The components by name."""
        from dftserve.targets.cache import Cache
        from dftserve.targets.calibrated import NGRAM, STUDENTS, TEACHER
        from dftserve.targets.combine import dense
        from dftserve.targets.in_context import InContext
        from dftserve.targets.students import Students

        train = inputs.documents["train"]
        parts: dict[str, DenseSource] = {TEACHER: teacher}
        if self.in_context:
            parts["in context"] = InContext(
                teacher, train, number=self.in_context, tokens=self.context_tokens
            )
        parts |= {f"{NGRAM}{order}": ngram.at_order(order) for order in sorted(self.orders)}
        parts |= {
            f"cache {decay:g}": Cache(decay=decay, vocabulary=inputs.vocabulary)
            for decay in self.decays
        }
        if self.students is not None:
            parts[STUDENTS] = Students.load(
                Path(self.students),
                train,
                base=self.teacher.model,
                vocabulary=inputs.vocabulary,
                dtype=self.teacher.dtype,
                device=self.teacher.device,
            )
        for i, other in enumerate(self.others, 1):
            parts[f"{next(iter(other))} ({i})"] = dense(_built(other, inputs), "calibrated")
        return parts


_KINDS: Mapping[str, type] = {
    "ngram": _Ngram,
    "references": _References,
    "teacher": _Teacher,
    "served": _Served,
    "principles": _Principles,
    "temper": _Temper,
    "tilt": _Tilt,
    "calibrated": _Calibrated,
}
_MIXES = ("mix", "geomix")
_ALL = (*_KINDS, *_MIXES)
