"The checks for CUDA, rehearsed without a card, with fake graphs, and the benchmarks' smallest forms: names that moved are noticed here."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda import fake_cuda
from forks import warm

root = Path(__file__).parents[1]

# As `python SCRIPT ...`, in a process that has torch imported.
SCRIPT = 'import os, runpy, sys; del sys.argv[0]; sys.path[0] = os.path.dirname(sys.argv[0]); runpy.run_path(sys.argv[0], run_name="__main__")'
env = os.environ | dict(CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1') | warm('torch._dynamo', 'saxgpt.train', 'saxgpt.generation', family=True)


def start(script, *words):
    return subprocess.run([sys.executable, '-c', SCRIPT, *map(str, (root/'tests/benchmarks'/script, *words))], capture_output=True, text=True, env=env)


def run(*words):
    done = start(*words)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('part', ['machine', 'codes', 'attention', 'training'])
def test_the_checks_for_cuda_hold_on_a_cpu(part, tmp_path):
    run('bench_gpu.py', part, '--device', 'cpu', '--tiny', '--out', tmp_path)
    assert 'failed' not in json.loads((tmp_path/f'{part}.json').read_text())


def test_a_part_that_did_not_end_is_named(tmp_path):
    (tmp_path/'codes.json').write_text('{"failed": "AssertionError: a recorded step plays another solo"}')
    done = start('bench_gpu.py', 'report', '--device', 'cpu', '--out', tmp_path)
    assert done.returncode == 1 and '| codes | AssertionError: a recorded step plays another solo |' in done.stdout
    assert '| attention | did not end |' in (tmp_path/'gpu.md').read_text()


def test_decoding_is_measured(tmp_path):
    run('bench_generate.py', '--sizes', 'xsmall', '--batches', 1, '--rounds', 1, '--steps', 2, '--threads', 1, '--frames', 60, '--train-sizes', '--lengths',
        '--no-compile', '--json', tmp_path/'d.json')
    playing = json.loads((tmp_path/'d.json').read_text())['playing']['xsmall x 1']
    assert min(playing.values()) > 0 and {'command', 'ours', 'transformers', 'floor'} <= set(playing)


def test_a_fake_graph_keeps_what_python_computed_and_forbids_reading():
    x, y, n = torch.zeros(3), torch.zeros(3), 1
    with fake_cuda():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph): y.add_(x[1:].sum() + n)
        n = 5
        x.copy_(torch.tensor([9., 1., 2.]))
        y.zero_()
        graph.replay()
        assert y.tolist() == [4, 4, 4]
        with pytest.raises(RuntimeError, match='not permitted'), torch.cuda.graph(torch.cuda.CUDAGraph()): x.sum().item()
