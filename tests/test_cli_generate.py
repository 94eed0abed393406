"""``heddle generate`` and ``heddle chat`` as a user meets them: text on stdout, the rest on stderr."""

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import tiny_meta
from tiny_models import hugging_face
from typer.testing import CliRunner

from heddle.cli import app
from heddle.data.tokenizers import LLAMA3_SPECIAL, Tokenizer
from heddle.jax import Transformer, generate, generation, terminal
from heddle.jax.terminal import Conversation, Speed

TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}{{ m.content }}]{% endfor %}{% if add_generation_prompt %}[a{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny model of bytes that can chat, after a fashion."""
    path = tmp_path_factory.mktemp("model")
    hugging_face("llama, bytes").save_pretrained(path)
    plain = Tokenizer.bytes()
    Tokenizer(plain.backend, plain.special, chat_template=TEMPLATE).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def pair(folder) -> tuple[Transformer, Tokenizer]:
    return Transformer.from_pretrained(folder), Tokenizer.from_pretrained(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))


def heddle(*arguments: str, stdin: str | None = None):
    return CliRunner().invoke(app, arguments, input=stdin)


def expected(pair, prompt: str, **options) -> str:
    return generate(*pair, [pair[1].encode(prompt)], **options)[0].text


def test_metas_folder_with_its_own_vocabulary(tmp_path):
    words = tiny_meta.write_vocabulary(tmp_path, ["heddle"])
    tiny_meta.write(tmp_path, tiny_meta.llama(vocab_size=len(words) + LLAMA3_SPECIAL), params={"max_seq_len": 64})
    result = heddle("generate", "--model", str(tmp_path), "--prompt", "a heddle", "--max-tokens", "3")
    assert result.exit_code == 0
    both = Transformer.from_pretrained(tmp_path), Tokenizer.from_pretrained(tmp_path)
    assert result.stdout == expected(both, "a heddle", max_tokens=3) + "\n"
    assert "4 prompt tokens" in result.stderr  # the first is the bos


def test_an_answer_goes_to_stdout_and_its_speed_to_stderr(folder, pair):
    result = heddle("generate", "--model", folder, "--prompt", "hi", "--max-tokens", "9")
    assert result.exit_code == 0
    assert result.stdout == expected(pair, "[uhi][a", max_tokens=9) + "\n"
    assert "7 prompt tokens, first token after" in result.stderr
    assert "9 tokens at" in result.stderr


def test_penalties_a_cache_and_a_tokenizer_of_ones_own(folder, pair, tmp_path):
    from heddle.jax import sampler

    words = pair[1]
    Tokenizer(words.backend, words.special, chat_template="({{ messages[0].content }}").save_pretrained(tmp_path)
    penalties = ["--presence-penalty", "0.5", "--frequency-penalty", "5"]
    options = ["--max-tokens", "9", *penalties, "--cache-dtype", "int8", "--tokenizer", str(tmp_path)]
    chosen = sampler(presence_penalty=0.5, frequency_penalty=5.0)
    want = expected(pair, "(hi", max_tokens=9, sampler=chosen, cache_dtype="int8")
    result = heddle("generate", "--model", folder, "--prompt", "hi", *options)
    assert result.stdout == want + "\n", result.stderr
    result = heddle("chat", "--model", folder, "--temperature", "0", *options, stdin="hi\n")
    assert result.stdout == want + "\n", result.stderr


def test_text_may_stand_on_stdin_and_go_on_raw(folder, pair):
    result = heddle("generate", "--model", folder, "--raw", "--max-tokens", "9", stdin="some text\n")
    assert result.stdout == expected(pair, "some text", max_tokens=9) + "\n"


def test_several_prompts_are_a_batch_of_json_lines(folder, pair):
    options = ["--max-tokens", "9", "--json", "--system", "be brief", "--temperature", "2.0", "--seed", "4"]
    result = heddle("generate", "--model", folder, "-p", "one", "-p", "two", *options)
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["prompt"] for record in records] == ["one", "two"]
    from heddle.jax import sampler

    for record, word in zip(records, ("one", "two"), strict=True):
        prompt = f"[sbe brief][u{word}][a"
        assert record["text"] == expected(pair, prompt, max_tokens=9, sampler=sampler(2.0), seed=4)
        assert record["prompt_tokens"] == len(prompt)
        assert record["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere", "-p", "x"], "./nowhere: no such file or folder"),
        (["-p", "x", "--top-p", "0"], "top_p must be a number in (0, 1], got 0.0"),
        (["-p", "x", "--temperature", "nan"], "temperature must be a number of at least 0, got nan"),
        (["--model", "MODEL", "-p", "x" * 200], "must be shorter than the model's context of 96 tokens, got 205"),
        (["--model", "MODEL", "-p", "x", "--max-tokens", "0"], "max_tokens must be an integer of at least 1, got 0"),
        (
            ["-p", "x", "--cache-dtype", "int4"],
            "--cache-dtype must be one of float32, bfloat16, float16 or int8, got int4",
        ),
        (["--max-tokens", "ten"], "Invalid value for '--max-tokens'"),
        (["--maximum", "3"], "No such option: --maximum"),
        (["--model", "MODEL", "-p", "", "--raw"], "prompts[0] must hold at least one token, got []"),
        (["--model", "MODEL", "-p", "x", "--raw", "--system", "y"], "--system must go with a chat template"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, message, folder):
    command = [sys.executable, "-m", "heddle", "generate", *(folder if a == "MODEL" else a for a in arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("heddle: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


# ---------------------------------------------------------------------- chat


def test_a_conversation_on_a_pipe(folder, pair, tmp_path):
    lines = ["hi", "again", f"/save {tmp_path / 'talk.json'}", "/reset", "/system be brief", "hi", "/nope", "/help", ""]
    result = heddle("chat", "--model", folder, "--max-tokens", "5", "--temperature", "0", stdin="\n".join(lines))
    assert result.exit_code == 0
    first = expected(pair, "[uhi][a", max_tokens=5)
    second = expected(pair, f"[uhi][a{first}][uagain][a", max_tokens=5)
    third = expected(pair, "[sbe brief][uhi][a", max_tokens=5)
    assert result.stdout == f"{first}\n{second}\n{third}\n"
    roles = [message["role"] for message in json.loads((tmp_path / "talk.json").read_text())]
    assert roles == ["user", "assistant", "user", "assistant"]
    for said in ("4 messages saved", "forgotten", "/nope is not a command", "/reset "):
        assert said in result.stderr


def test_a_conversation_outlives_a_message_that_is_too_long(pair):
    talk = Conversation(*pair, max_tokens=3)
    with pytest.raises(ValueError, match="the conversation has 205 tokens, the model's context 96: try /reset"):
        talk.ask("x" * 200, lambda pieces: "")
    assert talk.messages == []
    talk.ask("x", lambda pieces: "".join(piece.text for piece in pieces))
    assert len(talk.messages) == 2
    with pytest.raises(ValueError, match="/save must name a file"):
        talk.command("/save")


def test_ctrl_c_before_the_first_token_stops_the_answer_only(folder, pair, monkeypatch):
    def stream(model, tokenizer, prompt, **options):
        """The second question is interrupted while it is read."""
        if tokenizer.decode(prompt).endswith("[uagain][a"):
            options["past"].resume(model, list(prompt), 96)  # whose cache doesn't come back
            raise KeyboardInterrupt
        return generation.stream(model, tokenizer, prompt, **options)

    monkeypatch.setattr(terminal, "stream", stream)
    options = ("--max-tokens", "5", "--temperature", "0")
    result = heddle("chat", "--model", folder, *options, stdin="hi\nagain\nand\n")
    assert result.exit_code == 0
    first = expected(pair, "[uhi][a", max_tokens=5)
    second = expected(pair, f"[uhi][a{first}][uand][a", max_tokens=5)
    assert result.stdout == f"{first}\n\n{second}\n"
    assert "stopped" in result.stderr


def test_speed_leaves_out_the_steps_that_compile():
    speed = Speed(5, began=0.0, arrivals=[2.0, 4.0, 4.5, 5.0])
    assert speed.tokens_per_second == 2.0
    assert str(speed) == "5 prompt tokens, first token after 2.00 s, 4 tokens at 2.0 tokens/s"
    assert str(Speed(5, began=0.0, arrivals=[2.0, 4.0])) == "5 prompt tokens, first token after 2.00 s, 2 tokens"


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_no_more(folder):
    """At a terminal: a second answer comes after the first was stopped, and Ctrl-D leaves."""
    # Each token takes a while here, or an answer of 80 would be over before Ctrl-C comes.
    program = (
        "import time, heddle.jax.terminal as terminal, heddle.cli; shown = terminal._print; "
        "terminal._print = lambda pieces: shown(piece for piece in pieces if not time.sleep(0.2)); heddle.cli.main()"
    )
    command = [sys.executable, "-c", program, "chat", "--model", folder, "--temperature", "0", "--max-tokens", "80"]
    parent, child = pty.openpty()
    terminal: Any = dict.fromkeys(("stdin", "stdout", "stderr"), child)
    process = subprocess.Popen(command, **terminal, start_new_session=True, env={**os.environ, "TERM": "dumb"})
    os.close(child)
    seen = ""

    def until(what: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 120
        while what not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([parent], [], [], 1)[0]:
                with contextlib.suppress(OSError):
                    seen += os.read(parent, 4096).decode(errors="replace")

    try:
        until("> ")
        os.write(parent, b"hi\n")
        until("hi\r\n")
        seen = ""
        while not seen.strip():  # until something of the answer is there
            seen += os.read(parent, 4096).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        until("prompt tokens")
        assert " 80 tokens" not in seen
        until("> ")
        seen = ""
        os.write(parent, b"/help\n")
        until("Ctrl-C stops an answer")
        until("> ")
        os.write(parent, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(parent)
