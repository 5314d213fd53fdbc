"""The documents of a corpus: its texts, tokenised and cut, and the report of what was left out."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from dftserve.corpus.filters import Filters
from dftserve.corpus.prepare import Corpus, Report
from dftserve.corpus.records import opening
from dftserve.corpus.text import Text
from dftserve.targets.chat_template import ChatTemplate, TemplateError
from dftserve.targets.conversation import Encoded, UnfitError
from dftserve.targets.document import Document, spans
from dftserve.targets.encoding import encode
from dftserve.targets.store import SPLITS

FAR_FACTOR = 2.0
"""Factor by which the held-out share may differ from the requested one without a warning."""
_PIECE = re.compile(r"#\d+$")
"""What the origin of a piece of a text ends with."""


def encode_corpus(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    filters: Filters,
    *,
    max_tokens: int | None,
    skip_bad: bool = False,
) -> tuple[dict[str, list[Document]], dict[str, Any]]:
    """Tokenise a corpus; returns the documents by split, and a report in JSON types.

    Raises:
        ValueError: a conversation that the tokenizer's template refuses, unless `skip_bad`; the
            message names it. Or nothing is left to train on, or of what is held out.
    """
    templates = _templates(corpus, tokenizer)
    kept: set[str] = set()
    lost: set[str] = set()
    documents: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for text in getattr(corpus, split):
            encoded = _encoded(corpus.report, tokenizer, text, filters, skip_bad=skip_bad)
            if encoded is None:
                lost.add(_whole(text))
                continue
            reason = _unfit(encoded.document, text, max_tokens)
            if reason is not None:
                corpus.report.drop(reason, text.origin)
                lost.add(_whole(text))
                continue
            for note in dict.fromkeys(encoded.notes):
                corpus.report.note(note, text.origin)
            grouped = replace(encoded.document, group=text.family or opening(text) or _whole(text))
            documents[split] += windows(grouped, max_tokens)
            kept.add(_whole(text))
    for origin in lost - kept:
        corpus.report.lose(origin)
    counts = corpus.report.as_dict() | templates
    counts["documents"] = {split: len(documents[split]) for split in SPLITS}
    counts["tokens"] = {split: sum(len(d.tokens_N) for d in documents[split]) for split in SPLITS}
    counts["trained"] = {split: sum(d.trained for d in documents[split]) for split in SPLITS}
    if not documents["train"]:
        raise ValueError(f"nothing is left to train on:\n{corpus_text(counts)}")
    if corpus.heldout and not documents["heldout"]:
        raise ValueError(
            "nothing is left of what is held out; hold out other texts (--heldout-from), more of "
            f"them or by another --seed, or none (--heldout 0):\n{corpus_text(counts)}"
        )
    return documents, counts


def _encoded(
    report: Report,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    filters: Filters,
    *,
    skip_bad: bool,
) -> Encoded | None:
    """None if the text is left out, which is recorded in the report."""
    try:
        return encode(
            tokenizer,
            text,
            spelled=filters.special_tokens,  # type: ignore[arg-type]
            answers=filters.answers,  # type: ignore[arg-type]
        )
    except UnfitError as error:
        report.drop(f"{error}", text.origin)
    except TemplateError as error:
        if not skip_bad:
            raise ValueError(f"{text.origin}: {error} (--skip-bad leaves it out)") from None
        report.drop(f"{error}", text.origin)
    return None


def _unfit(document: Document, text: Text, max_tokens: int | None) -> str | None:
    if not document.trained_N.any():
        return "nothing to train on"
    if text.messages is not None and max_tokens and len(document.tokens_N) > max_tokens:
        return "longer than max_tokens"
    return None


def _whole(text: Text) -> str:
    """The origin of the text that a piece was cut from; unchanged for a whole text."""
    return _PIECE.sub("", text.origin)


def windows(document: Document, size: int | None) -> Iterator[Document]:
    """The document, split into windows if it is longer than `size` tokens."""
    count = len(document.tokens_N)
    if size is None or count <= size:
        yield document
        return
    for start, stop in spans(count, size):
        yield document.window(start, stop)


def _templates(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The chat templates that render the conversations, in JSON types; empty without conversations.

    Raises:
        ValueError: no template, or one that is not valid jinja; names the first conversation.
    """
    titles: dict[str, str] = {}
    for text in (*corpus.train, *corpus.heldout):
        if text.messages is None or (len(titles) and not text.tools):
            continue
        try:
            template = ChatTemplate.of(tokenizer, tools=bool(text.tools))
        except TemplateError as error:
            raise ValueError(f"{text.origin}: {error}") from None
        titles[template.title] = (
            "learns what it marks" if template.marks else "learns the answers, has no marks"
        )
        if len(titles) > 1 or not isinstance(tokenizer.chat_template, dict):
            break
    return {"templates": titles} if titles else {}


def corpus_text(report: Mapping[str, Any]) -> str:
    """The report of a corpus, for a terminal."""
    counts = ", ".join(f"{report[what]:,} {what}" for what in ("kept", "stripped", "joined"))
    lines = [f"{report['read']:,} texts read, {counts}."]
    for kind in ("dropped", "noted"):
        for reason, counted in report[kind].items():
            some = ", ".join(counted["examples"])
            more = ", …" if counted["count"] > len(counted["examples"]) else ""
            lines.append(f"  {kind}, {reason}: {counted['count']:,} ({some}{more})")
    lines += (f"  {title}: {what}" for title, what in report.get("templates", {}).items())
    if report["kept"] != (count := sum(report["documents"].values())):
        lines.append(f"  {report['kept']:,} texts in {count:,} documents: longer ones are cut")
    for split in SPLITS:
        documents, tokens, trained = (
            report[what][split] for what in ("documents", "tokens", "trained")
        )
        lines.append(f"  {split}: {documents:,} documents, {tokens:,} tokens, {trained:,} trained")
    if languages := report["languages"]:
        counted = ", ".join(f"{name} {count:,}" for name, count in languages.items())
        lines.append(f"  languages of the first texts: {counted} (corpus.languages chooses)")
    if report["compared"] < 1:
        lines.append(
            "  copies in part: long texts were compared by "
            f"{report['compared']:.2%} of their 5-grams"
        )
    asked, share = report["heldout_asked"], report["heldout_share"]
    lines.append(f"  held out: {share:.1%} of the words; asked for: {asked:.1%} of the texts")
    if asked and not asked / FAR_FACTOR <= share <= asked * FAR_FACTOR:
        lines.append(
            "  warning: that is far from what was asked: texts are few, or of very different "
            "lengths; give more of them, or another --heldout or --seed"
        )
    return "\n".join(lines)
