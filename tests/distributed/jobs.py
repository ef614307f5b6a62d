"""What runs on each process: the contract's small networks under a strategy, and what they have become."""

from importlib import import_module

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.data import DataLoader

from lightning_rectify._lightning import NAME, Callback
from lightning_rectify.callbacks import AdaptiveRateMonitor
from lightning_rectify.callbacks.adaptive_rate.watch import OptimizerWatch
from lightning_rectify.optim import RectifiedAdam
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


def replicas():
    """What the monitor reads of shards, replicas and plain tensors side by side, and of all plain ones."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(7, 3, generator=generator) for _ in range(3)]
    gradients = [torch.randn(7, 3, generator=generator) for _ in range(3)]
    mesh = init_device_mesh("cpu", (2,))
    placements = {"mixed": ([Shard(0)], [Replicate()], None), "plain": (None, None, None)}
    found = {}
    for name, ways in placements.items():

        def placed(part, ways=ways):
            return [t if way is None else distribute_tensor(t, mesh, way) for t, way in zip(part, ways, strict=True)]

        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in placed(starts)]
        optimizer = RectifiedAdam(parameters, foreach=False, fused=False)
        watched = OptimizerWatch(optimizer, {}, ["model"], False, 20, rows=2, seed=0)
        for parameter, gradient in zip(parameters, placed(gradients), strict=True):
            parameter.grad = gradient
        optimizer.step()
        watched.rebuild()
        watched.record()
        ((_, block),) = watched.blocks(lambda tensor: [torch.distributed.all_reduce(tensor), tensor][1])
        found[name] = [torch.from_numpy(block.v), torch.from_numpy(block.g)]
    return found
