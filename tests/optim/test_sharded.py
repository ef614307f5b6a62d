"""Parameters sharded over two processes, as FSDP2 has them: each holds some rows."""

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_rectify.optim import RectifiedAdam
from lightning_rectify.optim.sampling import CoordinateSample


def check_sample(mesh):
    """What both processes read of a sample adds up to what is read of the whole."""
    whole = [torch.arange(7.0 * 3).view(7, 3), torch.arange(100.0, 101.0), torch.arange(200.0, 210.0)]
    # 7 rows on two processes are 4 and 3; one number is held by the first alone.
    sharded = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in whole]
    for size in (5, 20, None):
        expected, got = CoordinateSample(whole, size, seed=2), CoordinateSample(sharded, size, seed=2)
        assert got.sharded
        assert not expected.sharded
        a, b = torch.empty(len(expected)), torch.empty(len(got))
        expected.read(whole, a)
        got.read(sharded, b)
        torch.distributed.all_reduce(b)
        assert torch.equal(a, b)


def check_optimizer(mesh):
    """Steps on sharded parameters equal steps on whole ones."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 3, generator=generator)
    whole = torch.nn.Parameter(start.clone())
    sharded = torch.nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
    optimizers = [RectifiedAdam([p], weight_decay=0.1, decoupled_weight_decay=True) for p in (whole, sharded)]
    for _ in range(12):
        gradient = torch.randn(7, 3, generator=generator)
        whole.grad, sharded.grad = gradient, distribute_tensor(gradient, mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    assert isinstance(optimizers[1].state[sharded]["exp_avg_sq"], DTensor)
    # Fused against foreach: the last bit of float32.
    torch.testing.assert_close(sharded.full_tensor(), whole.detach(), rtol=1e-6, atol=0)


def check_both(rank, store):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        check_sample(mesh)
        check_optimizer(mesh)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.ddp
def test_sharded_over_two_processes(tmp_path):
    multiprocessing.spawn(check_both, (str(tmp_path / "store"),), nprocs=2)
