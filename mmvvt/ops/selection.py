"""Backend 'auto' on a GPU: a trial on the user's machine decides.

Which backend is faster depends on the GPU, the data type, the shape of the
problem and the versions of the software. :func:`select` therefore decides the
first time a class of calls occurs: it runs the backends 'torch' and 'triton'
on a small problem of this class, compares both with float64, measures both,
and keeps the faster correct one for the process. The steps are in the order
of this file: when 'auto' may decide, the small problem, the trial, the
decision of a job with several processes, and the function that an operator
calls.

An operator provides a function that makes its small problem, see
:class:`Problem`.
"""

import logging
import statistics
import threading
import time
import weakref
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .autograd import (
    has_modes,
    is_transformed,
    needs_custom_backward,
    without_autocast,
)
from .dispatch import triton_obstacle

logger = logging.getLogger('mmvvt')

# Only on these devices there is more than one backend to choose from.
DEVICE_TYPES = ('cuda',)

# A run takes about a millisecond, most of it for launching kernels. The first
# run compiles the Triton kernels, which takes seconds.
WARM_UP = 3
RUNS = 9
clock = time.perf_counter

# The relative error ||y - y64|| / ||y64|| of the output and of each gradient
# must be at most twice that of the plain formula in the same dtype and on the
# same device, plus this constant. It is the unit roundoff for the dtypes with
# 16 bits, where the plain formula may round fewer times by chance. The sums of
# float32 have thousands of terms, and the order of the terms is different in
# each backend: 1e-5 is the tolerance of the tests. Errors of kernels that are
# wrong are larger by orders of magnitude.
SLACK = {
    torch.float32: 1e-5,
    torch.float16: torch.finfo(torch.float16).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
}

# Seconds that a process waits for the decision of rank 0, once in a job,
# and that a thread waits for the trial of another thread. Compiling the
# kernels takes less, and collectives of PyTorch wait longer (10 minutes).
TIMEOUT = 120.0
POLL_INTERVAL = 0.05

_decisions: Dict[tuple, str] = {}
_lock = threading.Lock()
# Stores of the jobs in which rank 0 did not decide in time.
_late_jobs: 'weakref.WeakSet[Any]' = weakref.WeakSet()


def may_decide(*tensors: Tensor) -> bool:
    """Check whether 'auto' may decide for a call with these tensors.

    It may not where operations are compiled, traced, transformed or observed,
    because the kernels are opaque to the observer, nor for subclasses of
    tensors, nor while a CUDA graph is captured, because a trial synchronises
    the device. The 'torch' backend, which consists of standard operations,
    runs there, also if the class of the call has been decided.

    Args:
        *tensors (Tensor): Inputs of the operation; all are on one device.

    Returns:
        bool: True if the faster backend may be used.
    """
    return (
        tensors[0].device.type in DEVICE_TYPES
        and not is_transformed()
        and not has_modes()
        and all(type(t) in (Tensor, nn.Parameter) for t in tensors)
        and not (
            tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
        )
    )


class Problem(NamedTuple):
    """A small problem, which represents a class of calls.

    Attributes:
        inputs (tuple[Tensor, ...]): Inputs, in the dtypes of the class and on
            its device. The output has the shape of the first one.
        plain (Callable): The plain formula: it maps the inputs, in any dtype,
            to the output.
        backends (dict[str, Callable]): Functions from the inputs to the
            output, by backend.
    """

    inputs: Tuple[Tensor, ...]
    plain: Callable[..., Tensor]
    backends: Dict[str, Callable[..., Tensor]]


def uniform(low: float, high: float, *shapes: Tuple[int, ...]) -> List[Tensor]:
    """Draw inputs of a problem without changing the state of a generator.

    Args:
        low (float): Lower bound of the values.
        high (float): Upper bound of the values.
        *shapes (tuple[int, ...]): Shapes of the tensors.

    Returns:
        list[Tensor]: float32 tensors on the CPU, the same ones at each call.
    """
    generator = torch.Generator('cpu').manual_seed(0)
    return [
        torch.rand(
            shape, generator=generator, dtype=torch.float32, device='cpu'
        )
        * (high - low)
        + low
        for shape in shapes
    ]


