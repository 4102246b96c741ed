"""Checks of settings that contradict each other."""

import copy
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

from mmengine.config import Config
from mmengine.registry import HOOKS

from ..errors import UserError
from .config import num_processes, pipeline_steps, type_name
from .data import evaluators_of
from .sources import Source, first_line

# Parts of a model with one output per class of the dataset. RPN heads, for
# example, also have a ``num_classes``, which is independent of the dataset.
HEADS = (
    'auxiliary_head',
    'bbox_head',
    'decode_head',
    'head',
    'mask_head',
    'mask_iou_head',
)


def find_setting_problems(
    cfg: Config, sources: List[Source]
) -> Iterator[UserError]:
    """Check settings that belong together, without reading files.

    Args:
        cfg (Config): The complete config.
        sources (list[Source]): Datasets of the run.

    Yields:
        UserError: If heads, dataset, preprocessor and metrics have different
        numbers of classes, a metric needs more classes, a metric that is
        monitored is not computed, a scaled learning rate is below the end of
        its schedule, an epoch has no batch, or stages are not used in
        distributed training.
    """
    yield from _find_class_problems(cfg, sources)
    yield from _find_metric_problems(cfg, sources)
    if any(source.loader == 'train_dataloader' for source in sources):
        yield from _find_monitor_problems(cfg)
        yield from _find_rising_schedules(cfg)
        yield from _find_empty_epochs(cfg, sources)
        yield from _find_unused_stages(cfg)


# -- numbers of classes -------------------------------------------------------


def _heads(node: Any, where: str, name: str = '') -> Iterator[tuple]:
    """Find each head with a number of classes: its path and the number."""
    if isinstance(node, dict):
        number = node.get('num_classes')
        if name in HEADS and isinstance(number, int):
            yield f'{where}.num_classes', number
        for key, child in node.items():
            yield from _heads(child, f'{where}.{key}', str(key))
    elif isinstance(node, (list, tuple)):
        for index, child in enumerate(node):
            yield from _heads(child, f'{where}[{index}]', name)


def _numbers(cfg: Config, sources: List[Source]) -> Iterator[Tuple[str, int]]:
    """All settings of the config that must equal the number of classes."""
    yield from _heads(cfg.get('model') or {}, 'model')
    for where, preprocessor in (
        ('data_preprocessor', cfg.get('data_preprocessor')),
        (
            'model.data_preprocessor',
            (cfg.get('model') or {}).get('data_preprocessor'),
        ),
    ):
        if isinstance(preprocessor, dict):
            number = preprocessor.get('num_classes')
            if isinstance(number, int):
                yield f'{where}.num_classes', number
    for source in sources:
        for step in pipeline_steps(source.config):
            if type_name(step) == 'CheckLabels' and 'num_classes' in step:
                yield (
                    f'CheckLabels.num_classes of {source.loader}',
                    step['num_classes'],
                )
    for loader in dict.fromkeys(source.loader for source in sources):
        for metric in evaluators_of(cfg, loader):
            if isinstance(metric.get('num_classes'), int):
                yield (
                    f'{loader.replace("dataloader", "evaluator")} '
                    f'({type_name(metric)}).num_classes',
                    metric['num_classes'],
                )


def _classes_of(source: Source) -> Optional[Tuple[str, ...]]:
    """The classes of a dataset, None if it does not know them."""
    dataset = source.dataset
    if dataset is None:
        return None
    if source.intact and source.inherits('mmpretrain', 'CustomDataset'):
        if not dataset.metainfo.get('classes'):
            try:
                source.samples()  # Its classes are the names of folders.
            except Exception:
                return None  # find_label_problems reports the reason.
    meta = getattr(dataset, 'metainfo', None) or {}
    classes = meta.get('classes') or meta.get('CLASSES')
    if not isinstance(classes, (list, tuple)):
        return None
    return tuple(map(str, classes))


def _find_class_problems(
    cfg: Config, sources: List[Source]
) -> Iterator[UserError]:
    counts: Dict[int, str] = {}
    names: Dict[Tuple[str, ...], str] = {}
    for source in sources:
        classes = _classes_of(source)
        if classes is not None:
            counts.setdefault(len(classes), source.where)
            names.setdefault(classes, source.where)
    if len(counts) > 1:
        found = ', '.join(f'{where} has {n}' for n, where in counts.items())
        yield UserError(f'the datasets have different classes: {found}')
        return
    if len(names) > 1:
        (first, where), (second, other) = list(names.items())[:2]
        index = next(i for i, name in enumerate(first) if name != second[i])
        yield UserError(
            f'the datasets have different classes: class {index} is '
            f'{first[index]!r} in {where} and {second[index]!r} in {other}'
        )
        return
    settings = list(_numbers(cfg, sources))
    if not counts and not settings:
        return
    if counts:
        ((number, where),) = counts.items()
    else:
        where, number = settings[0]
    # A classifier can be tested on images of some of its classes.
    testing = all(source.loader == 'test_dataloader' for source in sources)
    subset = testing and sources and sources[0].inherits('mmpretrain')
    for name, value in dict(settings).items():
        if value < number or value > number and not subset:
            yield UserError(
                f'{name} is {value}, but {where} has {number} classes; they '
                'must be equal'
            )


