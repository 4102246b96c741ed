"""Tests of the trial with which backend 'auto' decides on a GPU.

They run on the CPU: the module is told that a CPU has a choice, and the
backends of the problem are replaced by functions that return a known result.
The clock is replaced, too. One test runs the real kernels, on a GPU if there
is one, and otherwise in Triton's interpreter in a separate process.
"""

import importlib
import logging
import threading

import pytest
import torch
from mmengine.logging import MMLogger
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmvvt.models import ConvMLP
from mmvvt.models import mlp as mlp_module
from mmvvt.ops import attention, convolution, dispatch, selection
from mmvvt.ops import vicinity_attention as attend
from mmvvt.ops.selection import Problem

from conftest import relative_error, run_two_processes
from triton_testing import (
    DEVICE,
    INTERPRETED,
    needs_kernels,
    run_interpreted,
)


class Trials:
    """Trials of the operation ``y = 2 * x`` with a fake clock.

    Attributes:
        runs (list[str]): Names of the backends, in the order of their runs.
        milliseconds (dict[str, float]): Time of a run by backend.
        functions (dict[str, Callable]): Backends.
        made (int): Number of problems that were made.
    """

    def __init__(self):
        self.now = 0.0
        self.runs = []
        self.made = 0
        self.milliseconds = dict(torch=2.0, triton=1.0)
        self.functions = dict(torch=lambda x: 2 * x, triton=lambda x: x + x)

    def _backend(self, name):
        def run(x):
            self.runs.append(name)
            self.now += self.milliseconds[name] / 1000
            return self.functions[name](x)

        return run

    def make_problem(self, device, dtype):
        self.made += 1
        (x,) = selection.uniform(-1, 1, (3, 4))
        return Problem(
            inputs=(x.to(device, dtype),),
            plain=lambda x: 2 * x,
            backends={name: self._backend(name) for name in self.functions},
        )

    def select(self, x=None, obstacle=None):
        x = torch.zeros(2) if x is None else x
        return selection.select(
            'doubling',
            self.make_problem,
            dict(dtype=x.dtype),
            dict(x=x),
            obstacle,
        )


