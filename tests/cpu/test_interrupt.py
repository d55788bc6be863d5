"""Ctrl-C while the CPU kernels run: they stop, the exception is that of Python's signal handler."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cacr_kernels import available_backends

pytestmark = pytest.mark.skipif("cpu" not in available_backends(), reason="no CPU kernels")

PRELUDE = """
import os, signal, sys, threading, time
import torch
from cacr_kernels import cacr_loss, cacr_queue_loss
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process that a shell starts in the background ignores it

def randn(*shape):
    return torch.randn(shape, dtype=torch.float32, generator=torch.Generator().manual_seed(0))

def signalled(number, call, delay=0.2):
    "CPU time from a signal, which arrives while `call` runs, again and again, to its exception; None without one."
    sent = []
    def send():
        sent.append(time.process_time())
        os.kill(os.getpid(), number)
    timer = threading.Timer(delay, send)
    timer.start()
    try:
        while timer.is_alive():
            call()
    except (KeyboardInterrupt, LookupError) as error:
        return time.process_time() - sent[0], error
    finally:
        timer.join()

def quantum():
    "CPU time of a loss that takes 0.03 s of an idle machine; a busy one slows it down as it does all others."
    begin = time.process_time()
    cacr_loss(z[:, :3000], reduction="none", backend="cpu")
    return time.process_time() - begin

def prompt(number, call, kind, words, delay=0.2):
    "The exception comes within the CPU time of ten such losses."
    before = quantum()
    seconds, error = signalled(number, call, delay)
    assert type(error) is kind and str(error) == words, error
    assert seconds < 10 * max(before, quantum()), (seconds, before)
"""

STOPPED = """
z = randn(2, 20000, 64)
grad = z.clone().requires_grad_()
bank = randn(200000, 64)
calls = [
    lambda: cacr_loss(grad, backend="cpu"),
    lambda: cacr_loss(grad, cost="rbf", backend="cpu"),
    lambda: cacr_loss(grad, pairing="pooled", backend="cpu"),
    lambda: cacr_loss(z, reduction="none", backend="cpu"),
    lambda: cacr_queue_loss(grad[:, :4000], z[:, :4000], bank, in_batch=False, backend="cpu"),
]
for call in calls:
    prompt(signal.SIGINT, call, KeyboardInterrupt, "")
small = z[:, :50]
torch.testing.assert_close(cacr_loss(small, backend="cpu"), cacr_loss(small, backend="reference"))

def backward(grad=grad):
    loss = cacr_loss(grad[:, :6000], reduction="none", backend="cpu").sum()
    prompt(signal.SIGINT, lambda: loss.backward(retain_graph=True), KeyboardInterrupt, "", 0.05)
backward()

def handler(number, frame):
    raise LookupError("of the user")
signal.signal(signal.SIGTERM, handler)
prompt(signal.SIGTERM, calls[0], LookupError, "of the user")
"""

GOES_ON = """
seen = []
signal.signal(signal.SIGINT, lambda number, frame: seen.append(time.process_time()))
z = randn(2, 6000, 64)
alone = cacr_loss(z, backend="cpu")
found = []
def call():
    found.append(cacr_loss(z, backend="cpu"))
    found.append(time.process_time())
assert signalled(signal.SIGINT, call, 0.02) is None
assert torch.equal(found[0], alone) and len(seen) == 1
"""


@pytest.mark.parametrize("script", [STOPPED, GOES_ON], ids=["stopped", "a handler that does not raise"])
def test_signal(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", PRELUDE + script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
