"""All checks before a run, in one order."""

import warnings
from typing import List, Optional

from mmengine.config import Config

from ..errors import PreflightError, UserError
from .batch_norm import find_batch_norm_problem
from .config import build_model
from .data import find_data_problems
from .labels import find_label_problems
from .layer_decay import find_layer_decay_problems
from .settings import find_setting_problems
from .sources import open_sources
from .weights import (
    check_checkpoint,
    check_pretrained_backbone,
    find_pretrained_problems,
)

TRAIN_LOADERS = ['train_dataloader', 'val_dataloader']
TEST_LOADERS = ['test_dataloader']


# Errors of PyTorch in the first steps that the settings cause, for causes that
# the checks do not see, such as layers of a custom model.
SETTING_ERRORS = {
    'Expected more than 1 value per channel when training': (
        'a batch normalisation got one value per channel in training: set '
        'train_dataloader.batch_size to 2 or more and '
        'train_dataloader.drop_last=True'
    ),
    'Expected to have finished reduction in the prior iteration': (
        'parameters of the model are not used in the loss, which distributed '
        'training does not allow: set find_unused_parameters=True, or freeze '
        'or remove these parameters'
    ),
}


def explain_error(error: Exception) -> Optional[UserError]:
    """Translate an error of PyTorch that the settings of a run cause.

    Args:
        error (Exception): Error raised by a training step.

    Returns:
        UserError | None: One line that names the setting; None for other
        errors.
    """
    for text, message in SETTING_ERRORS.items():
        if text in str(error):
            return UserError(message)
    return None


def raise_problems(problems: List[UserError]) -> None:
    """Raise the problems that were found, if any.

    Args:
        problems (list[UserError]): Problems, one line each.

    Raises:
        UserError: The problem, if there is one.
        PreflightError: If there are several; its message has a line for each.
    """
    if len(problems) > 1:
        raise PreflightError('\n'.join(map(str, problems)))
    if problems:
        raise problems[0]


def check_training(cfg: Config) -> None:
    """Check everything that training needs, before it starts.

    The order is: pretrained files, data files, labels, settings that must
    agree, the model, layer-wise learning rates, pretrained weights, batch
    normalisation. All problems are reported at once.

    Args:
        cfg (Config): The complete config.

    Raises:
        UserError: If a problem is found. The message is one line.
        PreflightError: If several problems are found.
    """
    _check(cfg, TRAIN_LOADERS, None)


def check_testing(cfg: Config, checkpoint: str) -> None:
    """Check everything that testing needs, before it starts.

    Args:
        cfg (Config): The complete config.
        checkpoint (str): Path or URL of the checkpoint to test.

    Raises:
        UserError: If a problem is found. The message is one line.
        PreflightError: If several problems are found.
    """
    _check(cfg, TEST_LOADERS, checkpoint)


def _check(cfg: Config, loaders: List[str], checkpoint: Optional[str]) -> None:
    sources = open_sources(cfg, loaders)
    problems: List[UserError] = []
    if checkpoint is None:
        problems += find_pretrained_problems(cfg)
    missing_weights = bool(problems)
    problems += find_data_problems(cfg, sources)
    problems += find_label_problems(cfg, sources)
    problems += find_setting_problems(cfg, sources)
    try:
        with warnings.catch_warnings():
            # The runner builds the model again, with its warnings.
            warnings.simplefilter('ignore')
            model = build_model(cfg)
        if checkpoint is not None:
            check_checkpoint(checkpoint, model)
        else:
            problems += find_layer_decay_problems(cfg, model)
            if not missing_weights:
                check_pretrained_backbone(cfg, model)
        if checkpoint is None and not problems:
            problems += find_batch_norm_problem(cfg, model, sources)
    except UserError as error:
        problems.append(error)
    raise_problems(problems)
