"""`accelerate launch` in this process, whose exit code says how the run ended.

accelerate's own answers 1 whatever its workers said, and its agent kills workers 30 s after it passed a signal on.
Here the exit code is the first failed worker's (75: stopped early with a checkpoint), and a worker that was signalled
has all the time it needs.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from minimind_dpo.config.shipped import find_config
from minimind_dpo.engine.console import name_accelerator
from minimind_dpo.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE, UserError

# what arrives here -> what the workers get. A terminal's Ctrl-C reaches them without our help, and a second SIGINT
# would interrupt them in the middle of a step, so it is passed on under another number.
_PASSED_ON = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGTERM}
if hasattr(signal, "SIGHUP"):  # Windows has neither of these
    _PASSED_ON |= {signal.SIGHUP: signal.SIGTERM, signal.SIGUSR1: signal.SIGUSR1}


def launch(argv: list[str]) -> int:
    """Run `accelerate launch` with `argv`, where `--config_file` may also be the name of a file of configs/accelerate.

    Returns:
        0 when all workers of this machine ended well; 75 when they stopped early with a checkpoint; 2 for a user's
        mistake; 1 otherwise.

    Raises:
        UserError: there is no such configuration, or it starts one process where several are asked for.
    """
    args = launch_command_parser().parse_args(argv)
    _complete(args)
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torchrun's agent leaves the other signals to us
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the failure is reported below
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)  # threads are set here (engine/cpu.py)
    name_accelerator()
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


def _complete(args: argparse.Namespace) -> None:
    """Find the files that a configuration names, whatever folder this is; without one take the usual."""
    if args.config_file is None and not Path(default_config_file).is_file():
        args.config_file, args.num_processes = _usual(args.num_processes, args.num_machines or 1)
    if args.config_file is None:
        return
    file = find_config("--config_file", args.config_file, "accelerate")
    shipped = str(file) != str(Path(args.config_file).expanduser())
    args.config_file = str(file)
    said = _read(file)
    if str(said.get("distributed_type")).upper() == "NO" and (args.num_processes or 1) > 1 and not args.multi_gpu:
        raise UserError(
            f"{file} is for one process (distributed_type: NO), but --num_processes is {args.num_processes}; "
            "use multi_cpu, multi_gpu or one of ds_*"
        )
    if args.main_process_port is None and (args.num_machines or said.get("num_machines") or 1) == 1:
        args.main_process_port = said.get("main_process_port", 0)  # any that is free: two runs may share a machine
    named = (said.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if named and args.deepspeed_config_file is None:
        args.deepspeed_config_file = str(_find_beside(file, named, shipped))
        args.nondefault = {*getattr(args, "nondefault", ()), "deepspeed_config_file"}  # wins over the configuration


def _usual(num_processes: int | None, num_machines: int) -> tuple[str, int]:
    """The configuration that fits this machine, and its number of processes: one for each GPU, or one."""
    gpus = torch.cuda.device_count()
    processes = num_processes or max(1, gpus) * num_machines
    return f"{'multi' if processes > 1 else 'single'}_{'gpu' if gpus else 'cpu'}", processes


def _read(file: Path) -> dict[str, Any]:
    try:
        said = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: not a readable accelerate configuration: {error}") from None
    if not isinstance(said, dict):
        raise UserError(f"{file}: not an accelerate configuration: expected 'key: value' lines")
    return said


def _find_beside(file: Path, name: str, shipped: bool) -> Path:
    """A file that an accelerate configuration names: accelerate looks from the working directory, where it is not
    found from there it is looked for from the configuration's folder and those above."""
    path = Path(name).expanduser()
    above = [folder / path for folder in file.resolve().parents]
    for candidate in above if shipped else [path, *above]:
        if candidate.is_file():
            return candidate
    raise UserError(
        f"{file}: deepspeed_config_file {name}: no such file, seen from here, from the configuration's folder or from "
        "one above it"
    )


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
            print(f"minimind-dpo: stopped by {number.name}", file=sys.stderr, flush=True)
            os._exit(EXIT_STOPPED)
        send = signal.SIGKILL if interrupted and number == signal.SIGINT else _PASSED_ON.get(number, number)
        interrupted |= number == signal.SIGINT
        for worker in workers:
            try:
                worker.send_signal(send)
            except psutil.NoSuchProcess:
                continue
