"""How a run is told to stop, goes on and is evaluated. The rest of heddle.run is tested where a wing's run uses it."""

import signal

import numpy as np
import pytest

from heddle.config import load_config
from heddle.run import check_folder, stop_on_signals, training_data, write_config


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_sigterm_may_come_again(first):
    """A scheduler's comes to a launcher and to its processes, and the launcher passes its own on."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_on_signals() as stop:
        assert stop.signal is None
        signal.raise_signal(first)
        assert stop.signal == first
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert stop.signal == first
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_after_a_signal_ends_at_once(first):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with stop_on_signals():
            signal.raise_signal(first)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_evaluation_is_of_the_same_rows_in_whatever_parts(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"the cat sat on mat {i}; " * 9)
    options = [f"data.corpus={tmp_path}", "data.held_out=0.5", "data.seq_len=32", "training.eval_batches=2"]
    whole, *others = (
        training_data(load_config(None, [*options, f"training.accumulation={parts}"])).evaluation for parts in (1, 2, 8)
    )
    assert [batch.tokens.shape for batch in whole] == [(8, 32)] * 2
    for parts in others:
        for field, other in zip(zip(*whole, strict=True), zip(*parts, strict=True), strict=True):
            np.testing.assert_array_equal(np.concatenate(field), np.concatenate(other))


def test_other_steps_of_a_falling_rate_are_told(tmp_path, caplog):
    options = [f"output={tmp_path}", "training.max_steps=10"]
    write_config(load_config(None, options))
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    check_folder(load_config(None, options))
    assert not caplog.records
    check_folder(load_config(None, [*options[:1], "training.max_steps=20"]))
    assert "training.max_steps=20 was 10: the learning rate of training.schedule=cosine" in caplog.text
    with pytest.raises(ValueError, match=r"holds a run with training\.seed=0 \(not 3\)"):
        check_folder(load_config(None, [*options, "training.seed=3"]))
