"""Small models, checkpoints and data shared by the tests of the export."""

import torch
from mmengine.config import Config
from mmengine.runner import save_checkpoint

from mmvvt.preflight import build_model, read_config

from conftest import ROOT

DEMOS = ROOT / 'configs' / 'demo'
CONFIGS = dict(
    classifier=DEMOS / 'vvt-nano_digits.py',
    segmentor=DEMOS / 'vvt-nano_fpn_digit-scenes.py',
    detector=DEMOS / 'retinanet_vvt-nano_digit-scenes.py',
    upernet=ROOT
    / 'configs/segmentation/vvt-tiny_upernet_8xb2-160k_ade20k-512x512.py',
)
ARCH = dict(
    embed_dims=[8, 16, 24, 32],
    num_heads=[1, 2, 3, 4],
    mlp_ratios=[2, 2, 2, 2],
    depths=[1, 1, 1, 1],
)
# One stage: torch.export takes most of its time for symbolic sizes.
SHORT = {'model.backbone.out_indices': (0,), 'model.head.in_channels': 8}


def small_config(task, **options):
    """Return a demo config with a small backbone and random weights."""
    cfg = read_config(str(CONFIGS[task]))
    cfg.model.backbone.arch = dict(ARCH, _delete_=True)
    cfg.model.backbone.arch.pop('_delete_')
    cfg.model.backbone.pop('init_cfg', None)
    dims = ARCH['embed_dims']
    if task == 'classifier':
        cfg.model.head.in_channels = dims[-1]
    elif task == 'upernet':
        cfg.model.decode_head.in_channels = dims
        cfg.model.decode_head.channels = 16
        cfg.model.auxiliary_head.in_channels = dims[2]
    else:
        cfg.model.neck.in_channels = [
            dims[i] for i in cfg.model.backbone.out_indices
        ]
    cfg.merge_from_dict(options)
    return cfg


def build(cfg):
    """Build the model of a config in its own scope, not the last one's."""
    return build_model(read_config(cfg)).eval()


def load(cfg, checkpoint):
    model = build(cfg)
    model.load_state_dict(torch.load(checkpoint)['state_dict'])
    return model


def save_random(cfg: Config, path, noise=0.2, **meta):
    """Save a checkpoint with random weights that make the outputs vary."""
    torch.manual_seed(0)
    model = build(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape))
    save_checkpoint(dict(state_dict=model.state_dict(), meta=meta), str(path))
    return str(path)
