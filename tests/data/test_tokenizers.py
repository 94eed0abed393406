"""Tokenizers: the same ids as transformers, text back whole, and chat as the template has it."""

import json
import logging
import random
import sys

import numpy as np
import pytest
import tiny_gguf
import tokenizers
import transformers
from tiny_models import hugging_face
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from heddle.data.gguf import GGUF
from heddle.data.tokenizers import Decoder, Tokenizer, load_tokenizer

TEXTS = [
    "",
    "Hello, world!",
    "  leading, trailing  ",
    "tabs\tand\r\nline ends\n\n\n   \n",
    "It's they'll WE'VE I'm 'tis",
    "12345 3.14 1e-10 0x1F ٣٤ ²",
    "def f(x):\n    return {'a': [x ** 2, -1]}  # comment\n",
    "naïve café Straße İstanbul ﬁ",
    "e\u0301 and é: one letter, two spellings",
    "中文字符 日本語 한국어 العربية हिन्दी",
    "🎉 👩‍👩‍👧‍👦 🇫🇷 \U0001f9d1\U0001f3fd",
    "\x00\x01\x7f\u200b\ufeff\u00a0\ufffd",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<|im_start|<|im_end|>>",
    "a" * 500,
]


def noise(count: int) -> list[str]:
    """Random strings of characters from everywhere but the surrogates."""
    rng = random.Random(0)
    points = [p for p in range(sys.maxunicode + 1) if not 0xD800 <= p < 0xE000]
    return ["".join(map(chr, rng.choices(points[:0x3000] + points[::997], k=40))) for _ in range(count)]


@pytest.fixture(scope="module")
def embedded() -> Tokenizer:
    return Tokenizer.from_pretrained()


@pytest.fixture
def quiet(caplog, monkeypatch):
    """Transformers' warnings, of which there must be none."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    yield
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def theirs(embedded, tmp_path, quiet):
    """What transformers makes of the embedded tokenizer, saved in a model's folder."""
    embedded.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return transformers.AutoTokenizer.from_pretrained(tmp_path)


def test_the_embedded_tokenizer_is_transformers_on_awkward_texts(embedded, theirs):
    for text in TEXTS + noise(200):
        ids = embedded.encode(text)
        assert ids == theirs(text).input_ids
        assert embedded.decode(ids, skip_special=False) == theirs.decode(ids)
        if text in TEXTS:  # the vocabulary lacks a few bytes, of which only rare characters are made
            assert theirs.decode(ids) == text
        assert embedded.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_the_embedded_tokenizer_is_smollm2s(embedded, theirs):
    assert (embedded.vocab_size, embedded.bos_id, embedded.eos_id, embedded.pad_id) == (49152, 1, 2, 2)
    assert embedded.stop_ids == (0, 2)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    assert theirs.model_max_length == 8192
    # Digits are cut one by one, and a space belongs to the word after it.
    pieces = [embedded.decode([i]) for i in embedded.encode("The year 2024 is here")]
    assert pieces == ["The", " year", " ", "2", "0", "2", "4", " is", " here"]


def test_a_folder_gives_the_same_tokenizer_again(embedded, tmp_path):
    embedded.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert (again.special, again.chat_template) == (embedded.special, embedded.chat_template)
    assert all(again.encode(text) == embedded.encode(text) for text in TEXTS)
    again.save_pretrained(tmp_path / "twice")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "twice" / name).read_text() == (tmp_path / name).read_text()


# ---------------------------------------------------------------------- chat


def test_chat_is_what_transformers_makes_of_the_template(embedded, theirs):
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "中"},
    ]
    for messages in (talk, [{"role": "system", "content": "Be brief."}, *talk]):
        for prompt in (True, False):
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert embedded.chat(messages, add_generation_prompt=prompt) == expected


def chatting(template: str) -> Tokenizer:
    plain = Tokenizer.bytes()
    return Tokenizer(plain.backend, plain.special, chat_template=template)