# -- metrics ------------------------------------------------------------------


def _topk(config: Any) -> int:
    topk = config.get('topk', 1) if isinstance(config, dict) else 1
    return max(topk) if isinstance(topk, (list, tuple)) else topk


def _find_metric_problems(
    cfg: Config, sources: List[Source]
) -> Iterator[UserError]:
    head = (cfg.get('model') or {}).get('head')
    head = head if isinstance(head, dict) else {}
    number = head.get('num_classes')
    if not isinstance(number, int):
        return
    places = [('model.head', head if head.get('cal_acc') else {})]
    for loader in dict.fromkeys(source.loader for source in sources):
        for metric in evaluators_of(cfg, loader):
            if type_name(metric) == 'Accuracy':
                name = loader.replace('dataloader', 'evaluator')
                places.append((f'{name} (Accuracy)', metric))
    for where, config in places:
        if _topk(config) > number:
            setting = where.split(' ')[0]
            yield UserError(
                f'{where} has topk={config["topk"]}, but '
                f'model.head.num_classes is {number}: topk must not exceed '
                f'it; set {setting}.topk=1'
            )


def metric_names(metric: dict) -> Optional[Set[str]]:
    """Return the names of the values that a metric computes.

    Args:
        metric (dict): Config of a metric.

    Returns:
        set[str] | None: Names with prefix, such as 'accuracy/top1'. None for
        a metric whose names are not known here.
    """
    kind = type_name(metric)
    prefix = metric.get('prefix')
    if kind == 'Accuracy' and not isinstance(
        metric.get('thrs'), (list, tuple)
    ):
        topk = metric.get('topk', 1)
        topk = topk if isinstance(topk, (list, tuple)) else [topk]
        names, default = {f'top{k}' for k in topk}, 'accuracy'
    elif kind == 'IoUMetric' and not metric.get('format_only'):
        kinds = metric.get('iou_metrics', ['mIoU'])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        names, default = {'aAcc'}, None
        if 'mIoU' in kinds:
            names |= {'mIoU', 'mAcc'}
        if 'mDice' in kinds:
            names |= {'mDice', 'mAcc'}
        if 'mFscore' in kinds:
            names |= {'mFscore', 'mPrecision', 'mRecall'}
    elif kind == 'CocoMetric' and not metric.get('format_only'):
        kinds = metric.get('metric', 'bbox')
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        if (
            not {'bbox', 'segm'}.issuperset(kinds)
            or metric.get('classwise')
            or metric.get('metric_items')
        ):
            return None
        suffixes = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
        names = {f'{k}_{suffix}' for k in kinds for suffix in suffixes}
        default = 'coco'
    elif kind in ('DumpResults', 'DumpPredictions', 'DumpDetResults'):
        return set()
    else:
        return None
    prefix = default if prefix is None else prefix
    return {f'{prefix}/{name}' if prefix else name for name in names}


def _hooks(cfg: Config) -> Iterator[Tuple[str, dict]]:
    for name, hook in (cfg.get('default_hooks') or {}).items():
        if isinstance(hook, dict):
            yield f'default_hooks.{name}', hook
    for index, hook in enumerate(cfg.get('custom_hooks') or []):
        if isinstance(hook, dict):
            yield f'custom_hooks[{index}]', hook


def _find_monitor_problems(cfg: Config) -> Iterator[UserError]:
    """Check the metrics that choose the best checkpoint or end the run."""
    metrics = evaluators_of(cfg, 'val_dataloader')
    known = [metric_names(metric) for metric in metrics]
    names: Set[str] = set().union(*(n for n in known if n is not None))
    complete = bool(metrics) and None not in known
    for where, hook in _hooks(cfg):
        if type_name(hook).endswith('CheckpointHook'):
            wanted = hook.get('save_best') or []
            setting = f'{where}.save_best'
            try:  # For example, mmengine cannot infer the rule of a name.
                HOOKS.build(copy.deepcopy(hook))
            except (AssertionError, KeyError, TypeError, ValueError) as error:
                yield UserError(f'{where}: {first_line(error)}')
                continue
        elif type_name(hook) == 'EarlyStoppingHook':
            wanted, setting = hook.get('monitor') or [], f'{where}.monitor'
        else:
            continue
        wanted = [wanted] if isinstance(wanted, str) else wanted
        for name in wanted:
            if complete and name != 'auto' and name not in names:
                yield UserError(
                    f'{setting} is {name!r}, but val_evaluator computes '
                    f'{", ".join(sorted(names)) or "no metric"}'
                )