class Records(logging.Handler):
    """Handler that keeps the level and text of messages."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append((record.levelname, record.getMessage()))


@pytest.fixture
def chooses(monkeypatch):
    """A CPU has a choice between the backends; nothing is decided yet."""
    monkeypatch.setattr(selection, 'DEVICE_TYPES', ('cpu', 'cuda'))
    monkeypatch.setattr(selection, '_decisions', {})


@pytest.fixture
def trials(chooses, monkeypatch):
    trials = Trials()
    monkeypatch.setattr(selection, 'clock', lambda: trials.now)
    monkeypatch.setattr(selection, 'triton_obstacle', lambda tensors: None)
    return trials


@pytest.fixture
def messages():
    handler = Records()
    selection.logger.addHandler(handler)
    yield handler.messages
    selection.logger.removeHandler(handler)


@pytest.mark.parametrize('faster', ['torch', 'triton'])
def test_the_faster_backend_is_kept(trials, messages, faster):
    trials.milliseconds[faster] = 0.5
    assert trials.select() == faster
    assert trials.runs == ['torch', 'triton'] * 12  # they take turns
    assert trials.select() == faster
    assert trials.made == 1
    times = {'torch': 2.0, 'triton': 1.0, faster: 0.5}
    assert messages == [
        (
            'INFO',
            f"backend '{faster}' is used for doubling (dtype torch.float32, "
            f"forward) on CPU ('torch' {times['torch']:.3f} ms, "
            f"'triton' {times['triton']:.3f} ms)",
        )
    ]


def test_equal_times_are_for_torch(trials):
    trials.milliseconds['triton'] = trials.milliseconds['torch']
    assert trials.select() == 'torch'


def test_slow_runs_before_the_kernels_are_compiled_do_not_count(
    trials, monkeypatch
):
    # The median of these runs and the warm-up is the time of a slow run.
    monkeypatch.setattr(selection, 'RUNS', selection.WARM_UP - 1)

    def compile_first(x):
        if trials.runs.count('triton') <= selection.WARM_UP:
            trials.now += 5
        return 2 * x

    trials.functions['triton'] = compile_first
    assert trials.select() == 'triton'


def test_a_slow_run_among_fast_ones_does_not_count(trials):
    def disturbed(x):
        trials.now += 5 * (trials.runs.count('triton') == 7)
        return 2 * x

    trials.functions['triton'] = disturbed
    assert trials.select() == 'triton'


def test_classes_are_decided_separately(trials):
    x = torch.zeros(2)
    for number in (1, 1):
        trials.select(x)
        assert trials.made == number
    for t in (x, x, x.half(), x.clone().requires_grad_()):
        trials.select(t)
    assert trials.made == 3
    with torch.no_grad():  # no gradient is needed
        trials.select(x.clone().requires_grad_())
    assert trials.made == 3


def fail(x):
    raise MemoryError('no shared memory\nand a traceback')


@pytest.mark.parametrize('late', [False, True])
def test_a_backend_that_raises_is_left_out(trials, messages, late):
    trials.functions['triton'] = lambda x: (
        2 * x if late and trials.runs.count('triton') < 6 else fail(x)
    )
    assert trials.select() == 'torch'
    assert messages[0] == (
        'WARNING',
        "backend 'triton' is left out for doubling (dtype torch.float32, "
        'forward) on CPU: MemoryError: no shared memory',
    )
    assert "backend 'torch' is used" in messages[1][1]
    assert len(messages) == 2
    assert trials.select() == 'torch' and len(messages) == 2


@pytest.mark.parametrize(
    'wrong',
    [
        lambda x: 2 * x + 1e-3,
        lambda x: x * float('nan'),
        lambda x: x.square(),
        lambda x: (2 * x)[:1],
    ],
)
def test_a_wrong_output_is_left_out(trials, messages, wrong):
    trials.functions['triton'] = wrong
    assert trials.select() == 'torch'
    assert messages[0][0] == 'WARNING'
    assert "backend 'triton' is left out" in messages[0][1]


def test_a_wrong_gradient_is_left_out(trials, messages):
    trials.functions['triton'] = lambda x: x + x.detach()
    assert trials.select(torch.zeros(2)) == 'triton'
    assert trials.select(torch.zeros(2, requires_grad=True)) == 'torch'
    assert 'is above the bound' in messages[1][1]
    assert 'forward and backward' in messages[1][1]


@pytest.mark.parametrize(
    'dtype', [torch.float32, torch.float16, torch.bfloat16]
)
def test_rounding_is_within_the_bound(trials, dtype):
    eps = torch.finfo(dtype).eps
    trials.functions['triton'] = lambda x: ((2 + eps) * x.double()).to(x.dtype)
    assert trials.select(torch.zeros(2, dtype=dtype)) == 'triton'


def test_torch_may_be_left_out_as_well(trials, messages):
    trials.milliseconds['torch'] = 0.1
    trials.functions['torch'] = fail
    assert trials.select() == 'triton'
    trials.functions['triton'] = fail
    assert trials.select(torch.zeros(2).half()) == 'torch'
    assert messages[-1][0] == 'WARNING'


def test_a_problem_that_cannot_be_made(trials, messages):
    trials.make_problem = lambda **_: fail(None)
    assert trials.select() == trials.select() == 'torch'
    assert 'MemoryError: no shared memory' in messages[0][1]
    assert len(messages) == 2


def test_torch_without_a_trial(chooses, trials, monkeypatch):
    """Where the kernels cannot run, and on devices that have no choice."""
    assert trials.select(obstacle='129 channels') == 'torch'
    monkeypatch.setattr(selection, 'triton_obstacle', lambda tensors: 'none')
    assert trials.select() == 'torch'
    monkeypatch.setattr(selection, 'triton_obstacle', lambda tensors: None)
    monkeypatch.setattr(selection, 'DEVICE_TYPES', ('cuda',))
    assert trials.select() == 'torch'
    assert not trials.made and not selection._decisions


class Subclass(torch.Tensor):
    pass


def observed(context):
    def call(select, x):
        with context():
            return select(x)

    return call


def traced(select, x):
    found = []
    torch.jit.trace(
        lambda t: (found.append(select(t)), t + 1)[1], x, check_trace=False
    )
    return found[0]


def vmapped(select, x):
    found = []
    torch.func.vmap(lambda t: (found.append(select(t)), t)[1])(x)
    return found[0]


class FunctionMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    'call',
    [
        observed(lambda: FlopCounterMode(display=False)),
        observed(FunctionMode),
        observed(torch.autograd.forward_ad.dual_level),
        lambda select, x: select(x.as_subclass(Subclass)),
        traced,
        vmapped,
    ],
)
@pytest.mark.parametrize('decided', [False, True])
def test_torch_where_operations_are_observed(trials, call, decided):
    """Also if the class has been decided; nothing is decided there."""
    x = torch.zeros(2)
    if decided:
        assert trials.select(x) == 'triton'
    before = dict(selection._decisions), trials.made
    assert call(trials.select, x) == 'torch'
    assert (selection._decisions, trials.made) == before


def test_torch_while_a_graph_is_captured(trials, monkeypatch):
    """A stand-in for a tensor on a GPU; the stream is capturing."""

    class OnGPU:
        device = torch.device('cuda', 0)
        is_cuda = True

    OnGPU.__name__ = 'Tensor'
    monkeypatch.setattr(selection, 'Tensor', OnGPU)
    capturing = [True, False]
    monkeypatch.setattr(
        torch.cuda, 'is_current_stream_capturing', capturing.pop
    )
    assert selection.may_decide(OnGPU())
    assert not selection.may_decide(OnGPU())


@pytest.mark.parametrize('operation', ['attention', 'mlp'])
def test_torch_under_compile(chooses, monkeypatch, operation):
    """One graph of standard operations, and nothing is decided."""
    monkeypatch.setattr(
        selection, '_decide', lambda *args: pytest.fail('a trial')
    )
    torch._dynamo.reset()
    monkeypatch.setattr(selection, 'triton_obstacle', lambda tensors: None)
    if operation == 'attention':
        inputs = [torch.randn(1, 2, 6, 4) for _ in range(3)]
        function = attend
    else:
        inputs, function = [torch.randn(1, 6, 4)], ConvMLP(4, 8)
    compiled = torch.compile(function, fullgraph=True, backend='aot_eager')
    out = compiled(*inputs, (2, 3))
    assert not selection._decisions
    monkeypatch.setattr(selection, 'DEVICE_TYPES', ('cuda',))
    assert relative_error(out, function(*inputs, (2, 3))) < 1e-6


@pytest.mark.parametrize(
    'context',
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast('cpu', dtype=torch.bfloat16),
        lambda: torch.device('meta'),
        torch.enable_grad,
    ],
)
def test_the_trial_does_not_depend_on_its_caller(trials, context):
    """Grad mode, autocast and default device are set by the class alone."""
    seen = []

    def record(x):
        seen.append(
            (
                x.is_inference(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled('cpu'),
                x.device.type,
                torch.is_grad_enabled() == x.requires_grad,
            )
        )
        return 2 * x

    trials.functions['triton'] = record
    x = torch.zeros(2, requires_grad=True)
    before = torch.get_rng_state()
    with context():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert trials.select(x) == 'triton'
        assert modes == (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )
    assert set(seen) == {(False, False, False, 'cpu', True)}
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize('reentrant', [False, True])
def test_decided_inside_activation_checkpointing(trials, reentrant):
    """Hooks on saved tensors and a running backward are not disturbed."""

    def block(x):
        return (x * 3).sin() if trials.select(x) == 'triton' else x

    trials.functions['triton'] = lambda x: x.square() / x * 2  # saves tensors
    x = torch.randn(5, requires_grad=True)
    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(x.grad, 3 * (x.detach() * 3).cos())


def test_threads_wait_for_one_trial(trials, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def slow(x):
        begun.set()
        assert go.wait(30)
        return 2 * x

    trials.functions['triton'] = slow
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(trials.select()))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    go.set()
    for thread in threads:
        thread.join()
    assert found == ['triton'] * 3 and trials.made == 1

    # A thread that waits for too long goes on, and nothing is decided.
    monkeypatch.setattr(selection, '_decisions', {})
    monkeypatch.setattr(selection, 'TIMEOUT', 0.01)
    with selection._lock:
        assert trials.select() == 'torch'
    assert not selection._decisions


def test_messages_are_in_the_log_of_mmengine(trials, tmp_path):
    path = tmp_path / 'run.log'
    MMLogger.get_instance('selection', log_file=str(path))
    try:
        trials.select()
    finally:
        MMLogger._instance_dict.pop('selection')
    assert path.read_text().count("INFO - backend 'triton' is used") == 1


def test_a_forced_backend_is_not_tried(chooses, monkeypatch):
    """By the variable in the environment or in the config, in both parts."""
    for module in (attention, convolution):
        monkeypatch.setattr(
            module, 'select', lambda *args: pytest.fail('a trial')
        )
    q = torch.randn(1, 2, 6, 4)
    x = torch.randn(1, 6, 4)
    for backend in ('torch', 'reference'):
        attend(q, q, q, (2, 3), backend=backend)
        ConvMLP(4, 8, backend=backend)(x, (2, 3))
        monkeypatch.setattr(dispatch, 'DEFAULT_BACKEND', backend)
        attend(q, q, q, (2, 3))
        ConvMLP(4, 8)(x, (2, 3))
        monkeypatch.undo()


@pytest.mark.parametrize(
    'change',
    [
        lambda mlp: mlp.act.register_forward_hook(lambda *args: None),
        lambda mlp: setattr(mlp, 'act', torch.nn.ReLU()),
        lambda mlp: mlp.double(),
        lambda mlp: setattr(mlp.dwconv.dwconv, 'bias', None),
    ],
)
def test_changed_layers_are_called(chooses, monkeypatch, change):
    """Also if the kernel is faster than the original layers."""
    monkeypatch.setattr(selection, 'triton_obstacle', lambda tensors: None)
    monkeypatch.setattr(selection, '_decide', lambda *args: 'triton')
    monkeypatch.setattr(mlp_module, 'dwconv_gelu', lambda *args: args[0])
    mlp = ConvMLP(4, 8)
    x = torch.randn(1, 6, 4)
    assert mlp._is_fused(mlp.fc1(x))
    change(mlp)
    x = x.to(mlp.fc1.weight.dtype)
    out = mlp(x, (2, 3))
    mlp.backend = 'torch'
    assert torch.equal(out, mlp(x, (2, 3)))


SCRIPT = """
import sys
import time
import torch
import torch.distributed as dist
from mmvvt.ops import selection

