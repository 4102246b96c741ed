"""A checkpoint of an RGB model is converted to other input channels."""

import pytest
import torch

from mmvvt.checkpoint import (
    CheckpointError,
    inflate_input,
    load_checkpoint_file,
)
from mmvvt.errors import UserError
from mmvvt.models import VVT

from conftest import run_tool

ARCH = dict(
    embed_dims=[16, 24, 32, 40],
    num_heads=[1, 1, 2, 2],
    mlp_ratios=[2, 2, 2, 2],
    depths=[1, 1, 1, 1],
)
KEY = 'backbone.patch_embed1.proj.weight'


@pytest.fixture(scope='module')
def rgb():
    """A backbone with three channels, in float64."""
    torch.manual_seed(0)
    return VVT(ARCH, out_indices=(0, 3)).double().eval()


def checkpoint(model):
    state = {f'backbone.{k}': v for k, v in model.state_dict().items()}
    return dict(state_dict=state, meta=dict(epoch=7), optimizer=dict())


def inflated(model, channels, **options):
    """Return the backbone with another number of channels."""
    result = inflate_input(checkpoint(model), channels, **options)
    other = VVT(ARCH, in_channels=channels, out_indices=(0, 3)).double().eval()
    state = {k[len('backbone.') :]: v for k, v in result['state_dict'].items()}
    other.load_state_dict(state, strict=True)
    return other


def check_equal(actual, expected):
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    'channels,options',
    [(1, {}), (2, {}), (4, dict(extra='mean')), (7, dict(extra='mean'))],
)
def test_equal_channels_are_a_grey_image(rgb, channels, options):
    grey = torch.randn(2, 1, 40, 48, dtype=torch.float64)
    model = inflated(rgb, channels, **options)
    check_equal(
        model(grey.expand(-1, channels, -1, -1)),
        rgb(grey.expand(-1, 3, -1, -1)),
    )


@pytest.mark.parametrize(
    'channels,order', [(4, (0, 1, 2)), (4, (2, 1, 0)), (9, (7, 0, 3))]
)
def test_zeros_leave_the_output_for_rgb(rgb, channels, order):
    image = torch.randn(2, channels, 40, 48, dtype=torch.float64)
    model = inflated(rgb, channels, rgb=order)
    check_equal(model(image), rgb(image[:, list(order)]))
    # The new kernels have gradients, so that they are trained.
    model(image)[-1].square().sum().backward()
    gradient = model.patch_embed1.proj.weight.grad
    assert (gradient.abs().amax(dim=(0, 2, 3)) > 0).all()


def test_bgr(rgb):
    image = torch.randn(1, 3, 40, 48, dtype=torch.float64)
    check_equal(inflated(rgb, 3, rgb=(2, 1, 0))(image.flip(1)), rgb(image))


def test_the_input_is_not_changed(rgb):
    source = checkpoint(rgb)
    before = source['state_dict'][KEY].clone()
    result = inflate_input(source, 1)
    assert torch.equal(source['state_dict'][KEY], before)
    assert set(result) == {'state_dict', 'meta'}  # nothing to resume from
    assert result['meta'] == dict(epoch=7)


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(in_channels=0), 'in_channels must be at least 1, got 0'),
        (
            dict(in_channels=4, rgb=(0, 1, 4)),
            'rgb must be three different channels from 0 to 3',
        ),
        (
            dict(in_channels=4, rgb=(0, 1, 1)),
            'rgb must be three different channels from 0 to 3',
        ),
        (dict(in_channels=4, extra='copy'), "one of ('zeros', 'mean')"),
    ],
)
def test_wrong_arguments(rgb, options, message):
    with pytest.raises(UserError) as caught:
        inflate_input(checkpoint(rgb), **options)
    assert message in str(caught.value)


def test_other_checkpoints_are_refused(rgb):
    twice = inflate_input(checkpoint(rgb), 4)
    with pytest.raises(CheckpointError, match='three input channels'):
        inflate_input(twice, 4)
    official = dict(model=rgb.state_dict())
    with pytest.raises(CheckpointError, match='must be converted first'):
        inflate_input(official, 4)


def test_tool(rgb, tmp_path):
    source, target = tmp_path / 'rgb.pth', tmp_path / 'four.pth'
    torch.save(checkpoint(rgb), source)
    tool = 'tools/model_converters/inflate_input.py'
    done = run_tool(tool, source, target, '--in-channels', 4)
    assert done.returncode == 0, done.stdout
    (*_, line) = done.stdout.splitlines()
    assert line == f'wrote {target} for in_channels=4'
    written = load_checkpoint_file(str(target))['state_dict'][KEY]
    assert torch.equal(written[:, :3], rgb.patch_embed1.proj.weight)
    assert not written[:, 3].any()

    done = run_tool(tool, target, tmp_path / 'x.pth', '--in-channels', 5)
    assert done.returncode == 1
    (line,) = done.stdout.strip().splitlines()
    assert line.startswith(f'error: {KEY} must have three input channels')
    assert not (tmp_path / 'x.pth').exists()
