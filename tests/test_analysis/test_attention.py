"""Attention maps are the rows of the quadratic form."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmvvt.analysis.attention import attention_map, vicinity_map
from mmvvt.apis import Predictor, attention_maps
from mmvvt.errors import UserError
from mmvvt.models import VicinityAttention
from mmvvt.ops import LOCALITIES, reference, vicinity_attention
from mmvvt.preflight import build_model, read_config

from conftest import ROOT, photograph, relative_error, run_tool

GRIDS = [(4, 4), (3, 7), (1, 5), (6, 1), (1, 1)]
DIGITS = str(ROOT / 'configs/demo/vvt-nano_digits.py')


@pytest.mark.parametrize('sr_ratio', [1, 2])
@pytest.mark.parametrize('grid', [(4, 4), (3, 7), (6, 2)])
@pytest.mark.parametrize('locality', LOCALITIES)
def test_rows_of_the_operator(locality, grid, sr_ratio):
    """With one-hot values, outputs are the weights of the keys."""
    attn = VicinityAttention(
        12, 3, fr_ratio=2, sr_ratio=sr_ratio, locality=locality
    ).double()
    x = torch.randn(1, grid[0] * grid[1], 12, dtype=torch.float64)
    with torch.no_grad():
        source, key_shape = attn._reduce_grid(x, grid)
        q = attn._split_heads(attn.q_proj(x))
        k = attn._split_heads(attn.k_proj(source))
    keys = key_shape[0] * key_shape[1]
    # The values have d = 2 channels, so two keys are examined at a time.
    one_hot = torch.eye(keys, keys + keys % 2, dtype=torch.float64)
    values = [v.expand(1, 3, keys, 2) for v in one_hot.split(2, dim=1)]

    def weights(attend, *args, **kwargs):
        outs = [attend(q, k, v, *args, **kwargs) for v in values]
        return torch.cat(outs, dim=-1)[..., :keys]

    oracle, similarity = (
        weights(reference.quadratic_attention, grid, key_shape, form, attn.eps)
        for form in (locality, 'none')
    )
    operator = weights(
        vicinity_attention,
        grid,
        key_shape=key_shape,
        locality=locality,
        clamp=False,
        eps=attn.eps,
    )
    vicinity = reference.vicinity_weight(grid, key_shape, locality, x)
    for index in range(len(x[0])):
        query = divmod(index, grid[1])
        found = attention_map(attn, x, grid, query)
        assert found.attention.shape == (3, *key_shape)
        for ours, expected in (
            (found.attention, oracle[0, :, index]),
            (found.attention, operator[0, :, index]),
            (found.similarity, similarity[0, :, index]),
            (found.vicinity[None], vicinity[None, index]),
        ):
            expected = expected.reshape(ours.shape)
            assert relative_error(ours, expected) < 1e-12


@pytest.mark.parametrize('locality', LOCALITIES)
@pytest.mark.parametrize('grid', GRIDS)
def test_vicinity_is_largest_at_the_query(grid, locality):
    for index in range(grid[0] * grid[1]):
        query = divmod(index, grid[1])
        weights = vicinity_map(query, grid, grid, locality, torch.zeros(1))
        assert weights[query] == weights.max()
        assert weights.shape == grid


def test_memory_is_linear_in_the_tokens():
    """All pairs of 262 144 tokens would take 256 GiB."""
    attn = VicinityAttention(4, 1)
    x = torch.randn(1, 512 * 512, 4)
    found = attention_map(attn, x, (512, 512), (100, 511))
    assert found.attention.shape == (1, 512, 512)


# -- with a model and an image ------------------------------------------------


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = str(tmp_path_factory.mktemp('digits') / 'random.pth')
    model = build_model(read_config(DIGITS))
    torch.save(dict(state_dict=model.state_dict()), path)
    return path


@pytest.fixture(scope='module')
def predictor(checkpoint):
    return Predictor(DIGITS, checkpoint, 'cpu')


@pytest.fixture(scope='module')
def image(tmp_path_factory):
    path = str(tmp_path_factory.mktemp('image') / 'photograph.png')
    cv2.imwrite(path, photograph(75, 101))
    return path


def test_maps_of_a_model(predictor, image):
    before = predictor(image)
    points = [(0, 0), (1, 1), (0.6, 0.4)]
    result = attention_maps(predictor, image, ['block1.0', 'block3.1'], points)
    assert predictor(image) == before  # no hooks are left
    height, width = result.image.shape[:2]
    assert result.image.dtype == np.uint8 and result.image.shape[2] == 3
    assert len(result.maps) == 3
    for maps in result.maps:
        assert list(maps) == ['block1.0', 'block3.1']
        for name, stride in (('block1.0', 4), ('block3.1', 16)):
            shape = (height // stride, width // stride)
            assert maps[name].attention.shape[1:] == shape
            sums = maps[name].attention.sum(dim=(1, 2))
            assert torch.all((sums > 0.99) & (sums < 1.0001))
    # The queries are the first token, the last token and one between them.
    for maps, query in zip(result.maps, [(0, 0), (7, 7), (3, 4)]):
        vicinity = maps['block1.0'].vicinity
        assert divmod(int(vicinity.argmax()), vicinity.shape[1]) == query


@pytest.mark.parametrize('to_rgb', [False, True])
def test_image_is_the_input_of_the_network(checkpoint, image, to_rgb):
    """It is shown in RGB, also if the network takes BGR."""
    cfg = read_config(DIGITS, {'data_preprocessor.to_rgb': to_rgb})
    predictor = Predictor(cfg, checkpoint, 'cpu')
    result = attention_maps(predictor, image, ['block1.0'], [(0.5, 0.5)])
    (inputs,) = predictor.pipeline(image)[0]['inputs']
    # BGR (C, H, W) -> RGB (H, W, C)
    expected = inputs.flip(0).permute(1, 2, 0).numpy()
    assert (np.abs(result.image - expected.astype(float)) <= 1).all()
    assert not np.allclose(expected[..., 0], expected[..., 2], atol=9)


def test_dark_image_is_shown_as_it_is(checkpoint, image):
    """Black is not exactly 0 after normalisation with these values."""
    options = {
        'data_preprocessor.mean': [123.675, 116.28, 103.53],
        'data_preprocessor.std': [58.395, 57.12, 57.375],
    }
    predictor = Predictor(read_config(DIGITS, options), checkpoint, 'cpu')
    dark = cv2.imread(image) // 3
    dark[:30] = 0
    result = attention_maps(predictor, dark, ['block1.0'], [(0.5, 0.5)])
    (inputs,) = predictor.pipeline(dark)[0]['inputs']
    assert inputs.min() == 0 and inputs.max() < 90
    # BGR (C, H, W) -> RGB (H, W, C)
    expected = inputs.flip(0).permute(1, 2, 0).numpy()
    assert (np.abs(result.image - expected.astype(float)) <= 1).all()


def test_whole_image_of_a_segmentor(tmp_path, image):
    """The maps are not those of a crop of sliding inference."""
    pytest.importorskip('mmseg')
    cfg = Config.fromfile(ROOT / 'configs/demo/vvt-nano_fpn_digit-scenes.py')
    cfg.model.test_cfg = dict(
        mode='slide', crop_size=(64, 64), stride=(32, 32)
    )
    path = str(tmp_path / 'slide.py')
    cfg.dump(path)
    cfg = read_config(path)
    weights = tmp_path / 'slide.pth'
    torch.save(dict(state_dict=build_model(cfg).state_dict()), weights)
    predictor = Predictor(cfg, str(weights), 'cpu')
    result = attention_maps(predictor, image, ['block1.0'], [(1, 1)])
    height, width = result.image.shape[:2]
    assert width > 64
    (maps,) = result.maps
    vicinity = maps['block1.0'].vicinity
    assert vicinity.shape == (-(-height // 4), -(-width // 4))
    assert int(vicinity.argmax()) == vicinity.numel() - 1


@pytest.mark.parametrize(
    'blocks,points,message',
    [
        (['block5.0'], [(0, 0)], 'no block block5.0; the blocks are block1.0'),
        (['attn'], [(0, 0)], 'no block attn'),
        (['block1.0'], [(0.5, 1.1)], 'x and y from 0 to 1, got (0.5, 1.1)'),
        (['block1.0'], [(-1, 0)], 'x and y from 0 to 1, got (-1, 0)'),
        (['block1.0'], [(float('nan'), 0)], 'from 0 to 1, got (nan, 0)'),
    ],
)
def test_bad_input(predictor, image, blocks, points, message):
    with pytest.raises(UserError) as caught:
        attention_maps(predictor, image, blocks, points)
    assert message in str(caught.value)
    assert not predictor.model.backbone._forward_pre_hooks


def test_another_backbone(tmp_path, image):
    cfg = Config.fromfile(DIGITS)
    cfg.model.backbone = dict(type='ResNet', depth=18, out_indices=(3,))
    cfg.model.head.in_channels = 512
    path = tmp_path / 'resnet.py'
    cfg.dump(str(path))
    model = build_model(read_config(str(path)))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'resnet.pth')
    resnet = Predictor(str(path), str(tmp_path / 'resnet.pth'), 'cpu')
    with pytest.raises(UserError, match='the model has no VVT backbone'):
        attention_maps(resnet, image, ['block1.0'], [(0, 0)])


def test_tool(checkpoint, image, tmp_path):
    out = tmp_path / 'folder' / 'maps.png'
    done = run_tool(
        *('tools/analysis_tools/vis_attention.py', image, DIGITS, checkpoint),
        *(out, '--blocks', 'block1.0', 'block1.0', 'block3.0'),
        *('--points', '0.2,0.3', '1,0'),
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith(f'6 queries and blocks: {out}\n')
    assert cv2.imread(str(out)).std() > 10
