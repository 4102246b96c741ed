"""Invalid COCO files are reported in one line before mmdet reads them."""

import json
import re

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmvvt.errors import AnnotationError, UserError
from mmvvt.preflight import dataset_class
from mmvvt.preflight.coco import reads_coco

from conftest import check_files

pytest.importorskip('mmdet')

CLASSES = ('cat', 'dog')
FILE = r'\S+/annotations/train\.json'


def coco(names=CLASSES, images=('a.jpg', 'sub/b.jpg')):
    """Return the content of a COCO file; the second image is empty."""
    return dict(
        images=[
            dict(id=i, file_name=name, height=40, width=60)
            for i, name in enumerate(images)
        ],
        annotations=[
            dict(
                id=7,
                image_id=0,
                category_id=1,
                bbox=[1, 2, 30, 20],
                area=600,
                iscrowd=0,
            )
        ],
        categories=[dict(id=i + 1, name=n) for i, n in enumerate(names)],
    )


@pytest.fixture
def root(tmp_path):
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'train' / 'sub').mkdir(parents=True)
    (tmp_path / 'train' / 'a.jpg').touch()
    (tmp_path / 'train' / 'sub' / 'b.jpg').touch()
    return tmp_path


def config(root, evaluator=None, **dataset):
    dataset = dict(
        dict(
            type='CocoDataset',
            data_root=str(root),
            ann_file='annotations/train.json',
            data_prefix=dict(img='train'),
            metainfo=dict(classes=CLASSES),
        ),
        **dataset,
    )
    return Config(
        dict(test_dataloader=dict(dataset=dataset), test_evaluator=evaluator)
    )


def check(cfg):
    with DefaultScope.overwrite_default_scope('mmdet'):
        check_files(cfg, ['test_dataloader'])


def fault(root, content, **dataset):
    """Return the message for a file with the given content."""
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    (root / 'annotations' / 'train.json').write_bytes(content)
    with pytest.raises(AnnotationError) as caught:
        check(config(root, **dataset))
    line = str(caught.value)
    start = 'test_dataloader (CocoDataset): '
    assert line.startswith(start) and '\n' not in line
    return line[len(start) :]


def test_good_files_pass(root):
    path = root / 'annotations' / 'train.json'
    # additional categories, unsorted ids, and images that are not listed
    content = coco(['bird', 'cat', 'cow', 'dog'], ['a.jpg'])
    content['categories'][1]['id'] = 90
    path.write_text(json.dumps(content))
    check(config(root))
    check(
        config(
            root, ann_file=str(path), data_prefix=dict(img=str(root / 'train'))
        )
    )
    (root / 'classes.txt').write_text('cat\ndog\n')
    check(config(root, metainfo=dict(classes=str(root / 'classes.txt'))))


def test_file_is_absent(root):
    with pytest.raises(
        UserError,
        match=r'^test_dataloader '
        rf'\(CocoDataset\): the annotation file does not '
        rf'exist: {FILE}$',
    ):
        check(config(root))


def test_metric_has_a_file_of_its_own(root):
    path = root / 'annotations' / 'train.json'
    path.write_text(json.dumps(coco()))
    evaluator = dict(type='CocoMetric', ann_file=str(path))
    check(config(root, evaluator))
    evaluator['ann_file'] = 'val.json'
    with pytest.raises(
        UserError,
        match=r'^test_evaluator '
        r'\(CocoMetric\): the annotation file does not '
        'exist: val.json$',
    ):
        check(config(root, evaluator))


@pytest.mark.parametrize(
    'content', [b'', b'images: []', b'\xff\xd8\xff\xe0', b'{"images": [']
)
def test_not_json(root, content):
    assert re.fullmatch(rf'{FILE} is not JSON: .+', fault(root, content))


@pytest.mark.parametrize('part', ['images', 'annotations', 'categories'])
def test_not_coco(root, part):
    message = rf"{FILE} is not in COCO format: it has no list '{part}'"
    content = coco()
    del content[part]
    assert re.fullmatch(message, fault(root, content))
    assert re.fullmatch(message, fault(root, dict(coco(), **{part: {}})))


def test_a_list_is_not_coco(root):
    assert re.fullmatch(
        rf'{FILE} is not in COCO format: it has no list '
        r"'images'",
        fault(root, [1, 2]),
    )


@pytest.mark.parametrize(
    'part,key',
    [
        ('images', 'height'),
        ('images', 'file_name'),
        ('annotations', 'bbox'),
        ('annotations', 'image_id'),
        ('categories', 'name'),
    ],
)
def test_entry_lacks_a_key(root, part, key):
    content = coco()
    del content[part][-1][key]
    index = len(content[part]) - 1
    assert re.fullmatch(
        rf"{FILE} is not in COCO format: {part}\[{index}\] has no '{key}'",
        fault(root, content),
    )


def test_images_to_predict_on_need_no_annotations(root):
    content = coco()
    del content['annotations']
    fault(root, content)
    check(config(root, dict(type='CocoMetric', format_only=True)))


def test_categories_are_none_of_the_classes(root):
    assert re.fullmatch(
        rf"{FILE} is missing the categories 'cat', 'dog' of 2 classes; it has "
        r"'Cat', 'Dog'; name the classes with "
        r'dataset\.metainfo=dict\(classes=\(\.\.\.\)\)',
        fault(root, coco(['Cat', 'Dog'])),
    )
    # The classes of the dataset class are used if the config has none.
    assert (
        "is missing the categories 'person', 'bicycle', 'car' and 75 more of "
        "80 classes; it has 'cat', 'dog'; "
        in fault(root, coco(), metainfo=None)
    )


