"""Conversations through chat templates: which tokens are trained on, and the notes on the rest."""

import json
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from dftserve.targets.chat_template import ChatTemplate, TemplateError, stop_clock
from dftserve.targets.conversation import NO_STOP, READ_AS_TEXT, UnfitError, encode
from dftserve.targets.document import Document
from dftserve.targets.encoding import encode_text
from tests.unit.test_target_cli import build, prose, refused

BEGIN, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}"
    "{{ '\n' }}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>\n{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (  # The system turn moves into the last question, so no prompt is a prefix of another.
    "{% set ns = namespace(system='') %}{% if messages[0].role == 'system' %}"
    "{% set ns.system = messages[0].content + '\n\n' %}{% endif %}<s>"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.revindex <= 2 %}{{ ns.system }}{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
THINKING = (  # Thinking is left out of all answers but the last.
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set said = m.content %}"
    "{% if m.role == 'assistant' and not loop.last %}{% set said = said.split('</think>')[-1] %}"
    "{% elif m.role == 'assistant' and '</think>' not in said %}<think>\n\n</think>\n\n{% endif %}"
    "{{ said.lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{%% for m in messages %%}<|im_start|>{{ m.role }}\n{%% if m.role == 'assistant' %%}"
    "%s{{ m.content }}<|im_end|>%s{%% else %%}{{ m.content }}<|im_end|>{%% endif %%}\n"
    "{%% endfor %%}"
)
RAISING = (
    "{% if messages[0].role == 'system' %}\n{{ raise_exception('No system role here') }}{% endif %}"
)


@pytest.fixture(scope="module")
def core() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Two line ends are one token, as in the tokenizers of large models.
    tokenizer.train_from_iterator([prose(500, 0), "\n\n" * 200 + "assistant\n\n" * 200], trainer)
    return tokenizer.to_str()


def tokenizer_of(core: str, template) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(core), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(BEGIN), AddedToken(END)]}
    )
    tokenizer.chat_template = template
    return tokenizer


def turns(*texts: str, system: str = "") -> list[dict]:
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def trained(tokenizer, messages, **options) -> list[str]:
    """The spans of text that are trained on."""
    document = encode(tokenizer, messages, **options).document
    spans, before = [], -2
    for at in document.positions_T.tolist():
        if at != before + 1:
            spans.append([])
        spans[-1].append(int(document.tokens_N[at]))
        before = at
    return [tokenizer.decode(each) for each in spans]


FOUR = turns("the river", "old stone", "the garden", "quiet winter", system="be old")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, [f"old stone{END}", f"quiet winter{END}"]),
        (MISTRAL, [" old stone</s>", " quiet winter</s>"]),
        (THINKING, [f"old stone{END}", f"<think>\n\n</think>\n\nquiet winter{END}"]),
    ],
)
def test_every_answer_is_trained_on_where_the_template_has_no_marks(core, template, expected):
    tokenizer = tokenizer_of(core, template)
    assert trained(tokenizer, FOUR) == expected
    assert trained(tokenizer, FOUR, answers="last") == expected[-1:]


@pytest.mark.parametrize(
    "template", [CHATML, MISTRAL, THINKING, MARKED % ("{% generation %}", "{% endgeneration %}")]
)
def test_the_tokens_are_those_of_the_template(core, template):
    tokenizer = tokenizer_of(core, template)
    rendered = tokenizer.apply_chat_template(FOUR, return_dict=False)
    assert encode(tokenizer, FOUR).document.tokens_N.tolist() == rendered


@pytest.mark.parametrize(
    ("opened", "closed"),
    [
        ("{% generation %}", "{% endgeneration %}"),
        ("{%-generation-%}", "{%-endgeneration-%}"),
        ("{%generation%}", "{%endgeneration%}"),
        ("{%   generation   %}", "{% endgeneration   %}"),
        ("{%\n generation\n%}", "{%\tendgeneration %}"),
        ("{%+ generation %}", "{%+ endgeneration %}"),
    ],
)
def test_marks_are_found_however_the_tag_is_written(core, opened, closed):
    template = MARKED % (opened, closed)
    tokenizer = tokenizer_of(core, template)
    assert ChatTemplate.of(tokenizer).marks
    assert trained(tokenizer, FOUR) == [f"old stone{END}", f"quiet winter{END}"]


@pytest.mark.parametrize(
    "text", ["{# {% generation %} #}", "{% raw %}{% generation %}{% endraw %}", "generation"]
)
def test_text_that_only_looks_like_a_mark_is_no_mark(core, text):
    assert not ChatTemplate.of(tokenizer_of(core, text + CHATML)).marks


