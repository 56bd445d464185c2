"""A run that was stopped anywhere and started again ends like one that was never stopped, to the last bit: real processes, real signals.

`SAXGPT_KILLS=all` adds the long sweeps; tests/benchmarks/bench_kills.py counts kills and prints a table.
"""
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from kills import (VARIANTS, WARM, WARM_LAUNCHER, Nursery, bits, busy, config_file, differences, leftovers, log_lines, start, torchrun, toy_data,
                   whole_checkpoints)

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='needs fork and /proc')
INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
ALL = os.environ.get('SAXGPT_KILLS') == 'all'
END = {INT: 130, TERM: 143, KILL: -9}
RUNS = VARIANTS | dict(short=dict(num_epochs=2))                 # 16 steps
step, validate, save = 'Trainer.train_step', 'Trainer.validate', 'Saver.save'


@pytest.fixture(scope='module')
def nursery():
    n = Nursery()
    yield n
    n.close()


@pytest.fixture(scope='module')
def data(tmp_path_factory): return toy_data(tmp_path_factory.mktemp('codes'))


@pytest.fixture(scope='module')
def whole(nursery, data, tmp_path_factory):
    "Runs that were never stopped, by variant and number of processes"
    made, there = {}, tmp_path_factory.mktemp('whole')

    def get(variant='plain', n=1):
        if (variant, n) not in made:
            out = there/f'{variant}-{n}'
            args = config_file(data, out, **RUNS[variant])
            for r in [nursery.start(*args)] if n == 1 else nursery.ranks(n, *args): assert r.wait() == 0, r.said
            made[variant, n] = out
        return made[variant, n]
    return get


def check(out, whole):
    "What has to hold at any moment: no half checkpoint, no line of the log that a run without stops would not have"
    whole_checkpoints(out)
    want = log_lines(whole)
    for k, line in log_lines(out).items(): assert line == want[k], f'{k}: {line} instead of {want[k]}'


def clean(run):
    "No traceback, no orphans"
    assert 'Traceback' not in run.said, run.said
    assert not run.orphans(), run.orphans(0)


def finish(run, out, whole):
    assert run.wait() == 0, run.said
    clean(run)
    assert not differences(out, whole), differences(out, whole)


def all_of(jobs):
    "Wait for jobs that mostly wait themselves, several at a time; their complaints together"
    def try_call(label, job):
        try: job()
        except Exception as e: return f'{label}: {e}'
    with ThreadPoolExecutor(4) as pool: wrong = [w for w in pool.map(lambda j: try_call(*j), jobs.items()) if w]
    assert not wrong, f'{len(wrong)} of {len(jobs)}:\n' + '\n'.join(wrong[:6])


# one process

def test_never_stopped_gives_the_same_bits_twice(data, whole, tmp_path):
    run = start(tmp_path, *config_file(data, tmp_path/'out'))        # by the plain command
    finish(run, tmp_path/'out', whole())


cuts = [dict(at=step, n=2, signal=INT, after=True), dict(at=step, n=2, signal=TERM, whom='group', then=.3), dict(at=step, n=2, signal=KILL),
        dict(at=step, n=3, signal=TERM, after=True), dict(at=validate, n=1, signal=TERM), dict(at=validate, n=1, signal=KILL),
        dict(at=save, n=1, signal=KILL), dict(at=save, n=2, signal=KILL, after=True), dict(at=save, n=1, signal=INT, whom='group'),
        dict(at=validate, n=1, signal=INT, whom='group', after=True), dict(at=save, n=1, signal=TERM, after=True)]


@pytest.mark.parametrize('variant', VARIANTS)
def test_stopped_many_times(nursery, data, whole, tmp_path, variant):
    out, want = tmp_path/'out', whole(variant)
    args, hits = config_file(data, out, **VARIANTS[variant]), 0
    for trap in cuts:
        run = nursery.start(*args, traps=[trap])
        hits += (status := run.wait()) != 0
        assert status in (0, END[trap['signal']]), (trap, run.said)
        clean(run)
        check(out, want)
        if trap['signal'] != KILL: assert not leftovers(out)
    assert hits >= 8, f'only {hits} of {len(cuts)} signals came before the end'
    finish(nursery.start(*args), out, want)