# -- learning rate ------------------------------------------------------------


def _find_rising_schedules(cfg: Config) -> Iterator[UserError]:
    """Check that a scaled learning rate is not below the end of its schedule.

    mmengine scales the learning rate by the batch size, but not an
    ``eta_min``. A small batch would therefore be trained with a learning rate
    that rises.
    """
    scaling = cfg.get('auto_scale_lr') or {}
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer') or {}
    rate = optimizer.get('lr') if isinstance(optimizer, dict) else None
    batch = cfg.train_dataloader.get('batch_size')
    base = scaling.get('base_batch_size')
    if (
        not scaling.get('enable')
        or not isinstance(rate, (int, float))
        or not isinstance(batch, int)
        or not isinstance(base, (int, float))
        or base <= 0
    ):
        return
    batch *= num_processes(cfg)
    scaled = rate * batch / base
    schedulers = cfg.get('param_scheduler') or []
    if isinstance(schedulers, dict):
        schedulers = [schedulers]
    for index, scheduler in enumerate(schedulers):
        if not type_name(scheduler).endswith('LR'):
            continue
        end = scheduler.get('eta_min')
        # An end above the learning rate of the config is intended.
        if isinstance(end, (int, float)) and scaled < end <= rate:
            option = (
                f'eta_min_ratio={end / rate:g} in place of eta_min'
                if type_name(scheduler).startswith('Cosine')
                else 'a lower eta_min'
            )
            yield UserError(
                f'param_scheduler[{index}].eta_min is {end:g}, but the '
                f'learning rate scaled to the batch size {batch} is '
                f'{scaled:g}, so that it would rise: set {option}'
            )


# -- batches ------------------------------------------------------------------


def _find_empty_epochs(
    cfg: Config, sources: List[Source]
) -> Iterator[UserError]:
    """Check that ``drop_last`` leaves a batch."""
    loader = cfg.train_dataloader
    size = loader.get('batch_size')
    parts = [s for s in sources if s.loader == 'train_dataloader']
    if (
        not loader.get('drop_last')
        or loader.get('batch_sampler')
        or type_name(loader.get('sampler'))
        not in ('', 'DefaultSampler', 'RepeatAugSampler')
        or len(parts) != 1
        or parts[0].wrapped
        or not parts[0].intact
        or not isinstance(size, int)
    ):
        return
    try:
        total = len(parts[0].dataset)
    except Exception:
        return  # Reported by the other checks, or by the run.
    # Both samplers give all processes the same number of samples.
    total = -(-total // num_processes(cfg))
    if total < size:
        yield UserError(
            f'train_dataloader.drop_last=True leaves no batch: a process has '
            f'{total} images and train_dataloader.batch_size is {size}; set '
            'drop_last=False or a smaller batch_size'
        )


# -- distributed training -----------------------------------------------------


def _picked_outputs(model: dict) -> Iterator[int]:
    """Outputs of the backbone that the heads of a segmentor use."""
    for name in ('decode_head', 'auxiliary_head'):
        heads = model.get(name) or []
        for head in heads if isinstance(heads, (list, tuple)) else [heads]:
            index = head.get('in_index', -1)
            yield from index if isinstance(index, (list, tuple)) else [index]


def _find_unused_stages(cfg: Config) -> Iterator[UserError]:
    """Check that all trained stages of a VVT are used.

    Distributed training fails in the second step if parameters have no
    gradient.
    """
    wrapper = cfg.get('model_wrapper_cfg') or {}
    if (
        cfg.get('launcher', 'none') == 'none'
        or cfg.get('find_unused_parameters')
        or wrapper.get('find_unused_parameters')
        or type_name(wrapper) not in ('', 'MMDistributedDataParallel')
    ):
        return
    model = cfg.get('model') or {}
    backbone = model.get('backbone') or {}
    if type_name(backbone) != 'VVT':
        return
    indices = backbone.get('out_indices', (3,))
    indices = [indices] if isinstance(indices, int) else list(indices)
    try:
        used = max(index % 4 for index in indices)
    except (TypeError, ValueError):
        return  # VVT reports wrong indices.
    setting = f'model.backbone.out_indices is {tuple(indices)}'
    if not model.get('neck') and 'decode_head' in model:
        picked = list(_picked_outputs(model))
        count = len(indices)
        if picked and all(-count <= i < count for i in picked):
            ordered = sorted(index % 4 for index in indices)
            highest = ordered[max(i % count for i in picked)]
            if highest < used:
                used = highest
                setting = f'the heads of the model use the outputs {picked}'
    if used < 3 and backbone.get('frozen_stages', -1) < 3:
        yield UserError(
            f'{setting}, so that the stages after stage {used} of the '
            'backbone are not used, which distributed training does not '
            'allow: set find_unused_parameters=True'
        )
