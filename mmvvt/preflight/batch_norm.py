"""Check that batch normalisation gets more than one value per channel."""

import copy
from typing import Any, Iterator, List, Optional, Tuple

import torch
from mmengine.config import Config
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError
from .config import num_processes, type_name
from .sources import Source


class _SingleValue(Exception):
    """Stops the forward pass at a layer that gets one value per channel."""


def _small_batch(
    cfg: Config, sources: List[Source]
) -> Optional[Tuple[str, str]]:
    """Return why a batch of one image occurs and a remedy, or None."""
    loader = cfg.train_dataloader
    size = loader.get('batch_size')
    if size == 1:
        return (
            'train_dataloader.batch_size is 1',
            'set train_dataloader.batch_size to 2 or more',
        )
    sampler = type_name(loader.get('sampler'))
    parts = [s for s in sources if s.loader == 'train_dataloader']
    if (
        loader.get('drop_last')
        or loader.get('batch_sampler')
        or sampler not in ('', 'DefaultSampler')
        or len(parts) != 1
        or parts[0].wrapped
        or not parts[0].intact
        or not isinstance(size, int)
    ):
        return None
    try:
        total = len(parts[0].dataset)
    except Exception:
        return None
    # DefaultSampler gives all processes the same number of samples.
    total = -(-total // num_processes(cfg))
    if total % size != 1:
        return None
    return (
        f'the last batch of an epoch has one image ({total} images in batches '
        f'of {size})',
        'set train_dataloader.drop_last=True',
    )


def find_batch_norm_problem(
    cfg: Config, model: nn.Module, sources: List[Source]
) -> Iterator[UserError]:
    """Check whether a training batch of one image can be normalised.

    In training, batch normalisation needs more than one value per channel.
    After global pooling, as in the pyramid pooling of UPerHead, one image is
    one value. If a batch of one image occurs, one image is loaded and passed
    through the model.

    Args:
        cfg (Config): The complete config.
        model (nn.Module): Model built from the config; it is modified.
        sources (list[Source]): Datasets of the run.

    Yields:
        UserError: If a layer gets one value per channel.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }
    small = _small_batch(cfg, sources) if layers else None
    if small is None:
        return
    reason, remedy = small
    processes = num_processes(cfg)
    synchronised = {
        name
        for name, module in layers.items()
        if isinstance(module, nn.SyncBatchNorm)
        or 'SyncBatchNorm' in type(module).__name__
    }
    model = revert_sync_batchnorm(model).train()
    for name, module in model.named_modules():
        if name not in layers:
            continue
        if name in synchronised and processes > 1:
            continue
        module.register_forward_pre_hook(_stop_at_single_value(name))
    found = _run_one_image(cfg, model)
    if found is None:
        return
    more = (
        ', or use more than one GPU'
        if found in synchronised and processes == 1
        else ''
    )
    yield UserError(
        f'{reason}, so that the batch normalisation {found} gets one value '
        f'per channel and cannot be trained: {remedy}{more}'
    )


def _stop_at_single_value(name: str):
    def hook(module: nn.Module, inputs: tuple) -> None:
        x = inputs[0]  # (B, C) or (B, C, ...)
        if module.training and x.numel() == x.shape[1]:
            raise _SingleValue(name)

    return hook


def _run_one_image(cfg: Config, model: Any) -> Optional[str]:
    """Compute the loss of one image; return the layer that stops it."""
    loader = copy.deepcopy(cfg.train_dataloader)
    loader.update(batch_size=1, num_workers=0, persistent_workers=False)
    for key in ('batch_sampler', 'drop_last', 'prefetch_factor'):
        loader.pop(key, None)
    try:
        batch = next(iter(Runner.build_dataloader(loader)))
        with torch.no_grad():
            data = model.data_preprocessor(batch, True)
            model(**data, mode='loss')
    except _SingleValue as error:
        return str(error)
    except Exception:
        # The run itself reports other errors, with their traceback.
        return None
    return None