rank = int(sys.argv[1])
dist.init_process_group(
    'gloo', init_method='file://' + sys.argv[2], rank=rank, world_size=2)
selection.DEVICE_TYPES = ('cpu',)
selection.triton_obstacle = lambda tensors: None
messages = []
selection.logger.handlers[:] = []
selection.logger.addFilter(lambda r: messages.append(r.getMessage()))
decided = []


def decide(call_class, *args):
    decided.append(call_class)
    return ('triton', 'torch')[rank]


def select(operation):
    return selection.select(operation, None, {}, dict(x=torch.zeros(2)))


selection._decide = decide
if rank == 0:
    time.sleep(0.5)  # rank 1 waits
assert select('both') == select('both') == 'triton'
assert len(decided) == (rank == 0), decided

# Rank 0 comes only after rank 1 has passed a collective operation.
selection.TIMEOUT = 0.3
dist.barrier()
if rank == 1:
    assert select('late') == 'torch'
    assert 'rank 0 has not decided' in messages[-1]
    selection.TIMEOUT = 1000  # a process waits only once
    assert select('never') == select('late') == 'torch'
    assert not decided
dist.barrier()
if rank == 0:
    assert select('late') == 'triton'
    assert select('later') == 'triton'
dist.barrier()
assert select('late') == ('triton', 'torch')[rank]
assert select('later') == 'triton'

