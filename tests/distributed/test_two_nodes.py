"""Two nodes on one machine: two agents of torchrun with one process each, or two tasks with SLURM's variables."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.contract.rows import ROWS
from tests.distributed import jobs
from tests.helpers.training import differences, largest_difference

pytestmark = pytest.mark.ddp
REPOSITORY = Path(__file__).parents[2]
BASE = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(REPOSITORY)}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(commands, folder):
    """Run the commands side by side, end all when one fails, and read what each node left."""
    logs = [folder / f"log{i}" for i in range(len(commands))]
    nodes = [
        subprocess.Popen(
            [sys.executable, *arguments], env={**os.environ, **BASE, **variables}, cwd=folder,
            stdout=log.open("w"), stderr=subprocess.STDOUT,
        )
        for (arguments, variables), log in zip(commands, logs, strict=True)
    ]  # fmt: skip
    try:
        codes = [node.wait(300) for node in nodes]
    finally:
        for node in nodes:
            node.terminate()  # an agent ends its process
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return [torch.load(folder / f"node{i}.pt", weights_only=True) for i in range(2)]


def torchrun(folder, stems):
    port = free_port()
    where = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    program = ["-m", "tests.distributed.node", str(folder), "torchrun", *stems]
    agents = [[*where, "--master-port", str(port), "--node-rank", str(i), *program] for i in range(2)]
    return launch([(agent, {}) for agent in agents], folder)


@pytest.fixture(scope="session")  # the row is a parameter of the session: a module's would be made anew for each
def nodes(tmp_path_factory):
    """All modules in one start: importing Lightning four times takes longer than training them."""
    return torchrun(tmp_path_factory.mktemp("nodes"), [row.stem for row in ROWS])


def test_two_nodes_are_one_process(nodes, row):
    ranks = [node[row.stem] for node in nodes]
    alone = jobs.train(row.stem, ranks=1)
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    assert [run["steps"] for run in (*ranks, alone)] == [3 * row.batches] * 3
    assert differences(ranks[0]["weights"], ranks[1]["weights"]) == []
    # 1e-5: float32 sums in another order, through 18 steps with a division by sqrt(v).
    assert largest_difference(ranks[0]["weights"], alone["weights"]) < 1e-5


def test_the_command_line_takes_torchrun_s_nodes(nodes):
    for rank, node in enumerate(nodes):
        assert node["command"] == {"world_size": 2, "node": rank, "environment": "TorchElasticEnvironment"}


@pytest.mark.slow
def test_the_command_line_takes_slurm_s_nodes(tmp_path):
    """As ``srun`` starts two tasks on two nodes."""
    job = {
        "SLURM_JOB_ID": str(free_port()),  # the last digits make the port
        "SLURM_JOB_NAME": "rectify",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_LOCALID": "0",
    }
    program = ["-m", "tests.distributed.node", str(tmp_path), "slurm"]
    tasks = [(program, {**job, "SLURM_PROCID": str(i), "SLURM_NODEID": str(i)}) for i in range(2)]
    for rank, node in enumerate(launch(tasks, tmp_path)):
        assert node["command"] == {"world_size": 2, "node": rank, "environment": "SLURMEnvironment"}
