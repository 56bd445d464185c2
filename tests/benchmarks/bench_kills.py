"""How many kills a training run survives, and what difference they make to its losses and weights.

    python tests/benchmarks/bench_kills.py [--kills 100] [--seed 0] [--json F]

Real processes and real signals, as in tests/test_train.py. `points` goes through every file operation of a save; every other kind is repeated
until `--kills` of it have hit. A kill is survived when the run, started again, ends with the log and all bytes of weights, moving average and
optimiser of the run that never stopped.
"""
import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kills import VARIANTS, Nursery, config_file, differences, log_lines, loss_difference, toy_data, whole_checkpoints

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--kills', type=int, default=20, help='of each kind')
parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--json', help='where to write the table')
args = parser.parse_args()

INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
dice, folder = random.Random(args.seed), Path(tempfile.mkdtemp(prefix='saxgpt-bench-'))
data, nursery, rows, wholes = toy_data(folder/'data'), Nursery(), [], {}


def whole(variant, n=1):
    "A run that was never stopped"
    if (variant, n) not in wholes:
        wholes[variant, n] = out = folder/f'whole-{variant}-{n}'
        assert not any(r.wait() for r in begin(n, config_file(data, out, **VARIANTS[variant])))
    return wholes[variant, n]


def begin(n, words, traps=()): return nursery.ranks(n, *words, traps=traps) if n > 1 else [nursery.start(*words, traps=traps)]


def note(name, variant, n, kills, survived, worst):
    "A row of the table"
    rows.append(dict(kind=name, run=variant, processes=n, kills=kills, survived=survived, largest_loss_difference=worst))
    print(f'{name:42} {variant:8} {n:2} {kills:5} {survived:5}  {worst:g}', flush=True)


def compare(out, want):
    "Largest difference of a loss; whether all bytes are the same"
    said = differences(out, want)
    for line in said[:3]: print('   ', line, file=sys.stderr)
    return loss_difference(log_lines(out), log_lines(want)), not said


def kind(name, variant, hit, n=1):
    "Kill runs again and again by `hit(runs, out)`, which waits for its moment, until `--kills` have hit; the ends of the runs count"
    want, kills, survived, worst, i = whole(variant, n), 0, 0, 0., 0
    while kills < args.kills:
        out, mine, i = folder/f'{name}-{i}'.replace(' ', '-'), 0, i + 1
        words = config_file(data, out, **VARIANTS[variant])
        for _ in range(6):
            traps, act = hit()
            runs = begin(n, words, traps)
            if act: act(runs, out)
            ends = [r.wait() for r in runs]
            whole_checkpoints(out)
            if all(e == 0 for e in ends): break
            mine += 1
        assert not any(r.wait() for r in begin(n, words)), 'could not go on'
        gap, same = compare(out, want)
        kills, survived, worst = kills + mine, survived + mine*same, max(worst, gap)
        shutil.rmtree(out)
        if i > 10*args.kills: break
    note(name, variant, n, kills, survived, worst)


def at(where, sig, times=1, **more):
    "At the n-th call of a method of the trainer, or of what saves it, n by lot"
    owner = 'Saver' if where == 'save' else 'Trainer'
    return lambda: ([dict(at=f'{owner}.{where}', n=dice.randint(1, times), signal=sig, **more)], None)


def outside(sig, group=False):
    "At any time, from outside; steps are slowed down"
    def act(runs, out):
        time.sleep(dice.uniform(.02, .9))
        for r in runs if group else runs[:1]: r.kill(sig, group)
    return lambda: ([dict(at='Trainer.train_step', do='sleep', seconds=.01)], act)


def on_save(runs, out):
    "As soon as a temporary folder is seen"
    while all(r.poll() is None for r in runs):
        if (out/'checkpoints').exists() and any(p.startswith('.') for p in os.listdir(out/'checkpoints')): break
    time.sleep(dice.uniform(0, .003))
    for r in runs: r.kill(KILL)


def points():
    "Every file operation of a save that ends an epoch, is validated, best and kept"
    base, want, kills, survived, worst = folder/'base', whole('plain'), 0, 0, 0.
    nursery.start(*config_file(data, base), traps=[dict(at='Trainer.train_step', n=24, signal=KILL)]).wait()
    while True:
        out = folder/'point'
        shutil.copytree(base, out)
        words = config_file(data, out)
        if nursery.start(*words, traps=[dict(op=kills + 1, under=str(out))]).wait() == 0: break
        whole_checkpoints(out)
        assert nursery.start(*words).wait() == 0
        gap, same = compare(out, want)
        kills, survived, worst = kills + 1, survived + same, max(worst, gap)
        shutil.rmtree(out)
    note('SIGKILL at every file operation of a save', 'plain', 1, kills, survived, worst)


print(f'{"kind":42} {"run":8} {"n":>2} kills alive  largest loss difference')
try:
    points()
    kind('SIGKILL in a step', 'plain', at('train_step', KILL, 8))
    kind('SIGKILL in a step', 'workers', at('train_step', KILL, 8))
    kind('SIGKILL in a step', 'bf16', at('train_step', KILL, 5))
    kind('SIGKILL in a validation', 'plain', at('validate', KILL, 2))
    kind('SIGKILL at any time', 'plain', outside(KILL))
    kind('SIGKILL at any time, to all', 'workers', outside(KILL, True))
    kind('SIGKILL when a save is seen', 'plain', lambda: ([], on_save))
    kind('SIGTERM in a step', 'plain', at('train_step', TERM, 8))
    kind('SIGTERM in a step', 'workers', at('train_step', TERM, 8))
    kind('SIGTERM in a validation', 'bf16', at('validate', TERM, 2))
    kind('Ctrl-C, to all', 'workers', at('train_step', INT, 8, whom='group'))
    kind('Ctrl-C in a save', 'single', at('save', INT, 2))
    kind('SIGKILL of a rank in a step', 'plain', lambda: at('train_step', KILL, 6, rank=dice.randint(0, 1))(), 2)
    kind('SIGKILL of the writing rank in a save', 'plain', at('save', KILL, 2, rank=0), 2)
    kind('SIGTERM of one rank', 'workers', lambda: at('train_step', TERM, 6, rank=dice.randint(0, 1))(), 2)
finally:
    nursery.close()
    shutil.rmtree(folder, ignore_errors=True)
print(f'{"all":55}{sum(r["kills"] for r in rows):5} {sum(r["survived"] for r in rows):5}  {max(r["largest_loss_difference"] for r in rows):g}')
if args.json: Path(args.json).write_text(json.dumps(rows, indent=1) + '\n')
sys.exit(any(r['kills'] != r['survived'] for r in rows))
