"""The tools of mmpretrain, mmseg and mmdet support our configs.

docs/stock_tools.md lists what these tests check.
"""

import importlib
import time
from pathlib import Path

import cv2
import mmengine
import pytest
import torch

from mmvvt.datasets import write_digit_scenes
from mmvvt.models import VVT

from conftest import ROOT
from tool_server import ToolServer

CONFIGS = ROOT / 'configs'
DIGITS = CONFIGS / 'demo' / 'vvt-nano_digits.py'
SCENES = CONFIGS / 'demo' / 'vvt-nano_fpn_digit-scenes.py'
BOXES = CONFIGS / 'demo' / 'mask-rcnn_vvt-nano_digit-scenes.py'
ADE = CONFIGS / 'segmentation' / 'vvt-tiny_fpn_8xb4-40k_ade20k-512x512.py'
DOCUMENT = ROOT / 'docs' / 'stock_tools.md'

# Python code of the documented command for tools that read a checkpoint but no
# config, so that nothing imports mmvvt
LAUNCHER = (
    'import mmvvt, runpy, sys; del sys.argv[0]; '
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


class StockTools:
    """Run the tools of a package.

    Args:
        package (str): 'mmpretrain', 'mmseg' or 'mmdet'.
        folder (Path): Empty folder, in which the tools run.
    """

    def __init__(self, package, folder):
        path = Path(importlib.import_module(package).__file__).parent
        self.tools = path / '.mim' / 'tools'
        if not self.tools.is_dir():
            pytest.skip(f'this {package} was installed without tools')
        self.folder = folder
        # Pictures of confusion matrices would have 35 million pixels.
        (folder / 'matplotlibrc').write_text('savefig.dpi: 20')
        modules = (
            'apis',
            'datasets',
            'engine',
            'evaluation',
            'models',
            'visualization',
        )
        self.server = ToolServer(
            [f'{package}.{name}' for name in modules] + ['matplotlib.pyplot'],
            MATPLOTLIBRC=str(folder / 'matplotlibrc'),
            MPLBACKEND='Agg',
            OMP_NUM_THREADS='1',
        )

    def start(self, tool, *arguments, code=None):
        """Run a tool and return its exit code and its output."""
        path = self.tools / f'{tool}.py'
        if not path.is_file():
            pytest.skip(f'there is no {path}')
        command = [str(path), *map(str, arguments)]
        if code is not None:
            command = ['-c', code, *command]
        done = self.server.run(command, self.folder, timeout=300)
        return done.returncode, done.stdout

    def run(self, tool, *arguments, **options):
        """Run a tool that must succeed, and return its output."""
        code, output = self.start(tool, *arguments, **options)
        assert code == 0, output[-3000:]
        return output


def tools_of(package, tmp_path_factory):
    pytest.importorskip(package)
    tools = StockTools(package, tmp_path_factory.mktemp(package))
    yield tools
    tools.server.close()


def roots(root):
    return [
        f'{loader}_dataloader.dataset.data_root={root}'
        for loader in ('train', 'val', 'test')
    ]


def check_picture(path):
    """Check that a picture exists and is not of a single colour."""
    picture = cv2.imread(str(path))
    assert picture is not None and picture.std() > 5
    return picture


def check_published(tools, tool, checkpoint, folder):
    """Publish a checkpoint as documented, and compare the weights."""
    assert f'"{LAUNCHER}"' in DOCUMENT.read_text()
    arguments = [tool, checkpoint, folder / 'model.pth']
    code, output = tools.start(*arguments)
    if code:  # torch 2.6 or newer; nothing has imported mmvvt
        assert 'HistoryBuffer was not an allowed global' in output
    else:
        [path.unlink() for path in folder.iterdir()]
    tools.run(*arguments, code=LAUNCHER)
    # The tools of mmseg and mmdet do not wait until the file is renamed.
    for _ in range(50):
        found = list(folder.glob('model[-_]*.pth'))
        if found:
            break
        time.sleep(0.1)
    (path,) = found
    published, original = (torch.load(p) for p in (path, checkpoint))
    assert 'optimizer' in original and 'optimizer' not in published
    for key, tensor in original['state_dict'].items():
        assert torch.equal(published['state_dict'][key], tensor), key


def check_layer_decay(checkpoint, rate, lr):
    """Check the learning rates in a checkpoint of a run with layer decay.

    The backbone of the demos, VVT-nano, has five blocks.
    """
    groups = torch.load(checkpoint)['optimizer']['param_groups']
    found = {round(group['initial_lr'] / lr, 6) for group in groups}
    assert found == {round(rate**k, 6) for k in range(7)}
    # The schedule multiplies all of them by the same factor.
    (factor,) = {
        round(group['lr'] / group['initial_lr'], 6) for group in groups
    }
    return factor


# -- mmpretrain ---------------------------------------------------------------

SMALL_DIGITS = [
    'train_dataloader.batch_size=32',
    'train_dataloader.dataset.indices=64',
    'val_dataloader.dataset.indices=20',
    'test_dataloader.dataset.indices=20',
]


@pytest.fixture(scope='module')
def mmpretrain_tools(tmp_path_factory):
    yield from tools_of('mmpretrain', tmp_path_factory)


@pytest.fixture(scope='module')
def digits(digits_root):
    return ['--cfg-options', *roots(digits_root), *SMALL_DIGITS]


@pytest.fixture(scope='module')
def classifier(mmpretrain_tools, digits, tmp_path_factory):
    """Work directory after one epoch of train.py.

    The tool sets persistent_workers if a config does not.
    """
    work_dir = tmp_path_factory.mktemp('classifier')
    mmpretrain_tools.run(
        'train',
        DIGITS,
        '--work-dir',
        work_dir,
        '--auto-scale-lr',
        *digits,
        'train_cfg.max_epochs=1',
        'param_scheduler.1.eta_min_ratio=0.',
        'optim_wrapper.paramwise_cfg.layer_decay_rate=0.75',
    )
    return work_dir


def test_train_and_resume_with_layer_decay(
    classifier, mmpretrain_tools, digits, tmp_path
):
    state = torch.load(classifier / 'epoch_1.pth')['state_dict']
    assert all(t.isfinite().all() for t in state.values())
    # The batch size is half of that of the recipe, whose rate is 2e-3.
    warm_up = check_layer_decay(classifier / 'epoch_1.pth', 0.75, 1e-3)
    assert 0 < warm_up < 1
    output = mmpretrain_tools.run(
        'train',
        DIGITS,
        '--work-dir',
        tmp_path,
        '--auto-scale-lr',
        '--resume',
        classifier / 'epoch_1.pth',
        *digits,
        'train_cfg.max_epochs=2',
        'param_scheduler.1.eta_min_ratio=0.',
        'optim_wrapper.paramwise_cfg.layer_decay_rate=0.75',
    )
    assert 'resumed epoch: 1' in output
    after = check_layer_decay(tmp_path / 'epoch_2.pth', 0.75, 1e-3)
    assert warm_up < after <= 1


def test_constructor_of_mmpretrain(mmpretrain_tools, digits, tmp_path):
    mmpretrain_tools.run(
        'train',
        DIGITS,
        '--work-dir',
        tmp_path,
        *digits,
        'train_cfg.max_epochs=1',
        'param_scheduler.1.eta_min_ratio=0.',
        'optim_wrapper.constructor=LearningRateDecayOptimWrapperConstructor',
        'optim_wrapper.paramwise_cfg.layer_decay_rate=0.5',
    )
    check_layer_decay(tmp_path / 'epoch_1.pth', 0.5, 2e-3)


def test_test_and_confusion_matrix(
    classifier, mmpretrain_tools, digits, tmp_path
):
    predictions = tmp_path / 'predictions.pkl'
    output = mmpretrain_tools.run(
        'test',
        DIGITS,
        classifier / 'epoch_1.pth',
        '--work-dir',
        tmp_path / 'work',
        '--out',
        predictions,
        '--show-dir',
        tmp_path / 'show',
        *digits,
    )
    assert 'accuracy/top1' in output
    show = tmp_path / 'show'
    assert len(list(show.iterdir())) == 20
    check_picture(next(show.iterdir()))
    labels = [int(p['pred_label']) for p in mmengine.load(predictions)]
    assert len(labels) == 20

    mmpretrain_tools.run(
        'analysis_tools/confusion_matrix',
        DIGITS,
        predictions,
        '--out',
        tmp_path / 'matrix.pkl',
        '--show-path',
        tmp_path / 'matrix.png',
        *digits,
    )
    matrix = mmengine.load(tmp_path / 'matrix.pkl')
    assert matrix.sum(0).tolist() == [labels.count(i) for i in range(10)]
    check_picture(tmp_path / 'matrix.png')


@pytest.mark.parametrize(
    'options',
    [
        # The norm of the last stage is chosen.
        ['--vit-like'],
        [
            '--vit-like',
            '--method',
            'GradCAM++',
            '--target-category',
            3,
            '--target-layers',
            'backbone.norm3',
            'backbone.block2.0.norm2',
        ],
    ],
    ids=['default', 'two-norms'],
)
def test_vis_cam(options, classifier, mmpretrain_tools, digits_root, tmp_path):
    pytest.importorskip('pytorch_grad_cam')
    output = mmpretrain_tools.run(
        'visualization/vis_cam',
        sorted((digits_root / 'val').rglob('*.png'))[0],
        DIGITS,
        classifier / 'epoch_1.pth',
        *options,
        '--save-path',
        tmp_path / 'cam.png',
        '--cfg-options',
        'test_dataloader.dataset.pipeline.1.scale=(128,128)',
    )
    if options == ['--vit-like']:
        assert 'norm layer "backbone.norm4" as the target' in output
    assert 'exception' not in output.lower()
    assert check_picture(tmp_path / 'cam.png').shape == (128, 128, 3)


def test_no_extra_tokens():
    """vis_cam.py removes this number of tokens; its default is one."""
    assert VVT.num_extra_tokens == 0


CLASSIFICATION = sorted((CONFIGS / 'classification').glob('*.py'))


@pytest.mark.parametrize(
    'config',
    [DIGITS, CLASSIFICATION[0], CLASSIFICATION[-1]],
    ids=lambda p: p.stem,
)
def test_vis_scheduler(config, mmpretrain_tools, tmp_path):
    """The tool replaces the data loader by a list without a sampler."""
    picture = tmp_path / 'lr.png'
    mmpretrain_tools.run(
        'visualization/vis_scheduler',
        config,
        '--not-show',
        '--save-path',
        picture,
        '--dataset-size',
        1024,
        '--cfg-options',
        f'work_dir={tmp_path}',
    )
    check_picture(picture)


def test_browse_dataset(mmpretrain_tools, digits, tmp_path):
    mmpretrain_tools.run(
        'visualization/browse_dataset',
        DIGITS,
        '--output-dir',
        tmp_path,
        '--not-show',
        '--mode',
        'pipeline',
        '--show-number',
        2,
        *digits,
    )
    pictures = list(tmp_path.iterdir())
    assert len(pictures) == 2
    check_picture(pictures[0])


@pytest.mark.parametrize('package', ['mmpretrain', 'mmseg', 'mmdet'])
def test_print_config(package, request):
    config = dict(mmpretrain=DIGITS, mmseg=SCENES, mmdet=BOXES)[package]
    tools = request.getfixturevalue(f'{package}_tools')
    output = tools.run(
        'misc/print_config',
        config,
        '--cfg-options',
        'optim_wrapper.optimizer.lr=0.125',
    )
    assert "type='VVT'" in output and 'lr=0.125' in output


def test_publish_classifier(classifier, mmpretrain_tools, tmp_path):
    check_published(
        mmpretrain_tools,
        'model_converters/publish_model',
        classifier / 'epoch_1.pth',
        tmp_path,
    )


# -- mmseg --------------------------------------------------------------------

STEPS = [
    'model.backbone.init_cfg=None',
    'train_cfg.max_iters=2',
    'train_cfg.val_interval=2',
    'train_dataloader.batch_size=2',
    'default_hooks.checkpoint.interval=2',
    'default_hooks.logger.interval=1',
    'optim_wrapper.paramwise_cfg.layer_decay_rate=0.75',
    'param_scheduler.1.eta_min_ratio=0.',
]


@pytest.fixture(scope='module')
def mmseg_tools(tmp_path_factory):
    yield from tools_of('mmseg', tmp_path_factory)


@pytest.fixture(scope='module')
def scenes_root(tmp_path_factory):
    root = tmp_path_factory.mktemp('scenes') / 'digit-scenes'
    write_digit_scenes(str(root), 2, 2)
    return root


@pytest.fixture(scope='module')
def scenes(scenes_root):
    return ['--cfg-options', *roots(scenes_root), *STEPS]


@pytest.fixture(scope='module')
def segmentor(mmseg_tools, scenes, tmp_path_factory):
    """Work directory after two steps of train.py."""
    work_dir = tmp_path_factory.mktemp('segmentor')
    output = mmseg_tools.run('train', SCENES, '--work-dir', work_dir, *scenes)
    assert 'mIoU' in output
    check_layer_decay(work_dir / 'iter_2.pth', 0.75, 5e-3)
    return work_dir


def test_segmentation_test_and_confusion_matrix(
    segmentor, mmseg_tools, scenes, tmp_path
):
    output = mmseg_tools.run(
        'test',
        SCENES,
        segmentor / 'iter_2.pth',
        '--work-dir',
        tmp_path / 'work',
        '--out',
        tmp_path / 'out',
        '--show-dir',
        tmp_path / 'show',
        *scenes,
    )
    assert 'mIoU' in output
    show = tmp_path / 'show'
    pictures = list(show.rglob('*.png'))
    assert len(pictures) == 2
    check_picture(pictures[0])
    assert len(list((tmp_path / 'out').glob('*.png'))) == 2
    mmseg_tools.run(
        'analysis_tools/confusion_matrix',
        SCENES,
        tmp_path / 'out',
        tmp_path,
        *scenes,
    )
    check_picture(tmp_path / 'confusion_matrix.png')


def test_segmentation_flops(mmseg_tools):
    code, output = mmseg_tools.start(
        'analysis_tools/get_flops',
        SCENES,
        '--shape',
        96,
        '--cfg-options',
        'model.backbone.init_cfg=None',
    )
    if code:  # mmseg 1.2.2, with any model; tools/analysis_tools has our own
        assert output.splitlines()[-1] == (
            'ValueError: "input_shape" and "inputs" cannot be both set.'
        )
    else:
        assert 'Params: 1.119M' in output


def test_segmentation_browse_dataset(mmseg_tools, scenes_root, tmp_path):
    """The tool draws the images and the label maps of the ADE20K recipe."""
    root, out = tmp_path / 'ade', tmp_path / 'out'
    for kind, suffix in (('images', 'jpg'), ('annotations', 'png')):
        (root / kind / 'training').mkdir(parents=True)
        for path in (scenes_root / kind / 'training').iterdir():
            image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            target = root / kind / 'training' / f'{path.stem}.{suffix}'
            assert cv2.imwrite(str(target), image)
    code, output = mmseg_tools.start(
        'analysis_tools/browse_dataset',
        ADE,
        '--output-dir',
        out,
        '--not-show',
        '--cfg-options',
        'visualizer.name=browse',
        *roots(root),
    )
    if code:  # mmseg 1.2.2 with OpenCV 4.13, for any data set
        assert 'Layout of the output array img is incompatible' in output
    else:
        pictures = list(out.glob('*.jpg'))
        assert len(pictures) == 2
        assert check_picture(pictures[0]).shape == (512, 512, 3)


def test_segmentation_cam(segmentor, mmseg_tools, scenes_root, tmp_path):
    """The tool has no options for a config, and needs 4 dimensions."""
    pytest.importorskip('pytorch_grad_cam')
    output = mmseg_tools.run(
        'analysis_tools/visualization_cam',
        next((scenes_root / 'images' / 'validation').iterdir()),
        SCENES,
        segmentor / 'iter_2.pth',
        '--device',
        'cpu',
        '--target-layers',
        'neck.fpn_convs[0]',
        '--category-index',
        10,
        '--cam-file',
        tmp_path / 'cam.png',
        '--out-file',
        tmp_path / 'prediction.png',
    )
    assert 'An exception occurred in CAM' not in output
    check_picture(tmp_path / 'cam.png')
    check_picture(tmp_path / 'prediction.png')


def test_publish_segmentor(segmentor, mmseg_tools, tmp_path):
    check_published(
        mmseg_tools, 'misc/publish_model', segmentor / 'iter_2.pth', tmp_path
    )


# -- mmdet --------------------------------------------------------------------


@pytest.fixture(scope='module')
def mmdet_tools(tmp_path_factory):
    yield from tools_of('mmdet', tmp_path_factory)


@pytest.fixture(scope='module')
def boxes(scenes_root):
    return [
        '--cfg-options',
        *roots(scenes_root),
        *(
            f'{split}_evaluator.ann_file={scenes_root}/'
            'instances_validation.json'
            for split in ('val', 'test')
        ),
        *STEPS,
        'model.test_cfg.rcnn.score_thr=0.',
        'model.test_cfg.rcnn.max_per_img=5',
    ]


@pytest.fixture(scope='module')
def detector(mmdet_tools, boxes, tmp_path_factory):
    """Work directory after two steps of train.py."""
    work_dir = tmp_path_factory.mktemp('detector')
    output = mmdet_tools.run('train', BOXES, '--work-dir', work_dir, *boxes)
    assert 'coco/segm_mAP' in output
    check_layer_decay(work_dir / 'iter_2.pth', 0.75, 1e-3)
    return work_dir


def test_detection_test_and_confusion_matrix(
    detector, mmdet_tools, boxes, tmp_path
):
    output = mmdet_tools.run(
        'test',
        BOXES,
        detector / 'iter_2.pth',
        '--work-dir',
        tmp_path / 'work',
        '--out',
        tmp_path / 'out.pkl',
        '--show-dir',
        tmp_path / 'show',
        *boxes,
    )
    assert 'coco/bbox_mAP' in output
    assert len(mmengine.load(tmp_path / 'out.pkl')) == 2
    show = tmp_path / 'show'
    pictures = list(show.iterdir())
    assert len(pictures) == 2
    check_picture(pictures[0])
    mmdet_tools.run(
        'analysis_tools/confusion_matrix',
        BOXES,
        tmp_path / 'out.pkl',
        tmp_path,
        *boxes,
    )
    check_picture(tmp_path / 'confusion_matrix.png')


def test_detection_browse_dataset(mmdet_tools, boxes, tmp_path):
    mmdet_tools.run(
        'analysis_tools/browse_dataset',
        BOXES,
        '--output-dir',
        tmp_path,
        '--not-show',
        *boxes,
        'visualizer.name=browse',
    )
    pictures = list(tmp_path.iterdir())
    assert len(pictures) == 2
    assert check_picture(pictures[0]).shape == (128, 128, 3)


def test_publish_detector(detector, mmdet_tools, tmp_path):
    check_published(
        mmdet_tools,
        'model_converters/publish_model',
        detector / 'iter_2.pth',
        tmp_path,
    )
