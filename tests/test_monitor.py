"The monitor as a person uses it: a process that watches while another one writes."
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from fakes import FakeGCS
from forks import warm
from saxgpt.ops.files import append_jsonl
from saxgpt.monitor import follow, live_widget, read_run, run_table, state


def env():
    at = {k: v for k, v in os.environ.items() if k not in ('DISPLAY', 'WAYLAND_DISPLAY', 'MPLBACKEND')} | dict(OMP_NUM_THREADS='1')
    return at | warm('saxgpt.monitor', 'matplotlib.pyplot')


# A run as its log sees it: torn lines, a kill, steps done twice, a stop, and a total that grew.
WRITER = '''
import sys, time
from pathlib import Path
from saxgpt.ops.files import append_jsonl
log = Path(sys.argv[1])/'metrics.jsonl'
def say(split, step, **more): append_jsonl(log, dict(step=step, epoch=step/10, split=split, seconds=step*2., **more))
def train(a, b):
    for i in range(a, b + 1, 10):
        say('train', i, loss=7 - i/100, codebooks=[7 - i/100 - k for k in range(4)], lr=1e-3, grad_norm=None, frames_per_s=100., skipped=0, data_wait=.01)
        time.sleep(.1)
time.sleep(.5)
about = dict(processes=1, device='cpu', parameters=3.9)
say('run', 0, event='start', total_steps=60, **about)
train(10, 30)
with open(log, 'a') as f: f.write('{"step": 40, "split": "tr')
time.sleep(.5)
say('run', 20, event='resume', total_steps=100, **about)
train(30, 60)
say('run', 60, event='stop')
time.sleep(1)
say('run', 60, event='resume', total_steps=100, **about)
train(70, 100)
say('val', 100, loss=6.1, codebooks=[6.1]*4)
time.sleep(.5)
say('run', 100, event='finish')
'''


def monitor(*args, **kw):
    return subprocess.Popen([sys.executable, '-m', 'saxgpt.monitor', *map(str, args)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env(), **kw)


def done(p):
    out, err = p.communicate(timeout=600)
    return p.returncode, out, err


def writer(folder): return subprocess.Popen([sys.executable, '-c', WRITER, folder], env=env())


def test_watch_waits_and_follows_through_kills_and_stops(tmp_path):
    watching = monitor('--watch', '--every', .05, f'training.output_dir={tmp_path}/run')
    assert watching.stdout.readline() == f'waiting for {tmp_path}/run/metrics.jsonl (Ctrl-C ends)\n'
    writing = writer(tmp_path/'run')
    status, out, err = done(watching)
    assert (status, err, writing.wait()) == (0, '', 0) and 'waiting' not in out
    assert 'of 60' in out and 'of 100' in out and 'stopped, the training command goes on from here; step 60 of 100' in out
    last = run_table(read_run(tmp_path/'run'))
    assert out.rstrip().endswith(last) and 'finished at step 100 of 100 (100 %)' in last and 'resumed 2 times' in last
    assert [int(l.split()[0]) for l in last.splitlines() if ' train ' in l] == [*range(30, 101, 10)]


def test_pictures_while_the_run_goes_on(tmp_path):
    from PIL import Image
    (tmp_path/'run').mkdir()
    writing, sizes = writer(tmp_path/'run'), []
    while writing.poll() is None:
        status, out, err = done(monitor('--dir', tmp_path/'run', '--plot', '--output', tmp_path/'p.png'))
        assert status in (0, 2) and 'Traceback' not in err
        if status: assert err.count('\n') == 1 and not (tmp_path/'p.png').exists(), err
        else: sizes.append(Image.open(tmp_path/'p.png').size)
    assert sizes and set(sizes) == {(1650, 825)} and sorted(p.name for p in tmp_path.iterdir()) == ['p.png', 'run']


def test_a_terminal_gets_one_table_in_place_and_ctrl_c_ends(tmp_path):
    append_jsonl(tmp_path/'metrics.jsonl', dict(step=0, split='run', event='start', total_steps=10, processes=1))
    mine, theirs = pty.openpty()
    p = subprocess.Popen([sys.executable, '-m', 'saxgpt.monitor', '--watch', '--every', '.05', '--dir', str(tmp_path)], env=env() | dict(COLUMNS='50'),
                         stdout=theirs, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    os.close(theirs)
    out = b''
    def until(what):
        nonlocal out
        end = time.monotonic() + 30
        while what not in out:
            assert time.monotonic() < end and p.poll() is None, out
            out += os.read(mine, 10_000)
    until(b'for scale')
    append_jsonl(tmp_path/'metrics.jsonl', dict(step=5, epoch=1, split='train', loss=7.1, codebooks=[7.1]*4, seconds=1, lr=.1, frames_per_s=1e5, grad_norm=1))
    until(b'step 5 of 10')
    assert out.count(b'\x1b[H\x1b[J') == 2
    assert all(len(l) <= 50 for l in out.decode().splitlines() if l.startswith(' '))
    p.send_signal(signal.SIGINT)
    assert p.wait(600) == 0 and p.stderr.read() == ''


def test_live_without_a_screen_is_one_line(tmp_path):
    append_jsonl(tmp_path/'metrics.jsonl', dict(step=1, split='train', loss=3.))
    status, out, err = done(monitor('--live', '--dir', tmp_path))
    assert (status, out) == (2, '') and err.count('\n') == 1 and '--watch' in err, err


def test_a_widget_follows_the_run_and_stops(tmp_path):
    def wait_for(f):
        end = time.monotonic() + 30
        while not f():
            assert time.monotonic() < end
            time.sleep(.02)
    image, button = live_widget(tmp_path, every=.02).children
    empty = image.value
    append_jsonl(tmp_path/'metrics.jsonl', dict(step=1, split='train', loss=3., codebooks=[3.]))
    wait_for(lambda: image.value != empty)
    assert empty[:4] == image.value[:4] == b'\x89PNG' and not button.disabled
    append_jsonl(tmp_path/'metrics.jsonl', dict(step=1, split='run', event='finish'))
    wait_for(lambda: button.disabled)
    other = live_widget(tmp_path/'other', every=.02).children[1]
    other.click()
    assert other.disabled


def test_a_log_in_a_bucket(monkeypatch, capsys):
    pytest.importorskip('gcsfs')
    from saxgpt.ops import remote
    monkeypatch.setattr(remote, 'WAITS', (.01,))
    line = dict(split='train', loss=7., codebooks=[7.]*4, epoch=0, seconds=1)
    text = ''
    def write(**more):
        nonlocal text
        text += json.dumps(line | more) + '\n'
        gcs.put('bucket', 'run/metrics.jsonl', text.encode())
    def lost(): gcs.fail('metrics', times=50)
    def found():
        gcs.faults.clear()
        write(step=20, split='run', event='finish')
    with FakeGCS('bucket') as gcs:
        steps = iter([lambda: write(step=0, split='run', event='start', total_steps=20, processes=1), lambda: write(step=10), lost, found])
        seen = []
        assert follow(read_run('gs://bucket/run'), lambda r: seen.append((state(r), r.latest('step'))), pause=lambda s: next(steps)())
        assert [s for s, _ in seen] == ['waiting', 'running', 'running', 'finished']
        assert 'no answer from the bucket' in capsys.readouterr().err
        status, out, err = done(monitor('--dir', 'gs://bucket/run/'))
        assert status == 0 and 'finished at step 20' in out, err
        status, out, err = done(monitor('--dir', 'gs://bucket/no', '--plot'))
        assert status == 2 and err.count('\n') == 1 and 'gs://bucket/no/metrics.jsonl' in err, err
