"""Which tokens of a conversation are the assistant's, as transformers says by the same templates."""

import pytest
from chat_templates import CHATML, FORGETFUL, MARKED, TALK
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from heddle.data.chat import assistant_spans, marks_answers, opening, render
from heddle.data.tokenizers import Tokenizer


def texts(template, messages=TALK):
    text, spans = assistant_spans(template, messages, {})
    return text, [text[begin:end] for begin, end in spans]


def test_the_assistants_text_is_found_with_marks_and_without():
    text, marked = texts(MARKED)
    assert text == render(MARKED, TALK, {}) == render(CHATML, TALK, {})
    assert marked == [m["content"] + "<|im_end|>" for m in TALK if m["role"] == "assistant"]
    assert (marks_answers(MARKED), marks_answers(CHATML)) == (True, False)
    assert texts(CHATML)[1] == [answer + "\n" for answer in marked]  # what a turn adds: the line's end too
    assert text.startswith(opening(CHATML, TALK[:4], text, {}))


def test_a_template_that_rewrites_what_was_said_is_refused():
    assert texts(FORGETFUL, TALK[:3])[1] == [TALK[2]["content"] + "\n"]
    thoughtful = [*TALK[:2], {"role": "assistant", "content": "<think>so</think>yes"}, *TALK[3:]]
    with pytest.raises(ValueError, match="writes the conversation before message 2 differently"):
        assistant_spans(FORGETFUL, thoughtful, {})
    with pytest.raises(ValueError, match="before message 4 differently"):
        opening(FORGETFUL, thoughtful[:4], "something else", {})


def test_what_a_template_refuses_is_said():
    with pytest.raises(ValueError, match="the chat template refuses these messages: no systems"):
        assistant_spans("{{ raise_exception('no systems') }}", TALK, {})
    with pytest.raises(ValueError, match="the chat template refuses these messages"):
        render("{% generation %}", TALK, {})


def test_tokens_are_marked_as_transformers_marks_them():
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Ġ", "H"), ("e", "d"), ("d", "l"), ("a", "n"), ("Ċ", "<"), (">", "Ċ")]  # some cross the borders
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=MARKED)
    expected = theirs.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    ids, learned = Tokenizer(backend, chat_template=MARKED).encode_spans(*assistant_spans(MARKED, TALK, {}))
    assert ids == expected["input_ids"]
    assert [int(x) for x in learned] == expected["assistant_masks"]
    assert 0 < sum(learned) < len(learned)