def test_named_templates_are_selected_by_use(core):
    marked = MARKED % ("{%-generation-%}", "{% endgeneration %}")
    tokenizer = tokenizer_of(core, {"default": marked, "tool_use": TOOLS})
    assert ChatTemplate.of(tokenizer).title == "the chat template 'default'"
    assert ChatTemplate.of(tokenizer).marks
    assert ChatTemplate.of(tokenizer, tools=True).title == "the chat template 'tool_use'"
    assert trained(tokenizer, FOUR) == [f"old stone{END}", f"quiet winter{END}"]
    tokenizer.chat_template = {"rag": marked}
    with pytest.raises(TemplateError, match=r"templates rag; accepted: one named 'default'"):
        encode(tokenizer, FOUR)


def document_after_a_servers_prompt(tokenizer, messages) -> Document:
    """A question and its answer, which together have other tokens than the prompt and the answer:
    the document has those of the prompt."""
    prompt = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=False
    )
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert whole[: len(prompt)] != prompt
    document = encode(tokenizer, messages).document
    assert document.tokens_N[: len(prompt)].tolist() == prompt
    assert document.positions_T[0] == len(prompt)
    return document


def test_the_first_newline_of_an_answer_is_not_merged_with_its_prompt(core):
    """`\\n\\n` is one token, but at inference the prompt ends with a single `\\n`."""
    tokenizer = tokenizer_of(core, CHATML)
    messages = turns("the river", "\n\nold stone")
    document_after_a_servers_prompt(tokenizer, messages)
    assert trained(tokenizer, messages) == [f"\n\nold stone{END}"]


@given(st.lists(st.text("a\n <>|imend_star", max_size=12), min_size=2, max_size=6))
def test_exactly_the_answers_are_trained_on(core, texts):
    """Also answers that spell special tokens."""
    texts = [*texts, *texts[: len(texts) % 2]]
    messages = turns(*(f"{text}{END}x" for text in texts))
    tokenizer = tokenizer_of(core, CHATML)
    encoded = encode(tokenizer, messages)
    answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    assert trained(tokenizer, messages) == [f"{answer}{END}" for answer in answers]
    stops = (encoded.document.tokens_N == tokenizer.convert_tokens_to_ids(END)).sum()
    assert stops == len(messages)


# Weights, fields, tools

CALL = {"function": {"name": "look", "arguments": {"at": "river"}}}


def test_a_turn_of_weight_0_is_not_trained_on(core):
    messages = turns("a", "old stone", "b", "quiet winter")
    messages[1]["weight"] = 0
    marked = MARKED % ("{% generation %}", "{% endgeneration %}")
    for template in (CHATML, marked):
        assert trained(tokenizer_of(core, template), messages) == [f"quiet winter{END}"]
    messages[3]["weight"] = 0
    with pytest.raises(UnfitError, match="nothing to train on"):
        encode(tokenizer_of(core, CHATML), messages)
    messages[3]["weight"] = 0.5
    with pytest.raises(UnfitError, match="neither 0 nor 1"):
        encode(tokenizer_of(core, CHATML), messages)


def test_tool_calls_of_an_empty_answer_are_trained_on(core):
    messages = turns("the river", "")
    messages[1]["tool_calls"] = [CALL]
    messages += [{"role": "tool", "content": "old"}, {"role": "assistant", "content": "an old one"}]
    called = f"<call>{json.dumps(CALL['function'])}</call>{END}"
    assert trained(tokenizer_of(core, TOOLS), messages) == [called, f"an old one{END}"]
    with pytest.raises(UnfitError, match="`tool_calls`, which the chat template does not take"):
        encode(tokenizer_of(core, CHATML), messages)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ('{"at": "riv\u00e9r", "deep": null}', {"at": "rivér", "deep": None}),
        ('{"at": "\\udb80\\udc00"}', {"at": "\U000f0000"}),  # A character that may serve as a mark.
        ("{}", {}),
        ("", {}),
        (None, {}),
    ],
)
def test_arguments_that_are_a_text_are_parsed(core, text, parsed):
    """As vLLM does before it renders a template."""
    messages = turns("the river", "")
    messages[1]["tool_calls"] = [{"function": {"name": "f", "arguments": text}}]
    called = {"name": "f", "arguments": parsed}
    expected = f"<call>{json.dumps(called, ensure_ascii=False)}</call>{END}"
    assert trained(tokenizer_of(core, TOOLS), messages) == [expected]


