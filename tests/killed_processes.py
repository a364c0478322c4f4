"""Training in processes that are killed at random moments: forked, so that each of many starts at once; or by torchrun,
which starts them again: ``torchrun --max-restarts N tests/killed_processes.py FOLDER``.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from forked_processes import start
from tiny import squares, tiny_model
from training_cases import CONFIG

from spt_fast import train

# Everything random in training is on; the state is saved at every step.
LONG = replace(CONFIG, epochs=14, ema_decay=0.8, mixup=0.8, batch_size=4)
IMAGES = 22


def run(output: Path, *, seed: int = 0, **kwargs: Any) -> None:
    """The training that is killed; whoever goes on with it starts from other weights and must not notice."""
    model = tiny_model(seed, prompt_dropout=0.3)
    train(model, squares(IMAGES, recipe="fgvc"), squares(5, seed=1), output=output, config=LONG, **kwargs)


def killing(chance: random.Random) -> Callable[[str, int, int | None], None]:
    """A progress callback that has this process killed soon after one of the next steps, whatever it is doing then."""
    remaining = chance.randint(1, 3)

    def progress(stage: str, done: int, total: int | None) -> None:
        nonlocal remaining
        remaining -= 1
        if remaining == 0:
            threading.Timer(chance.uniform(0, 0.01), os.kill, (os.getpid(), signal.SIGKILL)).start()

    return progress


def _child(output: Path, attempt: int, victim: int | None) -> None:
    rank = int(os.environ.get("RANK", "0"))
    progress = killing(random.Random(attempt)) if rank == victim else None
    run(output, seed=attempt + rank, resume=True, progress=progress)


def attempt_in_processes(output: Path, attempt: int, *, world_size: int, kill: bool) -> list[int | None]:
    """Train on in new processes, one of which is killed; the exit codes of all."""
    victim = attempt % world_size if kill else None
    processes = start(_child, output, attempt, victim, world_size=world_size)
    if victim is not None:
        processes[victim].join(120)
    for process in processes:
        if victim is not None:
            process.kill()  # the others wait for the one that is gone, until they notice
        process.join(120)
    return [process.exitcode for process in processes]


if __name__ == "__main__":
    torch.set_num_threads(1)
    restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    kills = int(os.environ["TORCHELASTIC_MAX_RESTARTS"])
    mine = int(os.environ["RANK"]) == restart % int(os.environ["WORLD_SIZE"])
    run(
        Path(sys.argv[1]),
        seed=restart,
        resume=True,
        progress=killing(random.Random(restart)) if mine and restart < kills else None,
    )
