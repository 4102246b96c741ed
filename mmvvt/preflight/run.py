"""All checks before a run, in one order."""

import warnings
from typing import List, Optional

from mmengine.config import Config

from ..errors import PreflightError, UserError
from .batch_norm import find_batch_norm_problem
from .channels import describe_depths, find_channel_problems
from .config import build_model
from .data import find_data_problems
from .labels import find_label_problems
from .layer_decay import find_layer_decay_problems
from .settings import find_setting_problems
from .sources import open_sources
from .weights import (
    check_checkpoint,
    check_frozen_weights,
    describe_initial_weights,
    find_adapter_problems,
    find_pretrained_problems,
    without_pretrained,
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


def check_training(cfg: Config) -> List[str]:
    """Check everything that training needs, before it starts.

    The order is: pretrained files, data files, labels, images, settings that
    must agree, the model, layer-wise learning rates, initial weights, batch
    normalisation. All problems are reported at once.

    Args:
        cfg (Config): The complete config.

    Returns:
        list[str]: What the user should know although it may be intended, such
        as weights that start from random values. One line each.

    Raises:
        UserError: If a problem is found. The message is one line.
        PreflightError: If several problems are found.
    """
    return _check(cfg, TRAIN_LOADERS, None)


def check_testing(cfg: Config, checkpoint: str) -> List[str]:
    """Check everything that testing needs, before it starts.

    Args:
        cfg (Config): The complete config.
        checkpoint (str): Path or URL of the checkpoint to test.

    Returns:
        list[str]: What the user should know, one line each.

    Raises:
        UserError: If a problem is found. The message is one line.
        PreflightError: If several problems are found.
    """
    return _check(cfg, TEST_LOADERS, checkpoint)


def _check(
    cfg: Config, loaders: List[str], checkpoint: Optional[str]
) -> List[str]:
    sources = open_sources(cfg, loaders)
    problems: List[UserError] = []
    notes: List[str] = []
    if checkpoint is None:
        problems += find_pretrained_problems(cfg)
    missing_weights = bool(problems)
    if not missing_weights:
        problems += find_adapter_problems(cfg)
        missing_weights = bool(problems)
    problems += find_data_problems(cfg, sources)
    problems += find_label_problems(cfg, sources)
    problems += find_setting_problems(cfg, sources)
    problems += find_channel_problems(cfg, sources)
    notes += describe_depths(sources)
    try:
        with warnings.catch_warnings():
            # The runner builds the model again, with its warnings.
            warnings.simplefilter('ignore')
            model = build_model(without_pretrained(cfg))
        if checkpoint is not None:
            check_checkpoint(checkpoint, model)
            if not missing_weights:
                check_frozen_weights(cfg)
        else:
            problems += find_layer_decay_problems(cfg, model)
            if not missing_weights:
                notes += describe_initial_weights(cfg, model)
        if checkpoint is None and not problems:
            problems += find_batch_norm_problem(cfg, model, sources)
    except UserError as error:
        problems.append(error)
    raise_problems(problems)
    return notes