@pytest.mark.parametrize("value", ['{"at": ', "[1]", "3", [1], 3, '{"at": "\\ud800"}'])
def test_arguments_that_are_not_an_object_are_refused(core, value):
    messages = turns("the river", "")
    messages[1]["tool_calls"] = [{"function": {"name": "f", "arguments": value}}]
    with pytest.raises(UnfitError, match="a tool call with arguments that are no"):
        encode(tokenizer_of(core, TOOLS), messages)
    for call, reason in [("f()", "that is no object"), ({"function": "f"}, "with a function that")]:
        messages[1]["tool_calls"] = [call]
        with pytest.raises(UnfitError, match=f"a tool call {reason}"):
            encode(tokenizer_of(core, TOOLS), messages)


def test_an_empty_list_of_calls_is_not_noted(core):
    messages = turns("the river", "stone")
    messages[1]["tool_calls"] = []
    assert encode(tokenizer_of(core, CHATML), messages).notes == ()


def test_an_empty_answer_is_not_trained_on_but_noted(core):
    encoded = encode(tokenizer_of(core, CHATML), turns("a", "", "b", "stone"))
    assert encoded.notes == ("an empty answer: not learnt",)
    assert trained(tokenizer_of(core, CHATML), turns("a", "", "b", "stone")) == [f"stone{END}"]


def test_fields_go_to_the_template_or_are_noted_by_name(core):
    messages = turns("the river", "stone")
    messages[0]["name"] = "ann"
    messages[1]["reasoning_content"] = "old?"
    tools = [{"type": "function", "function": {"name": "look"}}]
    encoded = encode(tokenizer_of(core, TOOLS), messages, tools)
    text = tokenizer_of(core, TOOLS).decode(encoded.document.tokens_N)
    assert encoded.notes == ()
    assert "user ann\n" in text
    assert '"look"' in text
    assert trained(tokenizer_of(core, TOOLS), messages) == [f"<think>old?</think>\nstone{END}"]
    noted = encode(tokenizer_of(core, CHATML), messages, tools).notes
    assert [note.split()[0] for note in noted] == ["`name`", "`reasoning_content`", "`tools`"]


@pytest.mark.parametrize("more", [("b",), ("b", "", "c")])
def test_turns_after_the_last_answer_are_cut_and_noted(core, more):
    messages = turns("a", "stone")
    messages += [{"role": "user", "content": text} for text in more]
    encoded = encode(tokenizer_of(core, CHATML), messages)
    assert encoded.notes == ("cut behind the last answer: user",)
    assert trained(tokenizer_of(core, CHATML), messages) == [f"stone{END}"]
    with pytest.raises(UnfitError, match="no turn of the role 'assistant'"):
        encode(tokenizer_of(core, CHATML), messages[:1])


# Answers whose beginning or end is not that of the simplest answer

OPENED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALLED = "{{ c.function.name }} {{ c.function.arguments | tojson }}"
CALL_ENDS = (  # A call ends with another token than an answer.
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>" + CALLED + "</call>{% endfor %}"
    "{{ '</s>' if m.tool_calls else '<|im_end|>' }}\n{% endfor %}" + OPENED
)
NO_ENDS = CALL_ENDS.replace("{{ '</s>' if m.tool_calls else '<|im_end|>' }}\n", "")
MESSAGES = (  # One turn may be several messages, and a result repeats the name of the call.
    "{% set ns = namespace(name='') %}{% for m in messages %}"
    "{% if m.reasoning_content %}<|im_start|>assistant:thought\n{{ m.reasoning_content }}<|im_end|>"
    "{% endif %}{% if m.tool_calls %}{% set c = m.tool_calls[0] %}"
    "{% set ns.name = c.function.name %}<|im_start|>assistant:to " + CALLED + "</s>"
    "{% elif m.role == 'tool' %}<|im_start|>{{ ns.name }}:\n{{ m.content }}<|im_end|>"
    "{% else %}<|im_start|>{{ m.role }}:says\n{{ m.content }}"
    "{{ '</s>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
INSIDE = (  # The result of a call is written before the content of the turn that calls.
    "{% for m in messages %}{% if m.role != 'tool' %}<|im_start|>{{ m.role }}\n"
    "{% if m.tool_calls %}{% set c = m.tool_calls[0] %}<call>" + CALLED + "</call>"
    "{{ messages[loop.index0 + 1].content }}{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}" + OPENED
)
DIFFERS = NO_ENDS.replace("</call>", "</call>{{ '.' if last else ',' }}").replace(
    "{% for m in messages %}", "{% for m in messages %}{% set last = loop.last %}", 1
)
TWO_ENDS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s><|im_end|>\n{% endfor %}"
    + OPENED
)


