"""The hook that compiles the backbone only."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.model import BaseTTAModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmvvt.checkpoint import load_checkpoint_file
from mmvvt.engine import CompileBackboneHook
from mmvvt.engine.hooks import MAX_GRAPHS
from mmvvt.errors import UserError

from conftest import ROOT

DEMO = ROOT / 'configs' / 'demo' / 'vvt-nano_digits.py'


def build_runner(root, work_dir, hooks=(), **options):
    """The digits demo with one small stage and two iterations."""
    cfg = Config.fromfile(DEMO)
    cfg.merge_from_dict(
        {
            'model.backbone.arch': dict(
                embed_dims=[8, 8, 8, 8],
                num_heads=[1, 1, 1, 1],
                mlp_ratios=[1, 1, 1, 1],
                depths=[1, 1, 1, 1],
            ),
            'model.backbone.out_indices': (0,),
            'model.head.in_channels': 8,
            'train_dataloader.batch_size': 16,
            'train_dataloader.dataset.indices': 32,
            'val_dataloader.dataset.indices': 20,
            'train_dataloader.dataset.data_root': str(root),
            'val_dataloader.dataset.data_root': str(root),
            'test_dataloader.dataset.data_root': str(root),
            'train_cfg': dict(by_epoch=True, max_epochs=1, val_interval=2),
            'default_hooks.logger.interval': 1,
            'experiment_name': work_dir.name,
            'work_dir': str(work_dir),
            **options,
        }
    )
    runner = Runner.from_cfg(cfg)
    for hook in hooks:
        runner.register_hook(hook)
    return runner


def logged_losses(work_dir):
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [r['loss'] for r in records if 'loss' in r]


def run(digits_root, work_dir, hooks=(), **options):
    """Train; returns the runner, the losses and the checkpoint."""
    runner = build_runner(digits_root, work_dir, hooks, **options)
    runner.train()
    state = load_checkpoint_file(str(work_dir / 'epoch_1.pth'))['state_dict']
    return runner, logged_losses(work_dir), state


@pytest.fixture(scope='module')
def plain(digits_root, tmp_path_factory):
    """Losses and checkpoint of a run that is not compiled."""
    return run(digits_root, tmp_path_factory.mktemp('plain'))[1:]


def check_run(found, plain):
    runner, losses, state = found
    assert runner.model.backbone._compiled_call_impl is not None
    assert len(losses) == 2 and losses == pytest.approx(plain[0], rel=1e-5)
    assert state.keys() == plain[1].keys()
    runner.model.load_state_dict(state)
    for name, value in state.items():
        # Adam divides by gradients that may be zero up to rounding.
        assert (value - plain[1][name]).abs().max() < 1e-3, name


def test_trains_like_a_run_that_is_not_compiled(digits_root, tmp_path, plain):
    found = run(digits_root, tmp_path, [dict(type='CompileBackboneHook')])
    check_run(found, plain)


def counting_backend(graphs):
    """A backend that runs graphs as they are and collects them."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


def test_compiled_once_for_training_and_validation(
    digits_root, tmp_path, plain
):
    graphs = []
    hook = CompileBackboneHook(
        backend=counting_backend(graphs), fullgraph=True, dynamic=True
    )
    calls = []
    compile_backbone = nn.Module.compile

    def count(module, **options):
        calls.append((type(module).__name__, options))
        compile_backbone(module, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, 'compile', count)
        found = run(
            digits_root, tmp_path, [hook], **{'train_cfg.val_interval': 1}
        )
    check_run(found, plain)
    assert calls == [('VVT', hook.options)]
    assert len(graphs) == 2  # with and without gradients


def test_blocks_only(digits_root, tmp_path, plain, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, 'cache_size_limit', 8)
    graphs = []
    hook = CompileBackboneHook(
        block_type='VVTBlock', backend=counting_backend(graphs), fullgraph=True
    )
    runner, losses, state = run(
        digits_root, tmp_path, [hook], **{'train_cfg.val_interval': 1}
    )
    assert losses == pytest.approx(plain[0], rel=1e-5)
    assert state.keys() == plain[1].keys()
    compiled = {
        type(module).__name__
        for module in runner.model.modules()
        if module._compiled_call_impl is not None
    }
    assert compiled == {'VVTBlock'}
    assert len(graphs) == 2  # with and without gradients
    assert torch._dynamo.config.cache_size_limit == MAX_GRAPHS


@pytest.mark.parametrize('task', ['val', 'test'])
def test_compiled_without_training(task, digits_root, tmp_path):
    graphs = []
    hook = CompileBackboneHook(backend=counting_backend(graphs))
    # The checkpoint hook must do nothing here.
    options = {f'{task}_dataloader.dataset.indices': 20}
    runner = build_runner(digits_root, tmp_path, [hook], **options)
    getattr(runner, task)()
    assert len(graphs) >= 1


class WithBackbone(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def test_step(self, data):
        return []


class Augmented(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        return data_samples_list


def fake_runner(model):
    return SimpleNamespace(model=model, logger=logging.getLogger('hook'))


def test_models_in_wrappers():
    model = WithBackbone(nn.Linear(3, 2))
    wrapped = Augmented(model)
    CompileBackboneHook(backend='eager').before_test(fake_runner(wrapped))
    assert model.backbone._compiled_call_impl is not None


@pytest.mark.parametrize(
    'options,message',
    [
        (
            dict(mode='max-autotune', dynamic=True),
            "Sequential is compiled by torch.compile(mode='max-autotune', "
            'dynamic=True) when it is first called',
        ),
        (
            dict(block_type='Linear', dynamic=False),
            '2 Linear are compiled by torch.compile(dynamic=False) when they '
            'are first called',
        ),
        (
            dict(block_type='Linear'),
            '2 Linear are compiled by torch.compile(dynamic=True, '
            "options={'layout_optimization': False}) when they are first "
            'called',
        ),
    ],
)
def test_says_what_it_compiles(caplog, options, message):
    caplog.set_level(logging.INFO, logger='hook')
    hook = HOOKS.build(dict(type='CompileBackboneHook', **options))
    backbone = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    hook.before_train(fake_runner(WithBackbone(backbone)))
    assert caplog.messages == [message]


def test_no_such_blocks():
    message = (
        "no block_type='VVTBlock' in the backbone, whose modules are "
        'Linear, ReLU, Sequential$'
    )
    backbone = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    with pytest.raises(UserError, match=message):
        CompileBackboneHook('VVTBlock').before_train(
            fake_runner(WithBackbone(backbone))
        )


@pytest.mark.parametrize('model', [nn.Linear(3, 2), WithBackbone(None)])
def test_models_without_a_backbone(model):
    with pytest.raises(UserError, match=f'got {type(model).__name__}; rem'):
        CompileBackboneHook().before_train(fake_runner(model))


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(dynamics=True), r'compile\(dynamics=True\): .*dynamics'),
        (dict(backend='fast'), r"compile\(backend='fast'\): .*fast"),
        (dict(mode='fastest'), r"compile\(mode='fastest'\): .*fastest"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        CompileBackboneHook(**options).before_train(
            fake_runner(WithBackbone(nn.Linear(3, 2)))
        )
