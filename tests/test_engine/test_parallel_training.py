"""Training in two processes equals training in one, with DDP and FSDP."""

from conftest import run_two_processes

START = """
import sys
import torch
import torch.distributed as dist
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmvvt.models import VVT


rank = int(sys.argv[1])
dist.init_process_group(
    'gloo', init_method='file://' + sys.argv[2], rank=rank, world_size=2)


class Model(BaseModel):
    def __init__(self, **options):
        super().__init__()
        arch = dict(embed_dims=[8, 16, 24, 32], num_heads=[1, 2, 3, 4],
                    mlp_ratios=[2, 2, 2, 2], depths=[1, 1, 1, 1])
        self.backbone = VVT(arch, **options)

    def forward(self, inputs, mode='tensor'):
        # The output of a LayerNorm sums to zero, but its square does not.
        return dict(loss=sum(
            out.pow(4).mean() for out in self.backbone(inputs)))


def build(**options):
    torch.manual_seed(0)
    model = Model(**options).double()
    model.backbone.init_weights()
    return model.train()


def step(model, images):
    parameters = [p for p in model.parameters() if p.requires_grad]
    wrapper = OptimWrapper(torch.optim.SGD(parameters, lr=0.1))
    return model.train_step(dict(inputs=images), wrapper)


torch.manual_seed(1)
images = torch.randn(4, 3, 64, 40, dtype=torch.float64)
own = images[2 * rank:2 * rank + 2]
"""

DDP = """
def compare(find_unused, **options):
    alone, model = build(**options), build(**options)
    before = {k: v.clone() for k, v in alone.state_dict().items()}
    parallel = MMDistributedDataParallel(
        model, find_unused_parameters=find_unused)
    for _ in range(2):  # DDP reports unused parameters in the second step
        step(alone, images)
        step(parallel, own)
    # With SGD, equal weights after two steps imply equal gradients.
    changed = set()
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(
            model.state_dict()[name], parameter.data, rtol=1e-9, atol=1e-12)
        if not torch.equal(parameter, before[name]):
            changed.add(name.split('.')[1])
    return changed


# All stages are used; frozen parameters are not exchanged.
def stages(*numbers):
    return {f'{part}{n}' for part in ('patch_embed', 'block', 'norm')
            for n in numbers}


every = (0, 1, 2, 3)
assert stages(1, 2, 3, 4) == compare(False, out_indices=every)
assert stages(3, 4) == compare(False, out_indices=every, frozen_stages=1)
assert stages(1, 2, 3) == compare(True, out_indices=(0, 1, 2))
assert stages(1, 2, 3, 4) == compare(False, out_indices=(3,))

# Stages above the last output are built, so that checkpoints can be loaded.
try:
    compare(False, out_indices=(0, 1, 2))
except RuntimeError as error:
    assert 'find_unused_parameters=True' in str(error)
else:
    raise AssertionError('unused parameters were accepted')
"""

FSDP = """
import functools
from mmengine.model import MMFullyShardedDataParallel
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from mmvvt.models.vvt import VVTBlock

alone = build()
before = {k: v.clone() for k, v in alone.state_dict().items()}
parallel = MMFullyShardedDataParallel(
    build(),
    auto_wrap_policy=functools.partial(
        transformer_auto_wrap_policy, transformer_layer_cls={VVTBlock}),
    use_orig_params=True,
    device_id=torch.device('cpu'),
)
assert sum('FullySharded' in type(m).__name__
           for m in parallel.modules()) == 5
held = sum(p.numel() for p in parallel.parameters())
total = sum(p.numel() for p in alone.parameters())
assert held < 0.6 * total, (held, total)
for _ in range(2):
    step(alone, images)
    step(parallel, own)
with parallel.state_dict_type(parallel, StateDictType.FULL_STATE_DICT):
    found = parallel.state_dict()
assert found.keys() == before.keys()
for name, expected in alone.state_dict().items():
    torch.testing.assert_close(
        found[name], expected, rtol=1e-8, atol=1e-12, msg=name)
assert any(not torch.equal(found[k], before[k]) for k in found)
"""


def test_distributed_data_parallel(tmp_path):
    """The gradients of DDP are those of the whole batch in one process.

    Frozen stages need no setting. If stages follow the last output, the
    config must set ``find_unused_parameters=True``, as for other backbones
    with ``out_indices``.
    """
    run_two_processes(START + DDP, tmp_path, timeout=120)


def test_fully_sharded_data_parallel(tmp_path):
    """mmengine's FSDP wrapper with a shard per block trains on CPUs.

    It is used without FSDPStrategy, which passes the number of the local GPU
    to the wrapper.
    """
    run_two_processes(START + FSDP, tmp_path, timeout=120)
