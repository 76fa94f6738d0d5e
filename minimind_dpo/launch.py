"""`accelerate launch` whose exit code says how the run ended: `python -m minimind_dpo.launch ARGS`.

The arguments are those of `accelerate launch`, which itself answers 1 whatever its workers said, and whose agent kills
workers 30 s after it passed a signal on. Here the exit code is the first failed worker's (75: stopped early with a
checkpoint), and a worker that was signalled has all the time it needs.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from minimind_dpo.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE

# what arrives here -> what the workers get. A terminal's Ctrl-C reaches them without our help, and a second SIGINT
# would interrupt them in the middle of a step, so it is passed on under another number.
_PASSED_ON = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGTERM}
if hasattr(signal, "SIGHUP"):  # Windows has neither of these
    _PASSED_ON |= {signal.SIGHUP: signal.SIGTERM, signal.SIGUSR1: signal.SIGUSR1}


def main(argv: list[str]) -> int:
    """Run `accelerate launch` with `argv`.

    Returns:
        0 when all workers of this machine ended well; 75 when they stopped early with a checkpoint; 2 for a user's
        mistake; 1 otherwise.
    """
    args = launch_command_parser().parse_args(argv)
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torchrun's agent leaves the other signals to us
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the failure is reported below
    _pass_signals_on()
    try:
        launch_command(args)
    except ChildFailedError as error:
        by_time = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        return _report([(f"rank {rank}", failure.exitcode) for rank, failure in by_time])
    except subprocess.CalledProcessError as error:  # a configuration of one process
        return _report([("the process", error.returncode)])
    except (FileNotFoundError, ConnectionError, ValueError) as error:  # accelerate's answer to wrong arguments
        print(f"minimind-dpo: error: {error}", file=sys.stderr, flush=True)
        return EXIT_USAGE
    return EXIT_DONE


def _report(ended: list[tuple[str, int]]) -> int:
    """Say which worker failed, and return its code. `ended`: who, and its code (negative: killed by a signal)."""
    code = overall_code(code for _, code in ended)
    if code != EXIT_STOPPED:
        # one that was killed was killed by the agent, if another failed by itself
        who, first = next(((who, code) for who, code in ended if code > 0 and code != EXIT_STOPPED), ended[0])
        how = f"was killed by {signal.Signals(-first).name}" if first < 0 else f"ended with exit code {first}"
        print(f"minimind-dpo: {who} {how}", file=sys.stderr, flush=True)
    return code


def overall_code(codes: Iterable[int]) -> int:
    """One exit code for workers' codes in the order of their end (negative: killed by a signal).

    The agent sends SIGTERM to those that are still leaving when the first has left, so a negative code beside a
    positive one means nothing.
    """
    own = [code for code in codes if code > 0]
    failed = [code for code in own if code != EXIT_STOPPED]
    if failed:
        return EXIT_USAGE if failed[0] == EXIT_USAGE else EXIT_FAILED
    return EXIT_STOPPED if own else EXIT_FAILED


def _pass_signals_on() -> None:
    """From now on signals to this process go to its workers; it ends when they have ended.

    A thread does it, told by the interpreter's wakeup descriptor: the main thread may be deep in a rendezvous.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    for number in _PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell that keeps the signal from us
            signal.signal(number, lambda *_: None)
    threading.Thread(target=_pass_on, args=(receiver, sender), daemon=True).start()


def _pass_on(receiver: socket.socket, sender: socket.socket) -> None:
    # `sender` is held here so that the descriptor the interpreter writes to stays open
    interrupted = False
    while data := receiver.recv(1):
        number = signal.Signals(data[0])
        workers = psutil.Process().children()
        if not workers and _PASSED_ON.get(number) == signal.SIGTERM:
            os._exit(128 + number)
        send = signal.SIGKILL if interrupted and number == signal.SIGINT else _PASSED_ON.get(number, number)
        interrupted |= number == signal.SIGINT
        for worker in workers:
            try:
                worker.send_signal(send)
            except psutil.NoSuchProcess:
                continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