def test_one_class_is_no_category(root):
    assert (
        "is missing the categories 'dog' of 2 classes; it has 'cat';"
        in fault(root, coco(['cat']))
    )
    assert (
        "is missing the categories 'cat', 'dog' of 2 classes; it has none;"
        in fault(root, coco([]))
    )


def test_categories_in_another_order(root):
    """Categories in a different order than the classes are reported."""
    assert (
        'does not list the categories in the order of the classes, or lists '
        "one more than once: 'dog' has index 0 among the categories"
        in fault(root, coco(['dog', 'bird', 'cat']))
    )
    assert "'dog' has index 2 among the categories" in fault(
        root, coco(['cat', 'dog', 'dog'])
    )


def test_images_are_absent(root):
    names = [
        'a.jpg',
        'b.jpg',
        'sub/b.jpg',
        'sub/c.jpg',
        'other/d.jpg',
        'other/e.jpg',
    ]
    line = fault(root, coco(images=names))
    missing = [
        str(root / 'train' / name)
        for name in ('b.jpg', 'sub/c.jpg', 'other/d.jpg')
    ]
    assert re.fullmatch(
        rf'{FILE} lists 6 images, of which 4 do not exist: '
        rf"'{missing[0]}', '{missing[1]}', '{missing[2]}' and 1 more",
        line,
    )


def test_only_coco_data_sets_are_read(root):
    with DefaultScope.overwrite_default_scope('mmdet'):
        kinds = {
            name: reads_coco(dataset_class(dict(type=name)))
            for name in (
                'CocoDataset',
                'CityscapesDataset',
                'LVISV1Dataset',
                'CocoPanopticDataset',
                'VOCDataset',
                'NoSuchDataset',
            )
        }
    assert kinds == dict(
        CocoDataset=True,
        CityscapesDataset=True,
        LVISV1Dataset=False,
        CocoPanopticDataset=False,
        VOCDataset=False,
        NoSuchDataset=False,
    )


@pytest.mark.parametrize('mask', [None, [], 'polygon'])
def test_masks_that_the_pipeline_loads(root, mask):
    content = coco()
    if mask is not None:
        content['annotations'][0]['segmentation'] = mask
    (root / 'annotations' / 'train.json').write_text(json.dumps(content))
    check(config(root))
    load = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
    line = fault(root, content, pipeline=[load])
    found = 'has an invalid mask' if mask == 'polygon' else 'lacks masks'
    assert re.match(rf'{FILE} {found}', line) and 'annotations[0]' in line
    with pytest.raises(AnnotationError, match=found):
        check(config(root, dict(type='CocoMetric', metric=['bbox', 'segm'])))
    content['annotations'][0]['segmentation'] = [[1, 2, 31, 2, 31, 22]]
    (root / 'annotations' / 'train.json').write_text(json.dumps(content))
    check(config(root, dict(type='CocoMetric', metric='segm')))


@pytest.mark.parametrize(
    'part,key,value,kind',
    [
        ('images', 'file_name', 3, 'a string'),
        ('images', 'height', float('nan'), 'a number'),
        ('annotations', 'bbox', [1, 2, 3], 'a list of four numbers'),
        ('annotations', 'bbox', [1, 2, 3, None], 'a list of four numbers'),
        ('annotations', 'image_id', [1], 'a number or a string'),
        ('categories', 'name', None, 'a string'),
    ],
)
def test_values_of_a_wrong_type(root, part, key, value, kind):
    content = coco()
    content[part][0][key] = value
    assert f'{part}[0].{key} must be {kind}, got ' in fault(root, content)


def test_ids_of_annotations_are_repeated(root):
    content = coco()
    content['annotations'].append(dict(content['annotations'][0], area=5))
    assert re.fullmatch(
        FILE + r' uses an id more than once: annotations\[1\] has the id 7 of '
        'an earlier annotation',
        fault(root, content),
    )


@pytest.mark.parametrize('number', ['NaN', 'Infinity', '1e999', '"1"'])
def test_numbers_are_finite(root, number):
    content = json.dumps(coco()).replace('600', number)
    assert re.fullmatch(
        FILE + r' is not in COCO format: annotations\[0\].area must be a '
        r'number, got \S+',
        fault(root, content.encode()),
    )


def test_no_image_is_left(root):
    content = dict(coco(images=()), annotations=[])
    assert fault(root, content).endswith('train.json lists no images')
    filtered = dict(test_mode=False, filter_cfg=dict(filter_empty_gt=True))
    content = coco()
    content['annotations'] = []
    assert fault(root, content, **filtered).endswith(
        "train.json has no images that filter_cfg={'filter_empty_gt': True} "
        'keeps'
    )
    filtered['filter_cfg'] = dict(min_size=41)
    assert fault(root, coco(), **filtered).endswith(
        "has no images that filter_cfg={'min_size': 41} keeps"
    )


def test_masks_that_crash_pycocotools(root):
    content = coco()
    content['annotations'][0]['segmentation'] = [[1, 2, 9, 2, 9, 1e300]]
    pipeline = [dict(type='LoadAnnotations', with_mask=True)]
    assert re.fullmatch(
        FILE + r' has an invalid mask in annotations\[0\].segmentation: '
        r'polygons must be lists of coordinates \[x, y, ...\]',
        fault(root, content, pipeline=pipeline),
    )
