"""The recipes of configs/finetune on tiny data: train, test and infer."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mmvvt.checkpoint import load_checkpoint_file
from mmvvt.models import VVT

from conftest import ROOT, photograph, run_tool, write_coco

RECIPES = ROOT / 'configs' / 'finetune'
NANO = dict(
    embed_dims=[32, 64, 96, 128],
    num_heads=[1, 2, 3, 4],
    mlp_ratios=[2, 2, 2, 2],
    depths=[1, 1, 1, 1],
)
# Runs several tools in one process, because importing PyTorch takes seconds.
DRIVER = """
import json, runpy, sys
for tool, *arguments in json.loads(sys.argv[1]):
    print('---', tool, *arguments, flush=True)
    sys.argv = [tool, *arguments]
    try:
        runpy.run_path(tool, run_name='__main__')
        code = 0
    except SystemExit as error:
        code = error.code
    if code not in (None, 0):
        sys.exit(f'{tool}: {code}')
print('done')
"""
SHORT = """
train_cfg = dict(max_epochs=2)
train_dataloader['num_workers'] = val_dataloader['num_workers'] = 0
train_dataloader['batch_size'] = 4
"""


def run_tools(*commands):
    """Run command lines of Python tools one after the other; all must pass."""
    commands = [[str(word) for word in command] for command in commands]
    done = run_tool('-c', DRIVER, json.dumps(commands))
    assert done.returncode == 0, done.stdout[-5000:]
    assert done.stdout.splitlines()[-1] == 'done'
    return done.stdout


def copy_recipe(name, folder, variables, more=''):
    """Copy a recipe as a user does: set the first variables, and add lines."""
    text = (RECIPES / f'{name}.py').read_text()
    text = text.replace("'../_base_", f"'{ROOT}/configs/_base_")
    for key, value in variables.items():
        text, count = re.subn(
            rf'^{key} = .*$', f'{key} = {value!r}', text, flags=re.MULTILINE
        )
        assert count == 1, key
    path = folder / f'{name}.py'
    path.write_text(text + more)
    return path


def tensors(path, prefix='backbone.'):
    state = load_checkpoint_file(str(path))['state_dict']
    return {key[len(prefix) :]: t for key, t in state.items() if prefix in key}


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    """A converted checkpoint of a small VVT with 1000 classes."""
    torch.manual_seed(0)
    backbone = VVT(NANO)
    backbone.init_weights()
    for name, parameter in backbone.named_parameters():
        if name.endswith('bias'):  # as after training
            torch.nn.init.normal_(parameter, std=0.02)
    state = {f'backbone.{k}': v for k, v in backbone.state_dict().items()}
    state['head.fc.weight'] = torch.randn(1000, 128)
    state['head.fc.bias'] = torch.zeros(1000)
    path = tmp_path_factory.mktemp('pretrained') / 'vvt-nano_in1k.pth'
    torch.save(dict(state_dict=state), path)
    return path


# -- classification -----------------------------------------------------------

CLASSIFIER = f"""
model['backbone'].update(arch={NANO})
model['head'].update(in_channels=128)
train_pipeline[1].update(scale=64)
test_pipeline[1].update(scale=72)
test_pipeline[2].update(crop_size=64)
{SHORT}"""


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Folders of three classes: photographs with a tint."""
    root = tmp_path_factory.mktemp('data') / 'own-images'
    for split, number in (('train', 4), ('val', 2)):
        for channel, name in enumerate(('bird', 'cat', 'dog')):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                image = photograph(80 + 8 * index, 100)
                image[..., channel] = 255
                cv2.imwrite(str(folder / f'{index}.jpg'), image)
    return root


@pytest.fixture(scope='module')
def classifier(tmp_path_factory, images, pretrained):
    """Work directory after training and testing, and what was printed."""
    folder = tmp_path_factory.mktemp('classifier')
    config = copy_recipe(
        'vvt-tiny_1xb32_own-images',
        folder,
        dict(data_root=str(images), pretrained=str(pretrained)),
        CLASSIFIER,
    )
    work = folder / 'work'
    output = run_tools(
        ['tools/train.py', config, '--work-dir', work]
        + ['--cfg-options', 'model.backbone.frozen_stages=1'],
        ['tools/test.py', config, work / 'epoch_2.pth', '--work-dir', work]
        + ['--out', work / 'test.pkl'],
        ['tools/infer.py', images / 'val', config, work / 'epoch_2.pth']
        + ['--out-dir', work / 'infer'],
        ['tools/analysis_tools/report_classification.py', config]
        + [work / 'epoch_2.pth', work, work / 'test.pkl'],
    )
    return work, output


