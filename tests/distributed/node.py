"""What one of two nodes runs, started by torchrun or as by SLURM: modules of the contract, then the command line.

... -m tests.distributed.node FOLDER OVERLAY STEM ...
"""

import sys
from pathlib import Path

import torch

from lightning_rectify.cli import RectifyCLI
from tests.contract.rows import CONFIGS, ROWS
from tests.distributed.jobs import TWO_NODES, train

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--test_after_fit=false"]


def by_command(stem, overlay, folder):
    """``lightning-rectify fit`` with a shipped overlay, on CPUs."""
    row = next(row for row in ROWS if row.stem == stem)
    here = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32-true"]
    here += ["--trainer.sync_batchnorm=false", f"--trainer.default_root_dir={folder}", "--trainer.max_epochs=1"]
    configs = [f"--config={row.config}", f"--config={CONFIGS / 'trainer' / overlay}.yaml"]
    cli = RectifyCLI(["fit", *configs, *row.quick_cli, *here, *QUIET])
    environment = type(cli.trainer.strategy.cluster_environment).__name__
    return {"world_size": cli.trainer.world_size, "node": cli.trainer.node_rank, "environment": environment}


def main():
    folder, overlay, *stems = sys.argv[1:]
    torch.set_num_threads(1)
    found = {stem: train(stem, where=TWO_NODES) for stem in stems}
    found["command"] = by_command("classifier", overlay, folder)
    torch.save(found, Path(folder) / f"node{found['command']['node']}.pt")


if __name__ == "__main__":
    main()