@pytest.mark.parametrize('variant', ['plain', 'workers'])
def test_killed_from_outside_at_any_moment(nursery, data, whole, tmp_path, variant):
    "Steps are slowed down so that there are moments to choose from; some kills wait for the temporary folder of a save"
    out, want, dice = tmp_path/'out', whole(variant), random.Random(variant)
    args, slow = config_file(data, out, **VARIANTS[variant]), [dict(at=step, do='sleep', seconds=.01)]
    for i in range(30 if ALL else 6):
        run = nursery.start(*args, traps=slow)
        if i % 2: time.sleep(dice.uniform(.05, .8))
        else:
            checkpoints = out/'checkpoints'
            while run.poll() is None and not (checkpoints.exists() and any(n.startswith('.') for n in os.listdir(checkpoints))): time.sleep(.001)
            time.sleep(dice.uniform(0, .003))
        run.kill(group=dice.random() < .5)
        assert run.wait() in (0, -9), run.said
        assert not run.orphans()
        check(out, want)
    finish(nursery.start(*args), out, want)


def test_started_again_at_once(nursery, data, whole, tmp_path):
    "Loader processes outlive a killed run by some seconds; they do not keep its folder"
    out, want = tmp_path/'out', whole('workers')
    args = config_file(data, out, **VARIANTS['workers'])
    for _ in range(2):
        run = nursery.start(*args, traps=[dict(at=step, n=4, signal=KILL)])
        assert run.wait() == -9, run.said
    finish(nursery.start(*args), out, want)


def test_loader_process_killed(nursery, data, whole, tmp_path):
    "What a machine short of memory does first"
    out, gate = tmp_path/'out', tmp_path/'gate'
    args = config_file(data, out, num_workers=2)
    run = nursery.start(*args, traps=[dict(at=step, n=5, do='wait', gate=str(gate))])
    run.at_gate(gate)
    os.kill(max(run.family()), KILL)
    gate.touch()
    assert run.wait() == 2 and 'Traceback' not in run.said and 'num_workers' in run.lines[-1], run.said
    assert not run.orphans()
    finish(nursery.start(*args), out, whole())


# every crash point of a save

@pytest.fixture(scope='module')
def before_the_end(nursery, data, whole, tmp_path_factory):
    "A short run that was killed just before its last step, which ends an epoch, is validated, saved, best and kept"
    out = tmp_path_factory.mktemp('sweep')/'base'
    run = nursery.start(*config_file(data, out, **RUNS['short']), traps=[dict(at=step, n=16, signal=KILL)])
    assert run.wait() == -9, run.said
    return out


def at_crash_point(nursery, data, base, want, out, op, *more):
    "Kill at the op-th file operation, the next run at its own, and so on; then let one finish"
    shutil.copytree(base, out)
    args = config_file(data, out, **RUNS['short'])
    run = nursery.start(*args, traps=[dict(op=op, under=str(out))])
    status = run.wait()
    assert status == -9, run.said
    check(out, want)
    whole_names = whole_checkpoints(out).keys()
    assert whole_names & {'last', 'previous'}, f'operation {op}: nothing to go on from'
    put_back = {p.name for p in (out/'checkpoints').glob('.*+/*')}                            # by the next run
    assert whole_names | put_back >= whole_checkpoints(base).keys() - {'last', 'previous'}, f'operation {op}: a kept checkpoint is gone'
    for op in more:
        run = nursery.start(*args, traps=[dict(op=op, under=str(out))])
        assert run.wait() in (0, -9), run.said
        check(out, want)
    finish(nursery.start(*args), out, want)
    shutil.rmtree(out)


def operations(nursery, data, base, out):
    "What a run does to its files, from the base on: [kind, path]"
    shutil.copytree(base, out)
    run = nursery.start(*config_file(data, out, **RUNS['short']), traps=[dict(trace=str(out) + '.trace', under=str(out))])
    assert run.wait() == 0, run.said
    return [json.loads(l) for l in Path(str(out) + '.trace').read_text().splitlines()]