def test_classifier_of_three_classes(classifier):
    work, output = classifier
    assert 'accuracy/top1' in output and 'top5' not in output
    checkpoint = load_checkpoint_file(str(work / 'epoch_2.pth'))
    assert checkpoint['meta']['dataset_meta']['classes'] == (
        'bird',
        'cat',
        'dog',
    )
    assert checkpoint['state_dict']['head.fc.weight'].shape == (3, 128)
    results = json.loads((work / 'infer' / 'results.json').read_text())
    assert len(results['images']) == 6 and not results['skipped']
    for entry in results['images']:
        # all of the classes, which are fewer than five
        assert sorted(entry['classes']) == ['bird', 'cat', 'dog']
        assert sum(entry['scores']) == pytest.approx(1, abs=1e-5)
        picture = cv2.imread(str(work / 'infer' / entry['picture']))
        assert picture is not None and picture.std() > 10
    assert 'of 6 held-out images)' in output
    assert cv2.imread(str(work / 'predictions.png')).std() > 10


def test_frozen_stages_do_not_change(classifier, pretrained):
    before = tensors(pretrained)
    after = tensors(classifier[0] / 'epoch_2.pth')
    frozen = re.compile(r'(patch_embed|block|norm)[12]\b')
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert not [key for key in changed if frozen.match(key)]
    # norm4 and the layers before it are trained.
    assert {k for k in before if k not in changed} == {
        k for k in before if frozen.match(k)
    }


# -- segmentation -------------------------------------------------------------


@pytest.fixture(scope='module')
def masks(tmp_path_factory):
    """Photographs with a bright object, and a border that is ignored."""
    root = tmp_path_factory.mktemp('data') / 'own-masks'
    for split, number in (('train', 4), ('val', 2)):
        for kind in ('images', 'masks'):
            (root / kind / split).mkdir(parents=True)
        for index in range(number):
            image, mask = photograph(72, 96), np.zeros((72, 96), np.uint8)
            where = slice(10 + 5 * index, 50), slice(20, 60 + 5 * index)
            image[where], mask[where] = 240, 1
            mask[:, :6] = 255
            cv2.imwrite(str(root / f'images/{split}/{index}.jpg'), image)
            cv2.imwrite(str(root / f'masks/{split}/{index}.png'), mask)
    return root


def test_segmentor_of_two_classes(masks, pretrained, tmp_path):
    config = copy_recipe(
        'vvt-tiny_fpn_1xb4_own-masks-512x512',
        tmp_path,
        dict(
            data_root=str(masks),
            pretrained=str(pretrained),
            crop_size=(64, 64),
        ),
        f"""
model['backbone'].update(arch={NANO})
model['neck'] = dict(in_channels=[32, 64, 96, 128], out_channels=32)
model['decode_head'].update(in_channels=[32] * 4, channels=32)
train_pipeline[3].update(scale=(128, 64))
test_pipeline[1].update(scale=(128, 64))
{SHORT}""",
    )
    work = tmp_path / 'work'
    output = run_tools(
        ['tools/train.py', config, '--work-dir', work],
        ['tools/test.py', config, work / 'epoch_2.pth', '--work-dir', work]
        + ['--out', work / 'test.pkl'],
        ['tools/infer.py', masks / 'images/val', config]
        + [work / 'epoch_2.pth', '--out-dir', work / 'infer'],
        ['tools/analysis_tools/report_segmentation.py', config]
        + [work / 'test.pkl', work / 'sheet.png'],
    )
    for name in ('background', 'object'):
        assert re.search(rf'\|\s+{name}\s+\|', output), output[-3000:]
    assert list(work.glob('best_mIoU_epoch_*.pth'))
    results = json.loads((work / 'infer' / 'results.json').read_text())
    assert len(results['images']) == 2
    for entry in results['images']:
        assert set(entry['classes']) <= {'background', 'object'}
    assert cv2.imread(str(work / 'sheet.png')).std() > 10


# -- detection ----------------------------------------------------------------


def test_detector_with_own_names(pretrained, tmp_path):
    pytest.importorskip('mmdet')
    write_coco(tmp_path / 'coco', ('cat', 'dog', 'garden gnome'))
    root = tmp_path / 'own-boxes'
    root.mkdir()
    for split in ('train', 'val'):
        (tmp_path / f'coco/{split}2017').rename(root / split)
        (tmp_path / f'coco/annotations/instances_{split}2017.json').rename(
            root / f'{split}.json'
        )
    config = copy_recipe(
        'retinanet_vvt-tiny_fpn_1xb4_own-boxes',
        tmp_path,
        dict(
            data_root=str(root),
            classes=('cat', 'dog', 'garden gnome'),
            pretrained=str(pretrained),
        ),
        f"""
model['backbone'].update(arch={NANO})
model['neck'] = dict(in_channels=[64, 96, 128], out_channels=32)
model['bbox_head'].update(in_channels=32, feat_channels=32, stacked_convs=1)
model['test_cfg'] = dict(score_thr=0.0, max_per_img=5)
train_pipeline[2].update(scale=(101, 75))
test_pipeline[1].update(scale=(101, 75))
{SHORT}""",
    )
    work = tmp_path / 'work'
    output = run_tools(
        ['tools/train.py', config, '--work-dir', work],
        ['tools/test.py', config, work / 'epoch_2.pth', '--work-dir', work]
        + ['--out', work / 'test.pkl'],
        ['tools/infer.py', root / 'val', config, work / 'epoch_2.pth']
        + ['--out-dir', work / 'infer', '--score-thr', 0],
        ['tools/analysis_tools/report_detection.py', config]
        + [work / 'test.pkl', work / 'sheet.png'],
    )
    assert 'coco/bbox_mAP' in output
    meta = load_checkpoint_file(str(work / 'epoch_2.pth'))['meta']
    assert meta['dataset_meta']['classes'] == ('cat', 'dog', 'garden gnome')
    results = json.loads((work / 'infer' / 'results.json').read_text())
    found = {name for e in results['images'] for name in e['classes']}
    assert found and found <= {'cat', 'dog', 'garden gnome'}