def test_templates_have_what_they_use():
    template = (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
        "{{ eos_token }}{{ strftime_now('%Y') | length }}{{ tools is none }}"
    )
    messages = [{"role": "user", "content": "ü<"}, {"role": "assistant", "content": ""}]
    assert chatting(template).chat(messages) == '{"role": "user", "content": "ü<"}<|endoftext|>4True'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "must have a chat template to chat, got none"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{% if %}", "refuses these messages"),
        ("{{ messages[0]['content'] + 1 }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "refuses these messages"),
    ],
)
def test_templates_that_fail_or_reach_too_far_are_refused(template, message):
    with pytest.raises(ValueError, match=message):
        chatting(template).chat([{"role": "user", "content": "x"}])


# ---------------------------------------------------------------------- one id at a time


def sentencepiece() -> Tokenizer:
    """As Llama 2's and Mistral's: a few words, and tokens of single bytes for all else."""
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    for token in ("▁", "t", "h", "e", "▁t", "he", "▁the"):
        vocabulary[token] = len(vocabulary)
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


@pytest.mark.parametrize("kind", ["embedded", "bytes", "sentencepiece"])
def test_pieces_add_up_to_the_text_and_split_no_character(kind, embedded):
    tokenizer = {"embedded": lambda: embedded, "bytes": Tokenizer.bytes, "sentencepiece": sentencepiece}[kind]()
    for text in TEXTS + noise(20):
        decoder = tokenizer.decoder(skip_special=False)
        ids = tokenizer.encode(text)
        pieces = [decoder.add(i) for i in ids]
        decoded = tokenizer.decode(ids, skip_special=False)
        assert "".join(pieces) + decoder.rest() == decoded
        if "\ufffd" not in decoded:
            assert not any("\ufffd" in piece for piece in pieces)


def test_broken_bytes_come_out_as_soon_as_they_are_certain():
    tokenizer = Tokenizer.bytes()
    party = list("🎉".encode())
    decoder = tokenizer.decoder()
    assert [decoder.add(byte) for byte in party] == ["", "", "", "🎉"]
    assert [decoder.add(byte) for byte in (party[0], party[1], ord("x"))] == ["", "", "\ufffdx"]
    assert [decoder.add(0xFF) for _ in range(5)] == ["", "", "", "\ufffd", "\ufffd"]
    assert decoder.rest() == "\ufffd" * 3
    assert decoder.add(ord("y")) == "y"
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.integers(0, 256, 30).tolist()
        decoder = tokenizer.decoder()
        assert "".join(map(decoder.add, ids)) + decoder.rest() == tokenizer.decode(ids)


def test_characters_in_tokens_of_bytes_come_whole_and_broken_ones_in_the_end():
    tokenizer = sentencepiece()

    def pieces(*values: int | str) -> list[str]:
        decoder = tokenizer.decoder()
        ids = [1 + v if isinstance(v, int) else tokenizer.backend.token_to_id(v) for v in values]
        return [*(decoder.add(i) for i in ids), decoder.rest()]

    party, dots = "🎉".encode(), "…".encode()
    assert pieces("▁the", *party, *dots, *party, "he") == [
        "the", "", "", "", "🎉", "", "", "…", "", "", "", "🎉", "he", "",
    ]  # fmt: skip
    assert pieces("▁the", *party[:3]) == ["the", "", "", "", "\ufffd" * 3]
    assert pieces(*[0xFF] * 5, "he") == ["", "", "", "\ufffd", "\ufffd", "\ufffd\ufffd\ufffdhe", ""]
    assert pieces(*dots, party[0], "he", *dots) == ["", "", "…", "", "\ufffdhe", "", "", "…", ""]
    rng = np.random.default_rng(0)
    for _ in range(200):  # bytes that never become a character, among words
        ids = rng.choice([1 + 0xE2, 1 + 0xFF, 258, 262], 30).tolist()
        decoder = tokenizer.decoder()
        assert "".join(map(decoder.add, ids)) + decoder.rest() == tokenizer.decode(ids)


def test_a_vocabulary_whose_text_depends_on_what_came_before():
    words = {0: "▁Hello", 1: "▁world", 2: "!"}  # as SentencePiece writes them: the first space falls away
    decoder = Decoder(lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" "))
    assert [decoder.add(i) for i in (0, 1, 2, 1)] == ["Hello", " world", "!", " world"]


# ---------------------------------------------------------------------- other sources


def test_bytes_are_their_own_ids(tmp_path, quiet):
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.stop_ids) == (257, 256, (256,))
    for text in TEXTS[:-3] + noise(20):
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.encode("a<|endoftext|>") == [97, 256]
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("é!").input_ids == [0xC3, 0xA9, 33]