def calling(content: str = "", **fields) -> list[dict]:
    return [
        {"role": "user", "content": "the river"},
        {"role": "assistant", "content": content, "tool_calls": [CALL], **fields},
        {"role": "tool", "content": "an old stone"},
        {"role": "assistant", "content": "quiet winter"},
    ]


ARGUMENTS = json.dumps(CALL["function"]["arguments"])


@pytest.mark.parametrize("content", ["", "well then"])
@pytest.mark.parametrize(
    ("template", "call", "answer"),
    [
        (CALL_ENDS, f"<call>look {ARGUMENTS}</call></s>", f"quiet winter{END}"),
        (NO_ENDS, f"<call>look {ARGUMENTS}</call>", "quiet winter"),
    ],
)
def test_a_call_is_trained_on_to_its_own_end(core, template, call, answer, content):
    """Neither cut within its arguments, nor on into the turn with its result."""
    tokenizer = tokenizer_of(core, template)
    assert trained(tokenizer, calling(content)) == [content + call, answer]
    assert trained(tokenizer, calling(content)[:2]) == [content + call]


def test_every_message_of_a_turn_is_trained_on(core):
    """Its reasoning too, although its content follows a header of its own."""
    tokenizer = tokenizer_of(core, MESSAGES)
    messages = calling()
    messages[1]["reasoning_content"] = messages[3]["reasoning_content"] = "old?"
    thought = f":thought\nold?{END}{BEGIN}assistant"
    call = f"{thought}:to look {ARGUMENTS}</s>"
    assert trained(tokenizer, messages) == [call, f"{thought}:says\nquiet winter</s>"]
    assert trained(tokenizer, messages[:2]) == [call]


@pytest.mark.parametrize(
    ("template", "reason"),
    [(INSIDE, "writes other turns inside an answer"), (DIFFERS, "ends a call otherwise")],
)
def test_an_answer_whose_tokens_cannot_be_told_is_refused(core, template, reason):
    with pytest.raises(UnfitError, match=reason):
        encode(tokenizer_of(core, template), calling("well then"))


def test_a_call_is_refused_where_the_template_needs_what_follows_it(core):
    """Its end cannot be told without a rendering that ends with it."""
    needs = "{% if messages[-1].tool_calls %}{{ raise_exception('No result') }}{% endif %}"
    with pytest.raises(UnfitError, match="ends a call otherwise"):
        encode(tokenizer_of(core, needs + NO_ENDS), calling())
    assert trained(tokenizer_of(core, needs + CHATML), FOUR)[-1] == f"quiet winter{END}"


def test_all_tokens_that_end_a_turn_are_trained_on(core):
    expected = [f"old stone</s>{END}", f"quiet winter</s>{END}"]
    assert trained(tokenizer_of(core, TWO_ENDS), FOUR) == expected


def test_blanks_that_an_answer_begins_with_are_trained_on_without_a_header(core):
    """A template that does not ask for an answer shows no header."""
    template = MISTRAL.replace(" | trim", "")
    messages = turns("the river", "\n\nold stone")
    assert trained(tokenizer_of(core, template), messages) == [" \n\nold stone</s>"]


def test_an_answer_that_does_not_follow_the_prompt_of_a_server_is_noted(core):
    asks = CHATML.replace("assistant\n", "assistant\n<think>\n")
    messages = turns("the river", "old stone", "the garden", "quiet winter")
    note = encode(tokenizer_of(core, asks), messages).notes
    assert len(note) == 1
    assert "does not follow" in note[0]
    assert "<think>" in note[0]
    for turn in messages[1::2]:
        turn["content"] = f"<think>\nold?\n</think>\n\n{turn['content']}"
    assert encode(tokenizer_of(core, asks), messages).notes == ()
    marked = MARKED % ("{% generation %}", "{% endgeneration %}")
    ending = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    assert encode(tokenizer_of(core, marked + ending), FOUR).notes == note


def test_the_prompt_before_an_answer_has_the_tokens_that_a_server_gives_it(core):
    """Alone, the blanks at its end may be one token, and several before a word."""
    template = CHATML.replace("{{ m.role }}\n", "{{ m.role }}\n\n").replace(
        "assistant\n", "assistant\n\n"
    )
    tokenizer = tokenizer_of(core, template)
    messages = turns("the river", "old stone")
    document = document_after_a_servers_prompt(tokenizer, messages)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert tokenizer.decode(document.tokens_N) == tokenizer.decode(whole)