# Another GPU than that of rank 0 is tried.
store = dist.distributed_c10d._get_default_store()
if rank == 1:
    store.set('mmvvt/other (, forward)', 'triton another GPU')
    assert select('other') == 'torch'
    assert decided == ['other (, forward) on CPU']
dist.barrier()

# In a second job of the same processes, rank 0 decides again.
del store
dist.destroy_process_group()
dist.init_process_group(
    'gloo', init_method='file://' + sys.argv[2] + '2', rank=rank, world_size=2)
decided.clear()
selection.TIMEOUT = 30
if rank == 0:
    time.sleep(0.5)  # rank 1 waits again
assert select('both') == select('both') == 'triton'
assert len(decided) == (rank == 0), decided
dist.barrier()

# A job without a store
dist.distributed_c10d._get_default_store = lambda: None
assert select('no store') == 'torch'
assert 'no key-value store' in messages[-1]
"""


def test_ranks_take_the_decision_of_rank_0(tmp_path):
    run_two_processes(SCRIPT, tmp_path, timeout=60)


@pytest.mark.skipif(INTERPRETED or DEVICE == 'cuda', reason='it is running')
def test_interpreted():
    run_interpreted('test_selection.py', '-k', 'real_kernels')


def triton_module(name):
    return importlib.import_module(f'mmvvt.ops.triton_kernels.{name}')


@needs_kernels
@pytest.mark.parametrize(
    'dtype,faster,grad',
    [(torch.float32, 'triton', True), (torch.bfloat16, 'torch', False)],
)
def test_real_kernels(chooses, messages, monkeypatch, dtype, faster, grad):
    """Both operations run the backend that the clock prefers."""
    monkeypatch.setattr(attention, 'TRIAL_SIZE', (1, 1))
    monkeypatch.setattr(attention, 'TRIAL_GRID', (3, 7))
    monkeypatch.setattr(convolution, 'TRIAL_GRID', (3, 9))
    monkeypatch.setattr(selection, 'WARM_UP', 1)
    monkeypatch.setattr(selection, 'RUNS', 1)
    ran, now = [], [0.0]
    for module, name, backend in (
        (attention.linear, 'linear_attention', 'torch'),
        (convolution, '_layers', 'torch'),
        (triton_module('attention'), 'linear_attention', 'triton'),
        (triton_module('dwconv_gelu'), 'dwconv_gelu', 'triton'),
    ):

        def timed(*args, run=getattr(module, name), backend=backend, **kwargs):
            ran.append(backend)
            now[0] += 1 if backend == faster else 2
            return run(*args, **kwargs)

        monkeypatch.setattr(module, name, timed)
    monkeypatch.setattr(selection, 'clock', lambda: now[0])
    q, k, v = (
        torch.randn(1, 2, 6, 4, device=DEVICE, dtype=dtype) for _ in range(3)
    )
    q.requires_grad_(grad)
    out = attend(q, k, v, (2, 3))
    assert ran.pop() == faster and set(ran) == {'torch', 'triton'}
    assert torch.equal(out, attend(q, k, v, (2, 3), backend=faster))

    mlp = ConvMLP(4, 8).to(DEVICE, dtype).requires_grad_(grad)
    x = torch.randn(1, 6, 4, device=DEVICE, dtype=dtype)
    out = mlp(x, (2, 3))
    forced = ConvMLP(4, 8, backend=faster).to(DEVICE, dtype)
    forced.load_state_dict(mlp.state_dict())
    assert torch.equal(out, forced(x, (2, 3)))
    assert [level for level, _ in messages] == ['INFO', 'INFO']
    passes = 'forward and backward' if grad else 'forward'
    for (_, message), operation in zip(
        messages, ('vicinity attention', 'depthwise convolution and GELU')
    ):
        assert message.startswith(
            f"backend '{faster}' is used for {operation}"
        )
        assert f', {passes}) on ' in message
