"""The datasets of a run, opened without loading their images."""

from dataclasses import dataclass
from typing import Any, Iterator, List, Optional

from mmengine.config import Config
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.registry import DATASETS

from ..errors import UserError
from .config import dataset_class, innermost_datasets, type_name


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, or the name of its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@dataclass
class Source:
    """A dataset of a data loader.

    Attributes:
        loader (str): Name of the data loader, such as 'train_dataloader'.
        config (dict): Config of the dataset, inside of all wrappers.
        wrapped (bool): Whether the dataset is inside of a wrapper.
        dataset (BaseDataset, optional): The dataset. It has joined its paths
            but not read any file. None if it cannot be built in this way.
        fault (str, optional): Why the dataset cannot be built.
        intact (bool): Whether no problem has been found in its files yet.
        fetches_itself (bool): Whether it creates or downloads its files.
    """

    loader: str
    config: dict
    wrapped: bool
    dataset: Any = None
    fault: Optional[str] = None
    intact: bool = True
    fetches_itself: bool = False

    @property
    def where(self) -> str:
        """Name of the loader and the dataset for messages."""
        return f'{self.loader} ({type_name(self.config)})'

    def inherits(self, package: str, name: Optional[str] = None) -> bool:
        """Whether the dataset has a base class of a package.

        Args:
            package (str): 'mmpretrain', 'mmseg' or 'mmdet'.
            name (str, optional): Name of the class. Defaults to None, any
                class of the package.
        """
        return any(
            base.__module__.startswith(package)
            and name in (None, base.__name__)
            for base in getattr(dataset_class(self.config), '__mro__', ())
        )

    def problem(self, message: str, kind: type = UserError) -> UserError:
        """Return an error about this dataset."""
        self.intact = False
        return kind(f'{self.where}: {message}')

    def samples(self) -> List[dict]:
        """Read the list of samples, as at the start of a run.

        Raises:
            Exception: What the dataset raises if its files are invalid.
        """
        if not hasattr(self.dataset, 'data_list'):
            return []
        # Samples can be read directly if they are not serialized.
        self.dataset.serialize_data = False
        self.dataset.full_init()
        return self.dataset.data_list


def open_sources(cfg: Config, loaders: List[str]) -> List[Source]:
    """Open the datasets of data loaders.

    The paths of a dataset are joined by the dataset itself, so that checks
    look where the run will read.

    Args:
        cfg (Config): The complete config.
        loaders (list[str]): Names of the data loaders that will be used.

    Returns:
        list[Source]: The datasets inside of all wrappers.
    """
    sources = []
    for loader in loaders:
        if not cfg.get(loader):
            continue
        outer = cfg[loader]['dataset']
        for config in innermost_datasets(outer):
            source = Source(loader, config, wrapped=config is not outer)
            try:
                source.dataset = DATASETS.build(
                    dict(config, pipeline=[], lazy_init=True)
                )
            except (TypeError, ImportError):
                pass  # Not a BaseDataset, or a package that is missing.
            except Exception as error:
                if dataset_class(config) is not None:
                    source.fault = first_line(error)
            sources.append(source)
    return sources


def find_backend(path: str, dataset: Any = None) -> Any:
    """Return the file backend with which mmengine reads a path.

    Args:
        path (str): Path or URL.
        dataset (BaseDataset, optional): Dataset whose ``backend_args`` apply.
            Defaults to None.

    Returns:
        BaseStorageBackend | None: None if the backend cannot be created here;
        its files are then not checked.
    """
    args = getattr(dataset, 'backend_args', None)
    try:
        return get_file_backend(path, backend_args=args)
    except Exception:
        return None


def is_local(backend: Any) -> bool:
    """Whether a backend reads exactly the local path that it is given."""
    return type(backend) is LocalBackend


def exists(backend: Any, path: str, folder: bool) -> bool:
    """Whether a file or folder exists, as far as the backend can tell.

    Args:
        backend (BaseStorageBackend | None): From :func:`find_backend`.
        path (str): Path or URL.
        folder (bool): Whether it must be a folder.

    Returns:
        bool: True if the backend cannot tell, as for HTTP.
    """
    try:
        return backend.isdir(path) if folder else backend.isfile(path)
    except Exception:
        return True


def is_empty(backend: Any, path: str) -> bool:
    """Whether a folder has no entries, as far as the backend can tell."""
    try:
        entries: Iterator = backend.list_dir_or_file(path)
        return next(iter(entries), None) is None
    except Exception:
        return False