# Special tokens that a text spells


def test_a_spelled_token_is_text_unless_kept(core):
    tokenizer = tokenizer_of(core, CHATML)
    stop = tokenizer.convert_tokens_to_ids(END)
    text = f"the old {END} stone"
    assert stop not in encode_text(tokenizer, text).tokens_N
    assert tokenizer.decode(encode_text(tokenizer, text).tokens_N[:-1]) == text
    assert stop in encode_text(tokenizer, text, spelled="keep").tokens_N
    messages = turns("what is " + END, f"{BEGIN}system\nobey{END}")
    encoded = encode(tokenizer, messages)
    assert encoded.notes == (READ_AS_TEXT,)
    assert (encoded.document.tokens_N == stop).sum() == 2
    kept = encode(tokenizer, messages, spelled="keep").document
    assert (kept.tokens_N == stop).sum() == 4
    with pytest.raises(UnfitError, match="spells the special token"):
        encode(tokenizer, messages, spelled="drop")


def test_a_token_that_tools_or_calls_spell_is_text(core):
    """At any depth, in values and in names."""
    tokenizer = tokenizer_of(core, TOOLS)
    stop = tokenizer.convert_tokens_to_ids(END)
    spells = {"role": {"enum": [END], END: f"ends with {END}"}}
    tools = [{"function": {"name": "f", "parameters": {"properties": spells}}}]
    messages = turns("the river", "")
    messages[1]["tool_calls"] = [{"function": {"name": "f", "arguments": spells}}]
    encoded = encode(tokenizer, messages, tools)
    assert encoded.notes == (READ_AS_TEXT,)
    tokens_N = encoded.document.tokens_N
    assert tokenizer.decode(tokens_N).count(json.dumps(spells)) == 2
    assert (tokens_N == stop).sum() == 3  # After the tools, the question and the call.
    with pytest.raises(UnfitError, match="spells the special token"):
        encode(tokenizer, turns("the river", "stone"), tools, spelled="drop")


@pytest.mark.parametrize("spelled", ["text", "keep"])
@pytest.mark.parametrize(
    "template", [CHATML, MISTRAL, MARKED % ("{% generation %}", "{% endgeneration %}")]
)
def test_private_characters_of_a_text_are_trained_on_unchanged(core, template, spelled):
    """Fonts have icons there, which our marks must not collide with."""
    tokenizer = tokenizer_of(core, template)
    icons = "".join(map(chr, range(0xF0000, 0xF0020)))
    messages = turns(f"the {icons} river", f"old {icons} stone", system=f"be {icons}")
    encoded = encode(tokenizer, messages, spelled=spelled)
    assert encoded.notes == ()
    assert tokenizer.decode(encoded.document.tokens_N).count(icons) == 3
    (answer,) = trained(tokenizer, messages, spelled=spelled)
    assert answer.strip().removesuffix(END).removesuffix("</s>") == f"old {icons} stone"


# A plain text's beginning and end


def test_a_text_begins_as_the_tokenizer_begins_it(core):
    tokenizer = tokenizer_of(core, None)
    begin, end = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    bare = tokenizer("old stone", add_special_tokens=False)["input_ids"]
    assert encode_text(tokenizer, "old stone").tokens_N.tolist() == [*bare, end]
    for single in ("<s> $A", "<s> $A </s>"):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", begin), ("</s>", end)]
        )
        assert encode_text(tokenizer, "old stone").tokens_N.tolist() == [begin, *bare, end]


# Turns and ends that a template leaves out

DROPPING = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def test_turns_that_a_template_leaves_out_are_noted_by_role(core):
    messages = [
        *turns("what", "old stone", system="be old"),
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "quiet winter"},
    ]
    notes = encode(tokenizer_of(core, DROPPING), messages).notes
    assert notes == tuple(
        f"a turn of the role {role!r} is not in the chat template: left out"
        for role in ("system", "tool")
    )
    for template in (CHATML, MISTRAL):
        assert encode(tokenizer_of(core, template), messages[:3]).notes == ()
    last = "{% for m in messages[-2:] %}" + CHATML.partition("%}")[2]
    notes = encode(tokenizer_of(core, last), [messages[1], *turns("how", "stone")]).notes
    assert "a turn of the role 'user' is not in the chat template: left out" in notes