def test_every_crash_point_of_a_save(nursery, data, whole, before_the_end, tmp_path):
    ops, want = operations(nursery, data, before_the_end, tmp_path/'trace'), whole('short')
    n, seen = len(ops), {kind for kind, _ in ops}
    assert n > 20 and seen >= {'serialize', 'open', 'fsync', 'rename', 'link', 'remove'}, seen
    all_of({f'operation {op}': lambda op=op: at_crash_point(nursery, data, before_the_end, want, tmp_path/f'op{op}', op) for op in range(1, n + 1)})


def test_killed_again_while_tidying_up(nursery, data, whole, before_the_end, tmp_path):
    "The next run is killed at its first file operations, where it sweeps and puts back what was being replaced"
    ops, want = operations(nursery, data, before_the_end, tmp_path/'trace'), whole('short')
    moved = [i + 2 for i, (kind, p) in enumerate(ops) if kind == 'rename' and '+' in p]      # the old one is away, the new one not there yet
    assert moved
    points = [(op, k) for op in range(1, len(ops) + 1, 1 if ALL else 9) for k in ((1, 2, 5) if ALL else (2,))]
    points += [(op, k) for op in moved for k in range(1, 7)]
    all_of({f'operation {p}': lambda p=p: at_crash_point(nursery, data, before_the_end, want, tmp_path/f'op{p[0]}-{p[1]}', *p, 1) for p in points})


def test_a_power_cut_finds_on_disk_what_was_renamed(nursery, data, before_the_end, tmp_path):
    "Every file is pushed to the disk after it was written and before its folder gets a final name, the folder's own entry behind it"
    ops = operations(nursery, data, before_the_end, tmp_path/'trace')
    finals = [(i, p) for i, (kind, p) in enumerate(ops) if kind == 'rename' and p.count('/') == 1 and not Path(p).name.startswith('.')]
    assert finals
    made = {p.split('/')[1]: i for i, (kind, p) in enumerate(ops) if kind == 'mkdir' and p.startswith('checkpoints/.')}
    assert made
    for folder, at in made.items():
        written = {p for kind, p in ops if kind in ('open', 'serialize') and p.startswith(f'checkpoints/{folder}/')}
        written -= {p for kind, p in ops if kind == 'remove'}                                # tried, and taken away again
        for p in written:
            last_write = max(i for i, (kind, q) in enumerate(ops) if q == p and kind in ('open', 'serialize'))
            assert any(kind == 'fsync' and q == p for kind, q in ops[last_write:]), f'{p} is not pushed to the disk'
    for i, p in finals: assert ['fsync', 'checkpoints'] in ops[i:], f'the name {p} is not pushed to the disk'


# torn and tampered checkpoints

@pytest.fixture(scope='module')
def stopped(nursery, data, tmp_path_factory):
    "A run that was stopped some steps before its end, with `last` and `previous`"
    out = tmp_path_factory.mktemp('stopped')/'base'
    run = nursery.start(*config_file(data, out), traps=[dict(at=step, n=21, signal=TERM)])
    assert run.wait() == 143 and whole_checkpoints(out).keys() >= {'last', 'previous', 'step-16'}, run.said
    return out