# -- LoRA, and four channels of 16 bits ---------------------------------------


@pytest.fixture(scope='module')
def deep_images(tmp_path_factory):
    """Folders of three classes: PNG and TIFF files, four channels, 16 bits.

    The classes differ in the lower 8 bits only.
    """
    root = tmp_path_factory.mktemp('data') / 'deep-images'
    random = np.random.RandomState(0)
    for split, number in (('train', 4), ('val', 2)):
        for label, name in enumerate(('bird', 'cat', 'dog')):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                upper = random.randint(0, 256, (72, 80, 4))
                image = (256 * upper + 100 * label).astype(np.uint16)
                suffix = ('png', 'tif', 'tiff', 'png')[index]
                cv2.imwrite(str(folder / f'{index}.{suffix}'), image)
    return root


@pytest.fixture(scope='module')
def adapted(tmp_path_factory, images, deep_images, pretrained):
    """Folder with a run of the LoRA recipe and one with four channels."""
    from importlib.util import find_spec

    folder = tmp_path_factory.mktemp('adapted')
    variables = dict(data_root=str(images), pretrained=str(pretrained))
    plain = copy_recipe(
        'vvt-tiny_1xb32_own-images', folder, variables, CLASSIFIER
    )
    lora = copy_recipe(
        'vvt-tiny_1xb32_own-images_lora',
        folder,
        dict(pretrained=str(pretrained)),
        f"model['backbone']['module'].update(arch={NANO})\n",
    )
    deep = copy_recipe(
        'vvt-tiny_1xb32_own-images_4-channels',
        folder,
        dict(data_root=str(deep_images), pretrained=str(folder / 'bgrx.pth')),
        """
train_pipeline[1].update(scale=64)
test_pipeline[1].update(scale=72)
test_pipeline[2].update(crop_size=64)
""",
    )
    spec = find_spec('mmpretrain')
    merge = Path(spec.origin).parent / '.mim/tools/model_converters'
    work = folder / 'lora'
    last = work / 'epoch_2.pth'
    output = run_tools(
        ['tools/train.py', lora, '--work-dir', work],
        ['tools/test.py', lora, last, '--work-dir', work]
        + ['--out', folder / 'lora.json'],
        ['tools/infer.py', images / 'val', lora, last]
        + ['--out-dir', folder / 'infer-lora'],
        [merge / 'merge_lora_weight.py', lora, last, folder / 'merged.pth'],
        ['tools/infer.py', images / 'val', plain, folder / 'merged.pth']
        + ['--out-dir', folder / 'infer-merged'],
        ['tools/model_converters/inflate_input.py', pretrained]
        + [folder / 'bgrx.pth', '--in-channels', 4, '--rgb', 2, 1, 0],
        ['tools/train.py', deep, '--work-dir', folder / 'deep'],
        ['tools/test.py', deep, folder / 'deep/epoch_2.pth']
        + ['--work-dir', folder / 'deep'],
        ['tools/infer.py', deep_images / 'val', deep]
        + [folder / 'deep/epoch_2.pth', '--out-dir', folder / 'infer-deep'],
    )
    return folder, output


def scores(folder):
    results = json.loads((folder / 'results.json').read_text())
    assert not results['skipped']
    return [dict(zip(e['classes'], e['scores'])) for e in results['images']]


def test_lora_trains_little_and_is_merged(adapted, pretrained):
    folder, _ = adapted
    state = tensors(folder / 'lora/epoch_2.pth')
    assert state and all('.lora_' in key for key in state)
    assert any(
        t.abs().max() > 0 for key, t in state.items() if 'lora_up' in key
    )
    # The merged model has the names of a VVT, and is the same function.
    before, merged = tensors(pretrained), tensors(folder / 'merged.pth')
    assert before.keys() == merged.keys()
    changed = {k for k in before if not torch.equal(before[k], merged[k])}
    assert changed and all(
        re.search(r'attn\.(q|k|v|out)_proj\.weight$', key) for key in changed
    )
    for one, other in zip(
        scores(folder / 'infer-lora'), scores(folder / 'infer-merged')
    ):
        assert one == pytest.approx(other, abs=2e-6)


def test_four_channels_of_16_bits(adapted, deep_images):
    folder, _ = adapted
    weight = tensors(folder / 'deep/epoch_2.pth')['patch_embed1.proj.weight']
    assert weight.shape == (32, 4, 7, 7)
    assert weight[:, 3].abs().max() > 0  # has been trained
    assert len(scores(folder / 'infer-deep')) == 6
    picture = cv2.imread(str(folder / 'infer-deep/pictures/cat/0.png.png'))
    assert picture is not None and picture.std() > 10
