"""The hook that averages losses, with two processes."""

import torch

from mmvvt.engine import MeanLossHook

from conftest import run_two_processes

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from mmvvt.engine import MeanLossHook


rank = int(sys.argv[1])
dist.init_process_group(
    'gloo', init_method='file://' + sys.argv[2], rank=rank, world_size=2)
hook = MeanLossHook()
both = dict(loss=torch.tensor(1.0 + 2 * rank), name='text')
cases = [
    (both, dict(both), dict(loss=2.0)),
    # only one process has objects in its images
    (dict(loss=torch.tensor(4.0), loss_mask=torch.tensor(6.0)),
     dict(loss=torch.tensor(2.0)),
     dict(loss=3.0, loss_mask=6.0)),
    (dict(a=torch.tensor(1.0)), dict(b=torch.tensor(2.0)), dict(a=1.0, b=2.0)),
    (dict(loss=torch.tensor(1.0)), None, dict(loss=1.0)),
    (None, None, None),
    (dict(loss=torch.tensor(1.0), map=torch.ones(3)), dict(), dict(loss=1.0)),
    (dict(loss=torch.tensor(5.0)), dict(loss=torch.tensor([7.0])),
     dict(loss=6.0)),
]
for number, (first, second, expected) in enumerate(cases):
    outputs = (first, second)[rank]
    if number == 0:
        outputs['loss'] = torch.tensor(1.0 + 2 * rank)
    hook.after_train_iter(None, 0, None, outputs)
    if outputs is not None:
        means = {k: float(v) for k, v in outputs.items()
                 if isinstance(v, torch.Tensor) and v.numel() == 1}
        assert means == expected, (number, means)
"""


def test_processes_with_other_losses(tmp_path):
    """No process waits for another."""
    run_two_processes(SCRIPT, tmp_path, timeout=300)


def test_one_process_is_left_alone():
    outputs = dict(loss=torch.tensor(1.0, requires_grad=True))
    before = outputs['loss']
    MeanLossHook().after_train_iter(None, 0, None, outputs)
    assert outputs['loss'] is before