def cut(p): p.write_bytes(p.read_bytes()[:p.stat().st_size//2])


def empty(p): p.write_bytes(b'')


def flip(p):
    b = bytearray(p.read_bytes())
    b[len(b)//2] ^= 1
    p.write_bytes(bytes(b))


def becomes_folder(p): p.unlink(); p.mkdir()


def becomes_pipe(p): p.unlink(); os.mkfifo(p)


def says(text): return lambda p: p.write_bytes(text if isinstance(text, bytes) else text.encode())


def adds(name): return lambda p: p.write_text(json.dumps(json.loads(p.read_text()) | {name: '0'*64}))


FILES = 'model.safetensors', 'trainer.safetensors', 'config.json', 'trainer.json', 'hashes.json'
HOSTILE = dict(null='null', list='[]', number='1e999', text='"model.safetensors"', deep='['*100_000, latin=b'\xff\xfe{}',
               up='{"../../../secret": "0"}', absolute='{"/etc/passwd": "0"}', device='{"/dev/zero": "0"}', empty='{}',
               nested='{"model.safetensors": {"model.safetensors": []}}')
torn = {f'{how.__name__} {f}': (f, how) for f in FILES for how in (cut, empty, flip, Path.unlink, becomes_folder)}
torn |= {f'hashes.json holds {k}': ('hashes.json', says(text)) for k, text in HOSTILE.items()}
torn |= {f'pipe {f}': (f, becomes_pipe) for f in ('hashes.json', 'model.safetensors')}
torn |= {f'hashes.json asks for {name}': ('hashes.json', adds(name)) for name in ('more.safetensors', '/dev/zero', '../previous/config.json')}


def torn_and_finished(nursery, data, base, want, out, name, how):
    shutil.copytree(base, out)
    how(out/'checkpoints'/'last'/name)
    run = nursery.start(*config_file(data, out))
    assert run.wait() == 0, run.said
    about = [l for l in run.lines if 'checkpoints/last' in l]
    assert len(about) == 1 and 'Traceback' not in run.said, run.said          # one line says so
    assert any('going on from' in l and 'previous' in l for l in run.lines), run.said
    assert not differences(out, want), differences(out, want)


def test_torn_or_tampered_is_noticed_and_the_one_before_is_used(nursery, data, whole, stopped, tmp_path):
    want = whole()
    all_of({label: lambda i=i, t=t: torn_and_finished(nursery, data, stopped, want, tmp_path/f't{i}', *t)
            for i, (label, t) in enumerate(torn.items())})


def test_two_torn_and_the_third_is_used(nursery, data, whole, stopped, tmp_path):
    out = tmp_path/'out'
    shutil.copytree(stopped, out)
    cut(out/'checkpoints'/'last'/'trainer.safetensors')
    (out/'checkpoints'/'previous'/'config.json').unlink()
    run = nursery.start(*config_file(data, out))
    finish(run, out, whole())
    assert [sum(f'checkpoints/{n}' in l for l in run.lines) for n in ('last', 'previous', 'step-16')] == [1, 1, 1], run.said


def test_torn_run_that_began_elsewhere(nursery, data, stopped, tmp_path):
    "With `resume_from_checkpoint` the run's own checkpoints go before it, and a torn one is not passed over in silence"
    out, want = tmp_path/'out', tmp_path/'want'
    begin = dict(resume_from_checkpoint=str(stopped/'checkpoints'/'step-8'))
    assert nursery.start(*config_file(data, want, **begin)).wait() == 0
    args = config_file(data, out, **begin)
    run = nursery.start(*args, traps=[dict(at=step, n=8, signal=TERM)])
    assert run.wait() == 143, run.said
    flip(out/'checkpoints'/'last'/'trainer.safetensors')
    run = nursery.start(*args)
    assert run.wait() == 0 and sum('checkpoints/last' in l for l in run.lines) == 1 and str(stopped) not in run.said, run.said
    assert not differences(out, want), differences(out, want)
    for p in (out/'checkpoints').glob('*/trainer.safetensors'): cut(p)
    run = nursery.start(*args)
    assert run.wait() == 2 and 'Traceback' not in run.said, f'all torn, and it began again from the other run:\n{run.said}'


def test_folder_that_is_none(nursery, data, whole, stopped, tmp_path):
    for label, how in dict(file=lambda p: p.write_text('last'), link=lambda p: p.symlink_to(tmp_path/'nowhere'), empty=Path.mkdir).items():
        out = tmp_path/label
        shutil.copytree(stopped, out)
        shutil.rmtree(out/'checkpoints'/'last')
        how(out/'checkpoints'/'last')
        finish(nursery.start(*config_file(data, out)), out, whole())


def test_no_whole_checkpoint_is_one_clear_error(nursery, data, stopped, tmp_path):
    out = tmp_path/'out'
    shutil.copytree(stopped, out)
    for p in (out/'checkpoints').glob('*/model.safetensors'): cut(p)
    before = {p: p.read_bytes() for p in out.rglob('*') if p.is_file() and p.name != '.lock'}
    for run in [nursery.start(*config_file(data, out))], nursery.ranks(2, *config_file(data, out)):
        assert run[0].wait() == 2, run[0].said
        assert 'Traceback' not in run[0].said and run[0].lines[-1].startswith('saxgpt: ') and 'checkpoints' in run[0].lines[-1], run[0].said
        for r in run[1:]: assert r.wait() not in (0, None) and 'Traceback' not in r.said, r.said
    assert before.items() <= {p: p.read_bytes() for p in out.rglob('*') if p.is_file()}.items(), 'nothing was thrown away'


# signals as terminals and clouds send them

@pytest.mark.parametrize('sig', [INT, TERM], ids=['ctrl-c', 'sigterm'])
def test_second_signal_leaves_at_once(nursery, data, whole, tmp_path, sig):
    out, gate = tmp_path/'out', tmp_path/'gate'
    args = config_file(data, out, num_workers=2)
    run = nursery.start(*args, traps=[dict(at=step, n=8, do='wait', gate=str(gate))])
    run.at_gate(gate)
    run.kill(sig, group=True)
    run.wait_for(lambda: 'once more' in run.said)
    time.sleep(1.2)                                              # sooner it may be the same Ctrl-C, handed on by a launcher
    began, slow = time.monotonic(), busy()
    run.kill(sig, group=True)
    assert run.wait() in (END[sig], -sig) and time.monotonic() - began < 3*max(slow, busy()), run.said
    clean(run)
    check(out, whole())
    finish(nursery.start(*args), out, whole())


@pytest.mark.parametrize('sig', [INT, TERM], ids=['ctrl-c', 'sigterm'])
def test_signal_while_the_program_starts(data, whole, tmp_path, sig):
    "In the first seconds Python is still importing"
    out = tmp_path/'out'
    args = config_file(data, out)

    def after(seconds):
        run = start(tmp_path, *args)
        run.awake()
        time.sleep(seconds)
        run.kill(sig, group=True)
        return seconds, run
    wrong = []
    for t in [.05, .2, .5, .9, 1.4] if not ALL else [.05 + i/30 for i in range(60)]:
        seconds, run = after(t)
        status = run.wait()
        if 'Traceback' in run.said or status not in (0, END[sig], -sig): wrong.append(f'after {t} s: status {status}, {run.said[-300:]}')
        assert not run.orphans()
        check(out, whole())
    assert not wrong, '\n'.join(wrong)
    finish(start(tmp_path, *args), out, whole())


# no space left

def small_disk(folder, megabytes):
    folder.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={megabytes}m', 'tmpfs', str(folder)], capture_output=True)
    return done.returncode == 0


@contextmanager
def stopped_on_small_disk(nursery, data, tmp_path):
    "A run that was stopped after step 11 in a folder of 8 MB: the disk, the run's folder, its command"
    disk = tmp_path/'disk'
    if not small_disk(disk, 8): pytest.skip('mounting needs rights')
    try:
        args = config_file(data, disk/'out')
        run = nursery.start(*args, traps=[dict(at=step, n=11, signal=TERM)])
        assert run.wait() == 143, run.said
        yield disk, disk/'out', args
    finally: subprocess.run(['umount', str(disk)])


def told(run, why):
    "One clear line for every attempt, the last one behind all else"
    assert run.wait() == 2 and 'Traceback' not in run.said, run.said
    said = [l for l in run.lines if why in l]
    assert said and run.lines[-1] == said[-1] and all(l.startswith('saxgpt: ') and '/out/' in l for l in said), run.said
    assert not run.orphans()


def test_no_space_left_on_a_small_disk(nursery, data, whole, tmp_path):
    with stopped_on_small_disk(nursery, data, tmp_path) as (disk, out, args):
        with open(disk/'ballast', 'wb') as f:                    # all but 150 kB: the log goes on, a checkpoint does not fit
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
            f.write(bytes(free - 150_000))
        before = whole_checkpoints(out)
        for _ in range(2):
            run = nursery.start(*args)
            told(run, 'No space left')
            check(out, whole())
            assert whole_checkpoints(out)['last'] == before['last'], 'the last checkpoint stays'
            assert not leftovers(out)
        (disk/'ballast').unlink()
        finish(nursery.start(*args), out, whole())


@pytest.mark.parametrize('size', [5000, 30_000, 150_000], ids=['not even the log', 'no weights', 'no moments'])
def test_files_that_cannot_grow(nursery, data, whole, tmp_path, size):
    "The operating system lets no file grow beyond a size (`ulimit -f`), which is how a quota looks"
    out = tmp_path/'out'
    args = config_file(data, out)
    run = nursery.start(*args, traps=[dict(at=step, n=13, do='limit', bytes=size)])
    told(run, 'File too large')
    check(out, whole())
    assert whole_checkpoints(out)['last'] == 10 and not leftovers(out)
    finish(nursery.start(*args), out, whole())


def test_no_space_left_for_words_either(nursery, data, whole, tmp_path):
    "The log of the command is on the same full disk"
    full, free = tmp_path/'full', tmp_path/'free'
    with stopped_on_small_disk(nursery, data, tmp_path) as (disk, out, args):
        with open(disk/'words', 'w') as f:
            traps = [dict(at=step, n=2, do='wait', gate=str(full)), dict(at=step, n=3, do='flood', lines=500),
                     dict(at=step, n=6, do='wait', gate=str(free))]
            run = start(tmp_path, *args, out=f, traps=traps, **WARM)
            run.at_gate(full)
            assert any(k[1] == 12 for k in log_lines(out))
            with open(disk/'ballast', 'wb', buffering=0) as b:
                try:
                    while True: b.write(bytes(4096))
                except OSError: pass
            full.touch()
            run.at_gate(free)
            (disk/'ballast').unlink()                            # somebody makes room: nothing but lines is lost
            free.touch()
            assert run.wait() == 0, (disk/'words').read_text()
        a, b = bits(out/'checkpoints'/'last'), bits(whole()/'checkpoints'/'last')
        assert a == b


def unread(pipe):
    "Bytes that wait in a pipe"
    n = bytearray(4)
    fcntl.ioctl(pipe, termios.FIONREAD, n)
    return int.from_bytes(n, sys.byteorder)


def test_nobody_reads_what_is_said(nursery, data, whole, tmp_path):
    "The pipe behind the command is full when SIGTERM comes, or its reader has gone"
    for case in 'slow', 'gone':
        out = tmp_path/case
        args = config_file(data, out)
        reader, writer = os.pipe()
        gate = tmp_path/f'{case}-gate'
        traps = [dict(at=step, n=4, do='wait', gate=str(gate)), dict(at=step, n=4, do='flood', lines=2000 if case == 'slow' else 1)]
        run = start(tmp_path, *args, out=writer, traps=traps, **WARM)
        os.close(writer)
        run.at_gate(gate)
        assert any(k[1] == 3 for k in log_lines(out))
        if case == 'slow':
            gate.touch()
            run.wait_for(lambda: unread(reader) > 60_000)        # it is in the middle of a write now
            run.kill(TERM)
            time.sleep(.3)
            said = b''
            while chunk := os.read(reader, 65536): said += chunk
            assert run.wait() == 143 and b'Traceback' not in said, said[-2000:]
            assert whole_checkpoints(out)['last'] >= 4
        os.close(reader)
        gate.touch()
        if case == 'gone': assert run.wait() in (0, 120)        # 120: the last words could not be flushed
        else: finish(nursery.start(*args), out, whole())
    assert not differences(out, whole()), differences(out, whole())


# two processes

def two_ranks_stopped(nursery, data, want, out, variant):
    args = config_file(data, out, **VARIANTS[variant])
    for trap in [dict(at=step, n=2, signal=TERM, rank=1), dict(at=step, n=2, signal=KILL, rank=1), dict(at=save, n=1, signal=KILL, rank=0),
                 dict(at=validate, n=1, signal=KILL, rank=1), dict(at=save, n=1, signal=KILL, rank=1, after=True),
                 dict(at=validate, n=1, signal=INT, rank=0)]:
        ranks = nursery.ranks(2, *args, traps=[trap])
        began, slow = time.monotonic(), busy()
        ends = [r.wait() for r in ranks]
        took = time.monotonic() - began
        assert took < 15*max(slow, busy()), f'{trap} took {took:.0f} s'
        if trap['signal'] == KILL: assert ends[trap['rank']] == -9 and ends[1 - trap['rank']] not in (0, 130, 143), (trap, ends)
        else: assert set(ends) <= {130, 143}, (trap, ends, ranks[0].said, ranks[1].said)
        check(out, want)
    assert not any(r.orphans() for r in ranks)
    for r in nursery.ranks(2, *args): assert r.wait() == 0, r.said
    assert not differences(out, want), differences(out, want)


def test_two_ranks_stopped_in_every_way(nursery, data, whole, tmp_path):
    variants = VARIANTS if ALL else ('workers',)
    wants = {v: whole(v, 2) for v in variants}
    all_of({v: lambda v=v: two_ranks_stopped(nursery, data, wants[v], tmp_path/v, v) for v in variants})


def launched_and_signalled(data, want, folder, launcher):
    "Ctrl-C in a terminal, SIGTERM to the first process and to all, the end of the launcher: each saves and leaves, then the run goes on"
    folder.mkdir()
    out, mine = folder/'out', launcher is ddp
    args = config_file(data, out, num_workers=1)
    last = 0
    for case, (sig, group) in dict(terminal=(INT, True), spot=(TERM, False), service=(TERM, True), launcher=(KILL, False)).items():
        gate = folder/f'{case}-gate'
        run = launcher(folder, *args, traps=[dict(at=step, n=2, do='wait', gate=str(gate))])
        run.at_gate(gate)
        run.wait_for(lambda: any(k[1] > last for k in log_lines(out)))
        began, slow = time.monotonic(), busy()
        run.kill(sig, group)
        gate.touch()
        status = run.wait()
        left = run.orphans()
        took = time.monotonic() - began
        if left: run.end()
        assert not left and took < 15*max(slow, busy()), f'{case}: left behind after {took:.0f} s: {left}\n{run.said}'
        if mine: assert status == END[sig] and 'Traceback' not in run.said and 'Warning' not in run.said, f'{case}: status {status}\n{run.said}'
        now = whole_checkpoints(out).get('last', 0)
        assert now > last and 'stopped after step' in run.said and not leftovers(out), f'{case}: nothing was saved\n{run.said}'
        last = now
        check(out, want)
    run = launcher(folder, *args)
    assert run.wait() == 0, run.said
    assert not differences(out, want), differences(out, want)


def test_ctrl_c_twice_under_a_launcher(data, tmp_path):
    gates = [tmp_path/f'gate{r}' for r in range(2)]
    traps = [dict(at=step, n=3, rank=r, do='wait', gate=str(g)) for r, g in enumerate(gates)]
    run = ddp(tmp_path, *config_file(data, tmp_path/'out'), traps=traps)
    for g in gates: run.at_gate(g)
    assert len(log_lines(tmp_path/'out')) >= 2
    run.kill(INT, group=True)
    run.wait_for(lambda: 'once more' in run.said)
    time.sleep(1.5)
    began, slow = time.monotonic(), busy()
    run.kill(INT, group=True)
    assert run.wait() == 130 and time.monotonic() - began < 10*max(slow, busy()) and 'Traceback' not in run.said and not run.orphans(), run.said


def test_launcher_stopped_while_it_starts(data, tmp_path):
    def at(seconds):
        folder = tmp_path/str(seconds)
        folder.mkdir()
        run = start(folder, *config_file(data, folder/'out'), '--ddp', '--num-gpus', 2)          # by the plain command
        run.awake()
        time.sleep(seconds)
        run.kill(TERM)
        assert run.wait() in (0, 143, -15) and 'Traceback' not in run.said and not run.orphans(), run.said
        whole_checkpoints(folder/'out')
    all_of({f'after {s} s': lambda s=s: at(s) for s in ((.5, 1.5, 2.5, 3.5) if not ALL else [i/4 for i in range(1, 24)])})


def one_died(data, want, folder, launcher, trap, words, go_on):
    folder.mkdir()
    out = folder/'out'
    args = config_file(data, out)
    run = launcher(folder, *args, traps=[trap])
    status = run.wait()
    assert status not in (0, 130, 143), (trap, run.said)
    assert not run.orphans(), run.orphans(0)
    if launcher is ddp: assert all(w in run.lines[-1] for w in words), f'{words} not in the last line:\n{run.said}'
    check(out, want)
    if not go_on: return
    run = launcher(folder, *args)
    assert run.wait() == 0, run.said
    assert not differences(out, want), differences(out, want)


def ddp(folder, *args, traps=()): return start(folder, *args, '--ddp', '--num-gpus', 2, traps=traps, **WARM_LAUNCHER)


def trun(folder, *args, traps=()): return start(folder, *args, traps=traps, launcher=torchrun(2), **WARM_LAUNCHER)


def test_launchers_pass_on_signals(data, whole, tmp_path):
    want = whole('plain', 2)
    all_of({l.__name__: lambda l=l: launched_and_signalled(data, want, tmp_path/l.__name__, l) for l in (ddp, trun)})


def test_one_rank_dying_ends_all_with_its_error(data, whole, tmp_path):
    want = whole('plain', 2)
    cases = dict(killed=(dict(at=step, n=3, rank=1, signal=KILL), ['process 1', 'SIGKILL']),
                 error=(dict(at=step, n=3, rank=1, do='raise', text='the wind took it'), ['process 1', 'the wind took it']),
                 first=(dict(at=validate, n=1, rank=0, signal=KILL), ['process 0', 'SIGKILL']))
    all_of({f'{l.__name__}-{k}': lambda l=l, k=k, v=v: one_died(data, want, tmp_path/f'{l.__name__}-{k}', l, *v, ALL or k == 'killed') 
            for l in (ddp, trun) for k, v in cases.items() if ALL or l is ddp or k == 'killed'})


def test_torchrun_restarts_by_itself(data, whole, tmp_path):
    out, want = tmp_path/'out', whole('plain', 2)
    traps = [dict(at=step, n=7, rank=1, attempt=0, signal=KILL)] + [dict(at=save, n=1, rank=0, attempt=1, signal=KILL)]*ALL
    run = start(tmp_path, *config_file(data, out, num_workers=1), launcher=torchrun(2, '--max-restarts=2'), traps=traps, **WARM_LAUNCHER)
    assert run.wait() == 0, run.said
    assert run.said.count('going on from') == len(traps), run.said
    wrong = [d for d in differences(out, want) if 'num_workers' not in d]
    assert not run.orphans() and not wrong, wrong


def test_another_number_of_processes_goes_on_and_says_so(nursery, data, tmp_path):
    out = tmp_path/'out'
    args = config_file(data, out)
    ranks = nursery.ranks(2, *args, traps=[dict(at=step, n=5, signal=TERM, rank=0)])
    assert [r.wait() for r in ranks] == [143, 143], ranks[0].said
    one = nursery.start(*args)
    assert one.wait() == 0, one.said
    assert 'going on from' in one.said and any('process' in l and '2' in l and '1' in l for l in one.lines), f'nothing is said:\n{one.said}'
    seen = log_lines(out)
    assert all(('train', s) in seen for s in range(1, whole_checkpoints(out)['last'] + 1)), 'a step is missing'
    assert seen['train', max(s for k, s in seen if k == 'train')]['epoch'] == 3


# two at once

def test_second_run_in_the_same_folder_is_refused(nursery, data, whole, tmp_path):
    out, gate = tmp_path/'out', tmp_path/'gate'
    args = config_file(data, out)
    first = nursery.start(*args, traps=[dict(at=step, n=2, do='wait', gate=str(gate))])
    first.at_gate(gate)
    assert log_lines(out)
    second = nursery.start(*args)
    assert second.wait() == 2 and len(second.lines) == 1 and 'out' in second.said, second.said
    gate.touch()
    finish(first, out, whole())
