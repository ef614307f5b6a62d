"""What runs on each process: the contract's small networks under a strategy, and what they have become."""

from importlib import import_module

import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_rectify._lightning import NAME, Callback
from lightning_rectify.callbacks import AdaptiveRateMonitor
from tests.contract.jobs import make
from tests.helpers.training import CSVLogger, trainer

ModelParallelStrategy = import_module(f"{NAME}.strategies").ModelParallelStrategy
PARITY = {"limit_val_batches": 0}
# torchrun's agents gave each of two machines one process.
TWO_NODES = {"num_nodes": 2, "devices": 1, "strategy": "ddp"}


def fsdp(one_file=True, tensor_parallel_size=1):
    """Options of two processes under FSDP2."""
    strategy = ModelParallelStrategy(
        data_parallel_size=2 // tensor_parallel_size,
        tensor_parallel_size=tensor_parallel_size,
        save_distributed_checkpoint=not one_file,
    )
    return {"devices": 2, "strategy": strategy}


def whole(state):
    """A state dict of whole tensors; to be called on all processes."""
    return {name: v.full_tensor() if isinstance(v, DTensor) else v.detach().clone() for name, v in state.items()}


def train(stem, ranks=2, stop=None, ckpt_path=None, save_as=None, noise=False, seed=0, where=None, **options):
    """Train for three epochs, or ``stop`` steps, on this process's share of each batch."""
    row, module = make(stem, noise, seed)
    length = {"max_epochs": 3} if stop is None else {"max_steps": stop, "max_epochs": -1}
    fit = trainer(**{**PARITY, **length, **(where or {}), **options})
    fit.fit(module, row.make_data(batch_size=row.batch_size // ranks), ckpt_path=ckpt_path)
    if save_as is not None:
        fit.save_checkpoint(save_as)
    rows = [(len(p), len(p.to_local())) for p in module.parameters() if isinstance(p, DTensor)]
    return {
        "weights": whole(module.state_dict()),
        "steps": fit.global_step,
        "world_size": fit.world_size,
        "metrics": {key: value.item() for key, value in fit.callback_metrics.items() if key.startswith("val/")},
        "rows": rows,
        "sharded": len(rows) == len(list(module.parameters())),
    }


def train_sharded(one_file=True, **options):
    return train(where=fsdp(one_file), **options)


def refused(stem, **options):
    """The message with which a fit is refused."""
    row, module = make(stem)
    try:
        trainer(**fsdp(**options), max_steps=1).fit(module, row.make_data())
    except ValueError as error:
        return str(error)
    return "nothing was refused"


# -- the monitor -------------------------------------------------------------------------------------------------------


COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "barrier", "broadcast",
    "broadcast_object_list", "gather", "gather_object", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter",
)  # fmt: skip


class Points(Callback):
    """Keeps what the monitor gave at each step; counts collectives from the first to the last step."""

    def __init__(self):
        self.found, self.count, self._originals = [], 0, {}

    def on_train_start(self, trainer, pl_module):
        self._originals = {name: getattr(torch.distributed, name) for name in COLLECTIVES}
        for name, original in self._originals.items():
            setattr(torch.distributed, name, self._counted(original))

    def _counted(self, original):
        def call(*args, **kwargs):
            self.count += 1
            return original(*args, **kwargs)

        return call

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.found.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("adaptive_rate/")})

    def on_train_end(self, trainer, pl_module):
        for name, original in self._originals.items():
            setattr(torch.distributed, name, original)


def watch(stem, where=None, watched=True, folder="."):
    """Some steps in which every process sees the whole batches: the mean gradient is to the last bit that of one."""
    row, module = make(stem, foreach=True, fused=False)  # FSDP has no fused step
    points = Points()
    # 50 coordinates: sampled in the larger units, read whole in the smaller ones.
    monitor = [AdaptiveRateMonitor(sample_size=50, per_layer=True, histograms=False, figure=False)] * watched
    data = row.make_data()
    data.prepare_data()
    data.setup("fit")
    fit = trainer(
        callbacks=[*monitor, points], logger=CSVLogger(folder, name=""), log_every_n_steps=1, max_steps=8,
        max_epochs=-1, limit_val_batches=1, use_distributed_sampler=False, **(where or {}),
    )  # fmt: skip
    batches = [DataLoader(list(part), batch_size=None) for part in (data.train_dataloader(), data.val_dataloader())]
    fit.fit(module, *batches)
    return {"points": points.found, "collectives": points.count, "steps": fit.global_step}


def watch_sharded(**options):
    return watch(where=fsdp(), **options)
