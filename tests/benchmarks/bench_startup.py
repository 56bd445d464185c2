"""CPU seconds of starting up: python tests/benchmarks/bench_startup.py [--rounds 7] [--json F]

Medians, user and system time together, of processes run one after the other in interleaved rounds: Python alone, `import torch`,
`import saxgpt.generate`, the help of every command, and `saxgpt generate` until it is ready to play (model and codec loaded, the demo backing
read and brought to its level) and until the first step is decoded (with the backing encoded, which is work and not start-up).
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

from saxgpt.cli import commands

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--rounds', type=int, default=7, help='of which the median is taken')
parser.add_argument('--json', help='also write the numbers to this file')
args = parser.parse_args()

READY = '''
import torch
import saxgpt.generate
from saxgpt.audio import normalize_loudness
from saxgpt.codecs.load import matching_codec
from saxgpt.generation import BACKING_LUFS
from saxgpt.model.decoding import play_codes
from saxgpt.pretrained import load_model
from saxgpt.takes.backings import read_backing
model, about = load_model()
backing = read_backing('demo')[1]
codec = matching_codec(None, about, 'checkpoint')
backing = normalize_loudness(backing, codec.sample_rate, BACKING_LUFS)[:, :]
'''
FIRST = READY + 'next(play_codes(model, codec.for_backing.encode(torch.from_numpy(backing)[None]), [0], block=1))'
runs = {'python': ['-c', 'pass'], 'import torch': ['-c', 'import torch'], 'import saxgpt.generate': ['-c', 'import saxgpt.generate'],
        'ready to play': ['-c', READY], 'first step decoded': ['-c', FIRST]}
runs |= {f'saxgpt {name} --help': ['-m', 'saxgpt', name, '--help'] for name in commands}


def cpu(words):
    "CPU seconds of a Python process."
    pid = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, env=dict(os.environ, OMP_NUM_THREADS='1')).pid
    _, status, usage = os.wait4(pid, 0)
    assert not status, words
    return usage.ru_utime + usage.ru_stime


times = {name: [] for name in runs}
for words in runs.values(): cpu(words)                     # writes what Python compiles
for _ in range(args.rounds):
    for name, words in runs.items(): times[name].append(cpu(words))
medians = {name: statistics.median(t) for name, t in times.items()}
for name, t in times.items(): print(f'{name:24} {medians[name]:6.2f} s   ({min(t):.2f} to {max(t):.2f})')
print(f'\nready to play {medians["ready to play"] - medians["import torch"]:.2f} s after `import torch`')
if args.json:
    with open(args.json, 'w') as f: json.dump(times, f, indent=1)
