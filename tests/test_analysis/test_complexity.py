"""Compare counted multiply-adds with analytical formulas."""

import pytest
import torch
import torch.nn as nn
from mmengine.config import Config

from mmvvt.analysis import complexity
from mmvvt.analysis.complexity import count
from mmvvt.models import VicinityAttention

from conftest import ROOT, build_model


class OnGrid(nn.Module):
    def __init__(self, module, grid):
        super().__init__()
        self.module, self.grid = module, grid

    def forward(self, image):
        return self.module(image.flatten(2).transpose(1, 2), self.grid)


def test_attention_by_hand():
    c, heads, fr, n = 16, 2, 2, 6 * 10
    d = c // fr // heads
    module = VicinityAttention(
        c, heads, fr_ratio=fr, backend='torch', clamp=False
    )
    found = count(OnGrid(module, (6, 10)), (1, c, 6, 10))
    linears = 3 * n * c * c // fr + n * c // fr * c + 2 * c * c
    # features with 4d channels: key-value sums, numerator, denominator
    attention = heads * (n * 4 * d * d + n * 4 * d * d + n * 4 * d)
    assert found.multiply_adds == linears + attention
    assert found.parameters == sum(p.numel() for p in module.parameters())
    # The module is not changed.
    assert module.backend == 'torch' and module.clamp is False


def test_convolution_and_mode():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False))
    model.train()
    found = count(model, (2, 3, 5, 7))
    assert found.multiply_adds == 2 * 8 * 3 * 9 * 35
    assert model.training and torch.is_grad_enabled()


def detector(name, **backbone):
    """Build the detector of a config with a shallow VVT."""
    pytest.importorskip('mmdet')
    cfg = Config.fromfile(ROOT / 'configs' / 'detection' / f'{name}.py')
    cfg.model.backbone.update(
        init_cfg=None,
        arch=dict(
            embed_dims=[96, 160, 320, 512],
            num_heads=[1, 2, 5, 8],
            mlp_ratios=[1, 1, 1, 1],
            depths=[1, 1, 1, 1],
        ),
    )
    return build_model(cfg.model, 'mmdet')


HEIGHT, WIDTH = 64, 96
# Number of pixels of each pyramid level, strides 4 to 128
PIXELS = {s: -(-HEIGHT // s) * -(-WIDTH // s) for s in (4, 8, 16, 32, 64, 128)}


def test_detector_of_one_stage_by_hand():
    model = detector('retinanet_vvt-tiny_fpn_1x_coco')
    shape = (1, 3, HEIGHT, WIDTH)
    found = count(model, shape).multiply_adds
    # 1 x 1 lateral and 3 x 3 output convolutions, and two additional levels
    # with stride 2
    neck = sum(
        PIXELS[stride] * 256 * (dims + 9 * 256)
        for stride, dims in ((8, 160), (16, 320), (32, 512))
    )
    neck += PIXELS[64] * 256 * 9 * 512 + PIXELS[128] * 256 * 9 * 256
    # two branches of four convolutions, then 80 class scores and 4 box
    # coordinates for each of 9 anchors
    pixels = sum(PIXELS[stride] for stride in (8, 16, 32, 64, 128))
    head = pixels * 256 * 9 * (8 * 256 + 9 * (80 + 4))
    assert found == count(model.backbone, shape).multiply_adds + neck + head


@pytest.mark.parametrize(
    'name,stages',
    [
        ('mask-rcnn_vvt-tiny_fpn_1x_coco', 1),
        ('cascade-mask-rcnn_vvt-small_fpn_ms-3x_coco', 3),
    ],
)
def test_detector_of_two_stages_by_hand(name, stages, monkeypatch):
    """The numbers of proposals for box and mask heads are applied."""
    monkeypatch.setattr(complexity, 'NUM_PROPOSALS', 20)
    monkeypatch.setattr(complexity, 'NUM_MASKS', 7)
    model = detector(name)
    shape = (1, 3, HEIGHT, WIDTH)
    found = count(model, shape).multiply_adds
    neck = sum(
        PIXELS[stride] * 256 * (dims + 9 * 256)
        for stride, dims in ((4, 96), (8, 160), (16, 320), (32, 512))
    )
    # one 3 x 3 convolution, then an objectness score and 4 box coordinates
    # for each of 3 anchors
    pixels = sum(PIXELS[stride] for stride in (4, 8, 16, 32, 64))
    rpn = pixels * 256 * (9 * 256 + 3 * (1 + 4))
    if stages == 1:  # two linear layers
        boxes = 49 * 256 * 1024 + 1024 * 1024
    else:  # four convolutions and a linear layer
        boxes = 4 * 49 * 256 * 9 * 256 + 49 * 256 * 1024
    boxes += 1024 * (81 + 4 * 80)
    # four convolutions, a 2 x 2 deconvolution and 80 mask channels
    masks = 196 * 256 * (4 * 9 * 256 + 4 * 256) + 784 * 256 * 80
    assert found == (
        count(model.backbone, shape).multiply_adds
        + neck
        + rpn
        + stages * (20 * boxes + 7 * masks)
    )
    two = count(model, (2, *shape[1:])).multiply_adds
    assert two == 2 * found


def test_detector_with_a_transformer():
    """DINO is counted; it requires data samples to run."""
    model = detector('dino-4scale_vvt-small_12e_coco')
    model.num_queries = 50
    model.query_embedding = nn.Embedding(50, 256)
    shape = (1, 3, 128, 192)
    tokens = sum(PIXELS[s] * 4 for s in (8, 16, 32)) + 2 * 3
    encoder = (
        6
        * tokens
        * 256
        * (
            # value and output projections; offsets and weights of 8 heads,
            # 4 levels and 4 points; feed-forward network
            2 * 256 + 3 * 8 * 4 * 4 + 2 * 2048
        )
    )
    decoder = 6 * (
        # projections and products of self-attention, then as above
        50 * 256 * (4 * 256 + 2 * 50)
        + 50 * 256 * (256 + 3 * 8 * 4 * 4 + 2 * 2048)
        + tokens * 256 * 256
        +
        # positional embedding and refinement of the boxes
        50 * 256 * (512 + 256)
        + 50 * 256 * (2 * 256 + 4)
    )
    found = count(model, shape).multiply_adds
    by_part = found - count(model.backbone, shape).multiply_adds
    # The remainder is the neck, the first stage and the heads.
    neck = sum(
        4 * PIXELS[stride] * 256 * dims
        for stride, dims in ((8, 160), (16, 320), (32, 512))
    )
    neck += 2 * 3 * 256 * 9 * 512
    branch = 256 * (80 + 2 * 256 + 4)
    assert by_part == (
        neck
        + encoder
        + decoder
        + tokens * (256 * 256 + branch)
        + 6 * 50 * branch
    )
