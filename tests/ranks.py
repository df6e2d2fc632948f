"""Two processes of one test, joined by gloo on this machine."""

import contextlib
import os
import subprocess
import sys

import torch

SECONDS = 240  # after which two processes that wait for each other are ended


def two_processes(file, folder, *arguments):
    """Run `file RANK FOLDER ARGUMENTS...` twice, side by side; fail with what a failed one said."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning:addnorm", str(file)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder), *arguments],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            _, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def joined(rank, folder):
    """Join the other process; the end of the block ends this process.

    At once, because threads of gloo that outlive the group may abort or hang an interpreter that
    shuts down.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    yield
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)
