"""Text to token ids and back: of a Hugging Face folder, Llama 3's or a GGUF file's own vocabulary, or plain bytes."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from .chat import render
from .gguf import GGUF
from .locate import locate, read_json

BYTES = "bytes"  #: the name of the tokenizer that needs no model
END_OF_TEXT = "<|endoftext|>"
_ROLES = ("bos", "eos", "unk", "pad")

#: How GGUF's tokenizer.ggml.pre cuts text before the merges: patterns as the models' own tokenizer.json have them.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
LLAMA3_SPECIAL = 256  #: tokens after Llama 3's vocabulary, most of them reserved; those that 3.1 uses:
_LLAMA3_TOKENS = {
    0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>",
}  # fmt: skip


class Tokenizer:
    """A vocabulary with its special tokens and its chat template.

    Args:
        backend: the ``tokenizers`` object that does the work.
        special: the special tokens by role: ``bos``, ``eos``, ``unk``, ``pad``.
        stop_ids: ids that end an answer, besides ``eos``.
        chat_template: a Jinja template of ``messages``; None: no chat.
        settings: what else ``tokenizer_config.json`` says, kept for saving.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: Mapping[str, str] | None = None,
        *,
        stop_ids: Iterable[int] = (),
        chat_template: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        self.backend = backend
        self.special = dict(special or {})
        self.chat_template = chat_template
        self.settings = dict(settings or {})
        for role, token in self.special.items():
            if role not in _ROLES:
                raise ValueError(f"special must have roles among {', '.join(_ROLES)}; got {role!r}")
            if backend.token_to_id(token) is None:
                raise ValueError(f"the {role} token must be in the vocabulary, got {token!r}")
        eos = () if self.eos_id is None else (self.eos_id,)
        #: Ids that end an answer.
        self.stop_ids: tuple[int, ...] = tuple(sorted({*eos, *stop_ids}))

    # ------------------------------------------------------------------ where they come from

    @classmethod
    def from_pretrained(cls, name: str | Path | None = None) -> Tokenizer:
        """Of a Hugging Face folder, a GGUF file or a model's name on the hub; None: of the embedded model.

        Raises:
            FileNotFoundError: nothing there, or a folder without ``tokenizer.json``.
            ValueError: files that can't be read; a GGUF vocabulary of another kind than byte-level BPE.
        """
        path = locate(name, weights=False)
        return cls.from_gguf(GGUF.open(path)) if path.suffix == ".gguf" else cls.from_folder(path)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Of ``tokenizer.json`` and, where there, ``tokenizer_config.json``, ``chat_template.jinja`` and
        ``generation_config.json``; without it, of Llama 3's ``tokenizer.model`` as Meta publishes it."""
        folder = Path(folder)

        def optional(name: str) -> dict[str, Any]:
            return read_json(folder / name) if (folder / name).is_file() else {}

        file = folder / "tokenizer.json"
        if not file.is_file():
            if (folder / "tokenizer.model").is_file():
                return cls._of_llama3(folder / "tokenizer.model")
            raise FileNotFoundError(f"{file}: no such file")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{file}: not a tokenizer: {error}") from None
        # What somebody once cut and filled batches with is saved too, and would apply to every text.
        backend.no_truncation()
        backend.no_padding()
        settings = optional("tokenizer_config.json")
        named = optional("special_tokens_map.json") | settings
        special = {}
        for role in _ROLES:
            token = named.get(f"{role}_token")
            if token := token.get("content") if isinstance(token, dict) else token:
                special[role] = token
        ends = optional("generation_config.json").get("eos_token_id")
        template = settings.pop("chat_template", None)
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        return cls(
            backend,
            special,
            stop_ids=[ends] if isinstance(ends, int) else ends or (),
            chat_template=template,
            settings=settings,
        )

    @classmethod
    def from_gguf(cls, file: GGUF) -> Tokenizer:
        """Of the vocabulary and merges in a GGUF file: byte-level BPE, as GPT-2, Llama 3, Qwen2 and SmolLM have it."""
        metadata = {k.removeprefix("tokenizer.ggml."): v for k, v in file.metadata.items() if "tokenizer.ggml." in k}
        if metadata.get("model") != "gpt2":
            raise ValueError(
                f"{file.path}: the tokenizer must be byte-level BPE ('gpt2'), got {metadata.get('model')!r}; "
                "name a folder with a tokenizer.json as the tokenizer (--tokenizer)"
            )
        kind = metadata.get("pre", "default")
        if kind not in _PRE_TOKENIZERS:
            raise ValueError(
                f"{file.path}: tokenizer.ggml.pre must be one of {', '.join(_PRE_TOKENIZERS)}; got {kind!r}"
            )
        tokens, kinds = metadata["tokens"], metadata.get("token_type", [])
        vocabulary = {token: index for index, token in enumerate(tokens)}
        merges = [tuple(merge.split(" ", 1)) for merge in metadata["merges"]]
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=kind == "llama-bpe"))
        backend.pre_tokenizer = _PRE_TOKENIZERS[kind]()
        backend.decoder = decoders.ByteLevel()
        if kind == "qwen2":
            backend.normalizer = normalizers.NFC()
        # 3: control tokens, 4: tokens that are matched whole but are text.
        for special, wanted in ((True, 3), (False, 4)):
            added = [
                AddedToken(t, normalized=False, special=special)
                for t, k in zip(tokens, kinds, strict=False)
                if k == wanted
            ]
            (backend.add_special_tokens if special else backend.add_tokens)(added)
        ids = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        roles = {role: tokens[i] for role, key in ids.items() if (i := metadata.get(f"{key}_token_id")) is not None}
        if metadata.get("add_bos_token", False) and "bos" in roles:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{roles['bos']} $A", special_tokens=[(roles["bos"], metadata["bos_token_id"])]
            )
        length = file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")
        # A turn's end is often not the vocabulary's end of text: both end an answer.
        ends = [vocabulary[token] for token in (END_OF_TEXT, "<|eot_id|>", "<|im_end|>") if token in vocabulary]
        return cls(
            backend,
            roles,
            stop_ids=[end for end in ends if kinds and kinds[end] == 3],
            chat_template=file.metadata.get("tokenizer.chat_template"),
            settings={"model_max_length": int(length)} if length else None,
        )

    @classmethod
    def _of_llama3(cls, file: Path) -> Tokenizer:
        """Of a vocabulary as tiktoken has it, a token and its rank a line; Llama 3's special tokens follow it."""
        lines = file.read_bytes().splitlines()
        if not lines or not all(re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+", line) for line in lines):
            raise ValueError(
                f"{file}: must be Llama 3's vocabulary; of a SentencePiece model, put the tokenizer.json of its "
                "Hugging Face folder beside it"
            )
        letters = {byte: letter for letter, byte in _byte_of_letter().items()}
        vocabulary = {}
        for line in lines:
            token, rank = line.split()
            vocabulary["".join(letters[byte] for byte in base64.b64decode(token))] = int(rank)
        # What tiktoken merges first is the pair that makes the token of the lowest rank, however it splits.
        merges = [
            (rank, vocabulary[token[:cut]], vocabulary[token[cut:]], (token[:cut], token[cut:]))
            for token, rank in vocabulary.items()
            for cut in range(1, len(token))
            if token[:cut] in vocabulary and token[cut:] in vocabulary
        ]
        backend = tokenizers.Tokenizer(
            models.BPE(vocab=vocabulary, merges=[pair for *_, pair in sorted(merges)], ignore_merges=True)
        )
        backend.pre_tokenizer = _PRE_TOKENIZERS["llama-bpe"]()
        backend.decoder = decoders.ByteLevel()
        reserved = (f"<|reserved_special_token_{i}|>" for i in range(LLAMA3_SPECIAL))
        special = [_LLAMA3_TOKENS.get(i) or next(reserved) for i in range(LLAMA3_SPECIAL)]
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
        bos, eos = special[:2]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
        ends = (backend.token_to_id(token) for token in ("<|eom_id|>", "<|eot_id|>"))
        template = file.with_name("chat_template.jinja")
        return cls(
            backend,
            {"bos": bos, "eos": eos},
            stop_ids=[end for end in ends if end is not None],
            chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
        )

    @classmethod
    def bytes(cls) -> Tokenizer:
        """A token for each byte of UTF-8, its id the byte, and ``<|endoftext|>``, id 256: for training from scratch."""
        letters = {byte: letter for letter, byte in _byte_of_letter().items()}
        vocabulary = {letters[byte]: byte for byte in range(256)}
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
        return cls(backend, {"eos": END_OF_TEXT, "pad": END_OF_TEXT})

    # ------------------------------------------------------------------ text and ids

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    @property
    def eos_id(self) -> int | None:
        """The id of the end of text."""
        return self._id("eos")

    @property
    def bos_id(self) -> int | None:
        return self._id("bos")

    @property
    def pad_id(self) -> int | None:
        return self._id("pad")

    def _id(self, role: str) -> int | None:
        token = self.special.get(role)
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """The ids of a text. Special tokens written in it are recognised.

        ``add_special=False`` leaves out what the model's tokenizer puts around every text, such as a leading ``bos``.
        """
        return self.backend.encode(text, add_special_tokens=add_special).ids

    def encode_spans(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """The ids of a text, nothing put around it, and which of them have a character in one of ``spans``."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        inside = [any(begin < end and start < until for start, end in spans) for begin, until in encoding.offsets]
        return encoding.ids, inside

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of these ids; bytes that aren't UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def decoder(self, *, skip_special: bool = True) -> Decoder:
        """A decoder that takes ids one by one."""
        return Decoder(lambda ids: self.decode(ids, skip_special=skip_special))

    # ------------------------------------------------------------------ chat

    def chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model was trained on.

        Args:
            messages: ``{"role": ..., "content": ...}``, the oldest first.
            add_generation_prompt: end with the opening of the assistant's turn.

        Raises:
            ValueError: no chat template, a template that is broken, or messages that it refuses.
        """
        if not self.chat_template:
            raise ValueError("the tokenizer must have a chat template to chat, got none")
        return render(self.chat_template, messages, self.template_names, add_generation_prompt=add_generation_prompt)

    @property
    def template_names(self) -> dict[str, str]:
        """What a chat template may name besides the messages."""
        return {f"{role}_token": token for role, token in self.special.items()}

    # ------------------------------------------------------------------ saving

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files from which transformers' AutoTokenizer and :meth:`from_folder` make the same tokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        settings |= self.settings | {f"{role}_token": token for role, token in self.special.items()}
        text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        if self.chat_template:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    def __repr__(self) -> str:
        special = ", ".join(f"{role} {token!r}" for role, token in self.special.items())
        return f"Tokenizer({self.vocab_size:,} tokens; {special})"


def load_tokenizer(name: str | Path | None = None) -> Tokenizer:
    """``"bytes"``: :meth:`Tokenizer.bytes`; anything else: :meth:`Tokenizer.from_pretrained`."""
    return Tokenizer.bytes() if name == BYTES else Tokenizer.from_pretrained(name)


class Decoder:
    """Ids to text one by one: what :meth:`add` and :meth:`rest` return adds up to the text of all the ids.

    A character's bytes may be spread over tokens: it is held back until it is whole. (Where a SentencePiece vocabulary
    has broken bytes right after a whole character's, the text of all the ids has U+FFFD for that character too.)
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._context: list[int] = []  # the ids before, whose text is out: some vocabularies' text depends on them
        self._window: list[int] = []
        self._out = 0  # how much of the window's text is out

    def add(self, token: int) -> str:
        """The text that this id completes, perhaps none."""
        self._window.append(token)
        text = self._text()
        broken = len(text) - len(text.rstrip("\ufffd"))
        if not broken:
            piece = text[self._out :]
            self._context, self._window, self._out = self._window, [], 0
            return piece
        # Of the last, up to three may become one character yet: SentencePiece's vocabularies write one for each byte.
        piece = text[self._out : len(text) - min(broken, 3)]
        self._out += len(piece)
        return piece

    def rest(self) -> str:
        """What is still held back: an unfinished character, as U+FFFD."""
        piece = self._text()[self._out :]
        self._context, self._window, self._out = self._window, [], 0
        return piece

    def _text(self) -> str:
        before = self._decode(self._context) if self._context else ""
        text = self._decode(self._context + self._window)
        # SentencePiece's take all bytes in a row for broken while the last character is: those before it are out.
        return text[len(before) :] if text.startswith(before) else self._decode(self._window)


# ---------------------------------------------------------------------- pieces


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()]),
    "llama-bpe": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
}


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's letter for each byte: itself where it prints, else the next free one from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}