def trained(pre: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    """A small byte-level BPE."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(TEXTS + noise(50), trainer)
    return backend


@pytest.mark.parametrize("kind", ["gpt-2", "qwen2", "llama-bpe"])
def test_gguf_vocabularies_of_other_models(kind, tmp_path):
    """Against transformers' own tokenizer of the family, made from the same vocabulary and merges."""
    backend = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    bpe = json.loads(backend.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    fields = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": kind, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in bpe["merges"]],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": kind == "llama-bpe",
    }  # fmt: skip
    ours = Tokenizer.from_pretrained(tiny_gguf.write(tmp_path / "m.gguf", hugging_face("qwen2"), fields))
    merges = [tuple(merge) for merge in bpe["merges"]]
    special = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "unk_token": None}
    if kind == "qwen2":
        theirs = transformers.Qwen2Tokenizer(vocab=bpe["vocab"], merges=merges, pad_token=None, **special)
    elif kind == "gpt-2":
        theirs = transformers.GPT2Tokenizer(vocab=bpe["vocab"], merges=merges, **special)
    else:
        # Llama 3's tokenizer.json: its pattern, no merging of words that are tokens, and bos before a text.
        theirs = transformers.Qwen2Tokenizer(vocab=bpe["vocab"], merges=merges, pad_token=None, **special)
        theirs.backend_tokenizer.normalizer = None
    for text in TEXTS[:12] + noise(30):
        expected = theirs(text).input_ids
        if kind == "llama-bpe":
            assert ours.encode(text)[0] == ours.bos_id == 0
            assert ours.encode(text, add_special=False) == ours.encode(text)[1:]
            if not any(character.isnumeric() for character in text):  # where alone the patterns differ
                assert ours.encode(text)[1:] == expected
        else:
            assert ours.encode(text) == expected
    assert (ours.stop_ids, ours.bos_id) == ((1,), 0)


def test_llama3_cuts_numbers_in_threes(tmp_path):
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "123", "1234"]
    fields = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["1 2", "12 3", "123 4"],
    }  # fmt: skip
    ours = Tokenizer.from_pretrained(tiny_gguf.write(tmp_path / "m.gguf", hugging_face("qwen2"), fields))
    assert [ours.decode([i]) for i in ours.encode("12341234")] == ["123", "4", "12", "3", "4"]


def test_special_tokens_templates_and_ends_of_a_folder(tmp_path):
    plain = Tokenizer.bytes()
    plain.backend.add_special_tokens(["<s>", "</s>"])
    plain.backend.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "pad_token": None,
        "chat_template": [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 258]}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.special, tokenizer.bos_id, tokenizer.eos_id) == ({"bos": "<s>", "eos": "</s>"}, 257, 258)
    assert tokenizer.stop_ids == (256, 258)
    assert tokenizer.chat([]) == "plain"
    (tmp_path / "chat_template.jinja").write_text("a file goes before")
    assert Tokenizer.from_folder(tmp_path).chat([]) == "a file goes before"


def test_how_texts_were_once_cut_and_filled_is_forgotten(tmp_path):
    plain = Tokenizer.bytes()
    plain.backend.enable_truncation(4)
    plain.backend.enable_padding(length=8, pad_id=256)
    plain.backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).encode("a long text") == list(b"a long text")
    assert Tokenizer.from_folder(tmp_path).encode("ab") == list(b"ab")


def test_broken_sources_are_one_clear_line(tmp_path, embedded):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_pretrained(tmp_path)
    for text in ("", "{", '{"version": "1.0"}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
            Tokenizer.from_pretrained(tmp_path)
    embedded.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not JSON"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nope>"}')
    with pytest.raises(ValueError, match="the eos token must be in the vocabulary, got '<nope>'"):
        Tokenizer.from_pretrained(tmp_path)
    for name, value, message in (("model", "llama", "must be byte-level BPE"), ("pre", "klingon", "got 'klingon'")):
        fields = {"tokenizer.ggml.model": "gpt2", f"tokenizer.ggml.{name}": value}
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_gguf(GGUF(tiny_gguf.write(tmp_path / "m.gguf", hugging_face("qwen2"), fields)))