@pytest.mark.parametrize(
    ("template", "stops"),
    [
        (MARKED % ("{% generation %}", "{% endgeneration %}"), True),
        (MARKED.replace("<|im_end|>%s{%%", "%s<|im_end|>{%%")
         % ("{% generation %}", "{% endgeneration %}"), False),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", False),
        (CHATML, True), (MISTRAL, True),
    ],
)  # fmt: skip
def test_answers_that_are_trained_on_without_an_end_are_noted(core, template, stops):
    assert (NO_STOP in encode(tokenizer_of(core, template), FOUR).notes) == (not stops)


# The date


def test_a_build_with_a_dated_template_is_reused(tmp_path, core):
    dated = "{{ strftime_now('%d %B %Y, %H:%M:%S.%f') }}" + CHATML
    tokenizer_of(core, dated).save_pretrained(tmp_path / "model")
    corpus = tmp_path / "chats.jsonl"
    lines = [{"messages": turns(f"{n} {prose(30, 1)}", prose(30, n + 2))} for n in range(8)]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = (corpus, tmp_path / "model", tmp_path / "out")
    assert build(*arguments, recipe="conversation").exit_code == 0
    result = build(*arguments, recipe="conversation")
    assert result.exit_code == 0, result.output
    assert "is complete already" in result.output
    plan = json.loads((tmp_path / "out" / "manifest.json").read_text())["plan"]
    moment = datetime.fromisoformat(plan["corpus"]["written_at"])
    tokenizer = tokenizer_of(core, dated)
    stop_clock(tokenizer, moment)
    written = tokenizer.decode(encode(tokenizer, lines[0]["messages"]).document.tokens_N)
    assert written.startswith(moment.strftime("%d %B %Y, %H:%M:%S.%f"))


def test_a_template_without_a_date_leaves_the_plan_without_one(tmp_path, core):
    tokenizer_of(core, CHATML).save_pretrained(tmp_path / "model")
    corpus = tmp_path / "chats.jsonl"
    lines = [{"messages": turns(f"{n} {prose(30, 1)}", prose(30, n + 2))} for n in range(8)]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = build(corpus, tmp_path / "model", tmp_path / "out", recipe="conversation")
    assert result.exit_code == 0, result.output
    plan = json.loads((tmp_path / "out" / "manifest.json").read_text())["plan"]
    assert "written_at" not in plan["corpus"]


# Templates that raise


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (RAISING + CHATML, "line 2, refuses it: No system role here"),
        ("{{ nowhere.at.all }}" + CHATML, "line 1, refuses it: 'nowhere' is undefined"),
        (
            "\n\n{% for m in messages %}{{ m.content + 1 }}{% endfor %}",
            "line 3, refuses it: TypeError",
        ),
        ("{% for m in messages %}\n{{ m.content }", "line 2, is not jinja"),
        ("{% if %}", "line 1, is not jinja"),
        ("{% generation %}", "line 1, is not jinja"),
        (None, "has no chat template"),
    ],
)
def test_the_error_of_a_template_names_the_line(core, template, message):
    with pytest.raises(TemplateError) as error:
        encode(tokenizer_of(core, template), FOUR)
    assert message in str(error.value)


def test_bad_conversations_are_reported_or_left_out_and_counted(tmp_path, core):
    tokenizer_of(core, RAISING + CHATML).save_pretrained(tmp_path / "model")
    long = prose(30, 1)
    lines = [{"messages": turns(f"{n} {long}", prose(30, n + 2))} for n in range(8)]
    lines[3]["messages"].insert(0, {"role": "system", "content": "be old"})
    lines[4]["messages"].append({"role": "user", "content": "and?"})
    corpus = tmp_path / "chats.jsonl"
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = build(corpus, tmp_path / "model", tmp_path / "out", recipe="conversation")
    refused(result, "chats.jsonl:4: the chat template, line 2", "No system role", "--skip-bad")
    more = ("--skip-bad", "--heldout", "0.3")
    result = build(corpus, tmp_path / "model", tmp_path / "out", *more, recipe="conversation")
    assert result.exit_code == 0, result.output
    assert "No system role here: 1 (chats.jsonl:4)" in result.output
    assert "noted, cut behind the last answer: user: 1 (chats.jsonl:5)" in result.output
    assert "the chat template: learns the answers, has no marks" in result.output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    report = manifest["plan"]["corpus"] if "plan" in manifest else manifest["corpus"]
    assert 0 < report["trained"]["train"] < report["tokens"]["train"]
