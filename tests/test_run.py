"""How a run is told to stop. The rest of heddle.run is tested where a wing's run uses it."""

import signal

import pytest

from heddle.run import stop_on_signals


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