@contextmanager
def _isolated(device: torch.device, needs_grad: bool):
    """Shield the trial and its caller from each other.

    The caller may be in inference mode or autocast, and its hooks on saved
    tensors, such as those of activation checkpointing, count the tensors.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(needs_grad))
        stack.enter_context(without_autocast(torch.empty(0, device=device)))
        # Only the innermost pair of hooks is called.
        stack.enter_context(
            torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        )
        if device.type == 'cuda':
            stack.enter_context(torch.cuda.device(device))
        yield


def _synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def _run(
    function: Callable[..., Tensor],
    inputs: Tuple[Tensor, ...],
    cotangent: Optional[Tensor],
) -> Tuple[Tensor, ...]:
    """Return the output and, with a cotangent, the gradients of the inputs."""
    if cotangent is None:
        return (function(*inputs),)
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    out = function(*inputs)
    return (out.detach(), *torch.autograd.grad(out, inputs, cotangent))


def _errors(
    results: Tuple[Tensor, ...], exact: Tuple[Tensor, ...]
) -> List[float]:
    """Relative errors of the output and the gradients against float64."""
    return [
        float((t.double() - want).norm() / want.norm())
        for t, want in zip(results, exact)
    ]


def _reason(error: Exception) -> str:
    """The first line of an error, with its class."""
    lines = str(error).splitlines() or ['']
    return f'{type(error).__name__}: {lines[0]}'


def _measure(
    call_class: str, problem: Problem, device: torch.device, needs_grad: bool
) -> Dict[str, float]:
    """Check and measure the backends on a problem.

    Args:
        call_class (str): Description of the class, for the warnings.
        problem (Problem): The problem.
        device (torch.device): Its device.
        needs_grad (bool): Whether to run the backward pass, too.

    Returns:
        dict[str, float]: Median time in seconds of each backend that raises
        no error and is within the error bound.
    """
    inputs, exact_inputs = problem.inputs, [t.double() for t in problem.inputs]
    cotangent = exact_cotangent = None
    if needs_grad:
        (cotangent,) = uniform(-1, 1, tuple(inputs[0].shape))
        cotangent = cotangent.to(inputs[0])
        exact_cotangent = cotangent.double()
    exact = _run(problem.plain, tuple(exact_inputs), exact_cotangent)
    plain = _errors(_run(problem.plain, inputs, cotangent), exact)
    bounds = [2 * error + SLACK[inputs[0].dtype] for error in plain]

    times: Dict[str, List[float]] = {name: [] for name in problem.backends}
    # The backends take turns, because the clock rate of a GPU changes.
    for turn in range(WARM_UP + RUNS):
        for name in list(times):
            try:
                _synchronize(device)
                start = clock()
                results = _run(problem.backends[name], inputs, cotangent)
                _synchronize(device)
                times[name].append(clock() - start)
                if turn > 0:
                    continue
                for error, bound in zip(_errors(results, exact), bounds):
                    if not error <= bound:  # also if the error is NaN
                        raise ArithmeticError(
                            f'its relative error {error:.1e} against float64 '
                            f'is above the bound {bound:.1e}'
                        )
            except Exception as error:
                del times[name]
                logger.warning(
                    "backend '%s' is left out for %s: %s",
                    name,
                    call_class,
                    _reason(error),
                )
    return {
        name: statistics.median(measured[WARM_UP:])
        for name, measured in times.items()
    }


def _decide(
    call_class: str,
    make_problem: Callable[..., Problem],
    settings: Dict[str, Any],
    device: torch.device,
    needs_grad: bool,
) -> str:
    """Run a trial and log the decision. No error of a trial is raised.

    The arguments are those of :func:`select` and :func:`_measure`.

    Returns:
        str: 'torch' or 'triton'.
    """
    try:
        with _isolated(device, needs_grad):
            problem = make_problem(device=device, **settings)
            times = _measure(call_class, problem, device, needs_grad)
    except Exception as error:  # such as no memory for the problem
        logger.warning('no trial of %s: %s', call_class, _reason(error))
        times = {}
    if not times:
        logger.warning("backend 'torch' is used for %s", call_class)
        return 'torch'
    decision = min(times, key=lambda name: times[name])
    logger.info(
        "backend '%s' is used for %s (%s)",
        decision,
        call_class,
        ', '.join(f"'{n}' {1000 * t:.3f} ms" for n, t in times.items()),
    )
    return decision


def _in_job() -> bool:
    return dist.is_available() and dist.is_initialized()


def _find_store() -> Any:
    """Return the key-value store of the job, or None if it has none."""
    try:
        # PyTorch has no public function that returns the store.
        return dist.distributed_c10d._get_default_store()
    except (AttributeError, ValueError):
        return None


def _agree(
    store: Any, key: str, device_name: str, decide: Callable[[], str]
) -> str:
    """Take the decision of rank 0 in a job with several processes.

    Rank 0 decides, and writes the decision to the key-value store with which
    the processes of the job found each other. The other ranks look for it
    there. There is no collective operation, which would hang if only some of
    the ranks call an operation, or if they call their operations in different
    orders. A rank that does not find the decision for :data:`TIMEOUT` seconds
    uses 'torch', which is correct everywhere, for the rest of the job;
    after that it looks for each further decision only once. Rank 0 never
    waits.

    A rank whose GPU is not of the same model as that of rank 0 decides on its
    own.

    Args:
        store (Store, optional): Key-value store of the job.
        key (str): Description of the class without the device.
        device_name (str): Model of the GPU.
        decide (Callable): Function that runs the trial.

    Returns:
        str: 'torch' or 'triton'.
    """
    if store is None:  # for example with the backend 'mpi'
        logger.warning(
            "backend 'torch' is used for %s: the job has no key-value store",
            key,
        )
        return 'torch'
    key = f'mmvvt/{key}'
    if dist.get_rank() == 0:
        decision = decide()
        store.set(key, f'{decision} {device_name}')
        return decision
    deadline = time.monotonic() + (0 if store in _late_jobs else TIMEOUT)
    # Store.wait would block other threads that use the store.
    while not store.check([key]):
        if time.monotonic() >= deadline:
            _late_jobs.add(store)
            logger.warning(
                "backend 'torch' is used for %s: rank 0 has not decided",
                key,
            )
            return 'torch'
        time.sleep(POLL_INTERVAL)
    decision, _, name = store.get(key).decode().partition(' ')
    if name != device_name:
        return decide()
    logger.info("backend '%s' is used for %s, as on rank 0", decision, key)
    return decision


def select(
    operation: str,
    make_problem: Callable[..., Problem],
    settings: Dict[str, Any],
    tensors: Dict[str, Tensor],
    obstacle: Optional[str] = None,
) -> str:
    """Choose the backend of one call of an operation.

    The class of a call consists of the operation, the model of the GPU, the
    settings and whether a gradient is needed. Its decision is made once per
    process, and again in each distributed job that the process joins.

    Args:
        operation (str): Name of the operation.
        make_problem (Callable): Function that returns a :class:`Problem`. Its
            arguments are the settings and ``device``.
        settings (dict[str, object]): Everything else that the kernels are
            compiled for: data types, number of channels, and options.
        tensors (dict[str, Tensor]): Inputs of the call by name.
        obstacle (str, optional): Reason why the Triton kernels cannot run.
            Defaults to None.

    Returns:
        str: 'torch' or 'triton'. It is 'torch' without a trial if
        :func:`may_decide` is False or if the Triton kernels cannot run.
    """
    if not may_decide(*tensors.values()):
        return 'torch'
    if obstacle or triton_obstacle(tensors):
        return 'torch'
    device = next(iter(tensors.values())).device
    device_name = 'CPU'
    if device.type == 'cuda':
        device_name = torch.cuda.get_device_properties(device).name
    needs_grad = needs_custom_backward(*tensors.values())
    in_job = _in_job()
    store = _find_store() if in_job else None
    class_key = (
        operation,
        device_name,
        tuple(settings.items()),
        needs_grad,
        in_job,
        # A reference would keep the port of a job in use after its end.
        None if store is None else weakref.ref(store),
    )
    decision = _decisions.get(class_key)
    if decision is not None:
        return decision

    passes = 'forward and backward' if needs_grad else 'forward'
    options = ', '.join(f'{name} {value}' for name, value in settings.items())
    key = f'{operation} ({options}, {passes})'

    def decide():
        call_class = f'{key} on {device_name}'
        return _decide(call_class, make_problem, settings, device, needs_grad)

    # The threads of nn.DataParallel arrive together. A thread that another
    # one keeps waiting, perhaps because that one needs it, goes on.
    if not _lock.acquire(timeout=TIMEOUT):
        return 'torch'
    try:
        if class_key not in _decisions:
            _decisions[class_key] = (
                _agree(store, key, device_name, decide) if in_job else decide()
            )
        return _decisions[class_key]
    finally:
        _lock.release()
