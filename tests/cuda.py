"A fake of CUDA graphs, for machines without a card: operations are recorded when they are captured, and a replay runs them again on the same memory."
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class FakeGraph(TorchDispatchMode):
    """Whatever Python computed while it captured stays as it was, results are written where they were at first, and a value that Python
    reads (`item`, a branch) is an error, as in a real graph."""
    def __init__(self): super().__init__(); self.tape = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten._local_scalar_dense.default: raise RuntimeError('operation not permitted when stream is capturing')
        out = op(*args, **(kwargs or {}))
        self.tape.append((op, args, kwargs or {}, out))
        return out

    def replay(self):
        for op, args, kwargs, out in self.tape:
            new = op(*args, **kwargs)
            for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else tuple(x or ()) for x in (out, new))):
                if a.data_ptr() != b.data_ptr(): a.copy_(b)


@contextmanager
def fake_cuda():
    "`torch.cuda` with streams that do nothing and fake graphs."
    class Stream:
        def __init__(self, *_): pass
        def wait_stream(self, _): pass

    @contextmanager
    def stream(_): yield

    with mock.patch.multiple(torch.cuda, Stream=Stream, current_stream=Stream, stream=stream, CUDAGraph=FakeGraph, graph=lambda g, **_: g): yield
