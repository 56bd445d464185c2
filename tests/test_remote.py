"Buckets, with what needs processes and signals: gcsfs itself against a fake of Google's server on this machine."
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from fakes import FakeGCS
from forks import warm
from saxgpt.ops import remote
from saxgpt.ops.files import atomic_dir, file_hash
from saxgpt.ops.remote import RemoteError, RemoteMissing, download, fetch, list_names, put, read_text, remove
from saxgpt.training import run_sync
from saxgpt.training.checkpoint import CheckpointError, verify
from saxgpt.training.run_sync import RunSync, fetch_checkpoint, read_pointer, step_of

pytest.importorskip('gcsfs')
MB = 1 << 20


@pytest.fixture
def gcs(monkeypatch):
    monkeypatch.setattr(remote, 'WAITS', (.02,)*6)
    remote._said.clear()
    with FakeGCS('bucket') as gcs: yield gcs
    remote._store.cache_clear()


def save(folder, step, size=MB // 4):
    "A checkpoint that is made up, but whole."
    about = dict(format=1, config={}, step=step, codec_name='mel-rvq', codec_hash='0', metrics={}, versions={})
    with atomic_dir(folder) as t:
        (t/'model.safetensors').write_bytes(random.Random(step).randbytes(size))
        (t/'trainer.safetensors').write_bytes(random.Random(-step).randbytes(size))
        (t/'config.json').write_text(json.dumps(about))
        (t/'hashes.json').write_text(json.dumps({p.name: file_hash(p) for p in sorted(t.iterdir())}))


def start(code, cache, *args):
    "A process of its own that runs `code`."
    env = os.environ | warm('saxgpt.training.run_sync', 'gcsfs') | dict(SAXGPT_CACHE=str(cache), PYTHONPATH=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def wait_for(ready, seconds=60):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, 'this does not happen'
        time.sleep(.005)


FETCH = 'import sys\nfrom saxgpt.ops.remote import fetch\nprint(fetch(sys.argv[1]))'


@contextmanager
def slow(gcs, seconds):
    gcs.seconds = seconds
    yield
    gcs.seconds = 0


@pytest.mark.parametrize('size', [0, 1, 300_000, 16*MB, 37*MB + 5])
def test_what_goes_up_comes_down(gcs, tmp_path, size):
    data = random.Random(size).randbytes(size)
    (tmp_path/'a').write_bytes(data)
    put(tmp_path/'a', 'gs://bucket/dir/a b#1?%2F.bin')
    assert gcs.keys('bucket') == ['dir/a b#1?%2F.bin'] and gcs.data('bucket', 'dir/a b#1?%2F.bin') == data
    assert fetch('gs://bucket/dir/a b#1?%2F.bin', tmp_path/'cache').read_bytes() == data
    put(data, 'gs://bucket/b')
    assert gcs.data('bucket', 'b') == data


@pytest.mark.parametrize('seed', range(4))
def test_a_lost_connection_costs_nothing_but_time(gcs, tmp_path, seed, capfd):
    "Cut at random places, down and up, answers lost too; byte for byte the same, and not all of it sent again."
    dice, data = random.Random(seed), random.Random(seed).randbytes(33*MB)
    (tmp_path/'a').write_bytes(data)
    for _ in range(3): gcs.cut('POST .*upload_id|POST .*multipart', after=dice.randrange(8*MB))
    gcs.lose('POST .*upload')
    put(tmp_path/'a', 'gs://bucket/a')
    assert gcs.data('bucket', 'a') == data and gcs.count('POST .*uploadType=resumable$') <= 2
    for _ in range(3): gcs.cut('GET /download', after=dice.randrange(16*MB))
    gcs.lose('GET /storage')
    download('gs://bucket/a', tmp_path/'b')
    assert (tmp_path/'b').read_bytes() == data and gcs.count('GET /download') == 3 + 3
    err = capfd.readouterr().err
    assert err.count('\n') == 1 and 'saxgpt: gs://bucket: no answer' in err, err


def test_an_upload_that_the_server_forgets_starts_again(gcs, tmp_path):
    (tmp_path/'a').write_bytes(data := random.Random(1).randbytes(20*MB))
    with slow(gcs, .001):
        t = threading.Thread(target=put, args=(tmp_path/'a', 'gs://bucket/a'))
        t.start()
        wait_for(lambda: any(len(s['data']) for s in gcs.sessions.values()))
        gcs.sessions.clear()
        t.join()
    assert gcs.data('bucket', 'a') == data


@pytest.mark.parametrize('status', [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again_and_one_line_says_so(gcs, tmp_path, status, capfd):
    gcs.put('bucket', 'a', b'hello')
    before = random.getstate()
    gcs.fail(status=status, times=4)
    assert read_text('gs://bucket/a') == 'hello' and gcs.count('GET') == 5
    assert random.getstate() == before, 'the dice of the training run were thrown'
    err = capfd.readouterr().err
    assert err.count('\n') == 1 and 'trying again' in err, err


def test_it_gives_up_in_the_end(gcs, capfd):
    gcs.fail(times=1000)
    with pytest.raises(RemoteError, match='gs://bucket/a: no answer from the bucket .status 503'): read_text('gs://bucket/a')
    gcs.server.server_close()
    gcs.server.shutdown()
    with pytest.raises(RemoteError, match='gs://bucket/a: no answer'): read_text('gs://bucket/a')
    assert capfd.readouterr().err.count('\n') == 1


@pytest.mark.parametrize('url,said', [
    ('gs://bucket/none', 'no such object'), ('gs://bukcet/a', 'no bucket gs://bukcet'), ('gs:/bucket/a', 'gs://BUCKET'),
    ('s3://bucket/a', 'gs://BUCKET'), ('gss://bucket/a', 'gs://BUCKET'), ('gs://bucket/folder', 'is a folder'), ('gs://bucket', 'is a folder'),
])
def test_mistakes_are_one_line_at_once(gcs, tmp_path, url, said, capfd):
    gcs.put('bucket', 'folder/x', b'')
    with pytest.raises(RemoteError, match=said) as e: fetch(url, tmp_path)
    assert '\n' not in str(e.value) and str(e.value).startswith(url) and capfd.readouterr().err == ''
    if 'bukcet' in url:
        for do in (lambda: put(b'', url), lambda: list_names(url)):
            with pytest.raises(RemoteMissing, match=said): do()


@pytest.mark.parametrize('status,said', [(403, 'this login may not'), (401, 'not logged in'), (400, 'a fault')])
def test_a_refusal_is_not_tried_again(gcs, status, said, capfd):
    gcs.fail('POST', status, times=100)
    with pytest.raises(RemoteError, match=f'gs://bucket/a: .*{said}'): put(b'x', 'gs://bucket/a')
    assert gcs.count('POST') == 1 and capfd.readouterr().err == ''


def test_long_listings_come_in_pages(gcs):
    gcs.page = 3
    for i in range(10): gcs.put('bucket', f'run/{i}', b''), gcs.put('bucket', f'run/folder-{i}/x', b'')
    assert list_names('gs://bucket/run') == sorted([str(i) for i in range(10)] + [f'folder-{i}' for i in range(10)])
    remove('gs://bucket/run')
    assert gcs.keys('bucket') == []
    with pytest.raises(RemoteError, match='a whole bucket'): remove('gs://bucket/')


def test_a_login_that_is_none(tmp_path, monkeypatch):
    monkeypatch.delenv('STORAGE_EMULATOR_HOST', raising=False)
    monkeypatch.setenv('GOOGLE_APPLICATION_CREDENTIALS', str(tmp_path/'key.json'))
    remote._store.cache_clear()
    with pytest.raises(RemoteError, match='GOOGLE_APPLICATION_CREDENTIALS: .*key.json.*log in with'): read_text('gs://bucket/a')
    (tmp_path/'key.json').write_text('{"type": "nonsense"}')
    with pytest.raises(RemoteError, match='log in with'): read_text('gs://bucket/a')


def test_a_reader_sees_the_old_object_or_the_new_one(gcs, tmp_path):
    old, new = b'a'*300_000, b'b'*(17*MB)
    gcs.put('bucket', 'a', old)
    (tmp_path/'new').write_bytes(new)
    seen = []
    with slow(gcs, .002):
        t = threading.Thread(target=put, args=(tmp_path/'new', 'gs://bucket/a'))
        t.start()
        while t.is_alive(): seen.append(read_text('gs://bucket/a').encode())
    seen.append(read_text('gs://bucket/a').encode())
    assert len(seen) > 2 and seen[0] == old and seen[-1] == new and all(s in (old, new) for s in seen)


def test_an_object_that_is_replaced_during_the_download_is_not_mixed(gcs, tmp_path):
    old, new = b'a'*(40*MB), b'b'*(35*MB)
    gcs.put('bucket', 'a', old)
    with slow(gcs, .002):
        t = threading.Thread(target=download, args=('gs://bucket/a', tmp_path/'a'))
        t.start()
        wait_for(lambda: gcs.count('GET /download') > 1)
        gcs.put('bucket', 'a', new)
        t.join()
    assert (tmp_path/'a').read_bytes() == new


def test_what_was_garbled_on_the_way_is_refused(gcs, tmp_path, monkeypatch):
    gcs.put('bucket', 'a', b'a'*1000)
    monkeypatch.setattr(gcs, 'about', lambda b, k, about=gcs.about: about(b, k) | dict(md5Hash='AAAAAAAAAAAAAAAAAAAAAA=='))
    with pytest.raises(RemoteError, match='not what the store has noted'): download('gs://bucket/a', tmp_path/'a')
    assert list(tmp_path.iterdir()) == []


def test_processes_that_want_the_same_file_download_it_once(gcs, tmp_path):
    gcs.put('bucket', 'data.bin', random.Random(0).randbytes(5*MB))
    with slow(gcs, .01):
        out = [p.communicate() for p in [start(FETCH, tmp_path, 'gs://bucket/data.bin') for _ in range(3)]]
    assert {e for _, e in out} == {''} and len({o for o, _ in out}) == 1, out
    assert gcs.count('GET /download') == 1 and Path(out[0][0].strip()).read_bytes() == gcs.data('bucket', 'data.bin')


def test_a_forked_process_fetches_too(gcs, tmp_path):
    gcs.put('bucket', 'a', b'a')
    code = ('import os, sys\nfrom saxgpt.ops.remote import fetch\nfetch("gs://bucket/a")\npid = os.fork()\n'
            'if not pid: print(fetch("gs://bucket/b").read_text(), flush=True); os._exit(0)\nos.waitpid(pid, 0)')
    gcs.put('bucket', 'b', b'hello')
    assert start(code, tmp_path).communicate(timeout=600) == ('hello\n', '')


def test_a_download_that_is_killed_leaves_nothing_half(gcs, tmp_path):
    gcs.put('bucket', 'data.bin', data := random.Random(0).randbytes(40*MB))
    with slow(gcs, .002):
        p = start(FETCH, tmp_path, 'gs://bucket/data.bin')
        wait_for(lambda: gcs.count('GET /download') == 2)
        p.kill()
        p.wait()
    assert [p for p in tmp_path.rglob('data.bin') if not p.parent.name.startswith('.')] == []      # what is half lies where the next run sweeps
    out, err = start(FETCH, tmp_path, 'gs://bucket/data.bin').communicate()
    assert Path(out.strip()).read_bytes() == data and err == ''
    assert [f.name for f in tmp_path.rglob('*data.bin')] == ['data.bin'], 'what the killed one left is still there'


RUN = '''
import sys
from saxgpt.training.run_sync import RunSync
from test_remote import save
m = RunSync('gs://bucket/run')
m.pull()
for step in (100, 200):
    save(m.here/'last', step, 11 << 19)
    (m.folder/'metrics.jsonl').write_text('{"step": %d}\\n' % step)
    m.push(*['step-200'] if step == 200 else [])
    m.logged()
    if step == 100: m.close()
    print(step, flush=True)
m.close()
'''


def pointers(gcs):
    names = [n[:-5] for n in list_names('gs://bucket/run/checkpoints') if n.endswith('.json')]
    return {n: step_of(read_pointer(f'gs://bucket/run/checkpoints/{n}')) for n in names}


def folders(gcs): return {k.split('/')[2] for k in gcs.keys('bucket') if '/at-' in k}


@pytest.mark.parametrize('after', range(1, 11))
def test_a_run_that_is_killed_while_it_uploads(gcs, tmp_path, after):
    "Killed at one request after another: the bucket always holds a whole checkpoint, and the next start clears up."
    p = start(RUN, tmp_path/'one')
    assert p.stdout.readline() == '100\n', p.communicate()
    uploads = lambda: gcs.count('POST|DELETE')
    begun = uploads()
    gcs.seconds = .001
    wait_for(lambda: uploads() >= begun + after or p.poll() is not None)
    p.send_signal(signal.SIGKILL)
    p.communicate()
    gcs.seconds = 0
    kept = verify(fetch_checkpoint('gs://bucket/run/checkpoints/last', tmp_path/'cache'))['step']
    assert kept in (100, 200)

    def machine(name):
        os.environ['SAXGPT_CACHE'] = str(tmp_path/name)
        m = RunSync('gs://bucket/run')
        m.pull()
        m.close()
        return m
    try:
        m = machine('two')
        assert verify(m.here/'last')['step'] == kept
        assert folders(gcs) == set(m.pointers.values()), 'what was half uploaded is still there'
        m = machine('one')                      # the machine itself comes back: what it had saved is not lost
        assert verify(m.here/'last')['step'] == 200
        assert pointers(gcs)['last'] == 200 and len(folders(gcs)) == len(set(m.pointers.values())) == 2
    finally: del os.environ['SAXGPT_CACHE']


def test_a_reader_follows_a_run_that_moves_on(gcs, tmp_path, monkeypatch):
    "Two saves delete the checkpoint that is being fetched; the one that `last` stands for by then is fetched instead."
    monkeypatch.setenv('SAXGPT_CACHE', str(tmp_path/'run'))
    m, step = RunSync('gs://bucket/run'), 0
    m.pull()
    def train():
        nonlocal step
        save(m.here/'last', step := step + 1, 1000)
        m.push()
        m.saves.close()
    for slow_file in ('config', 'model', 'trainer'):
        train()
        def late(url, path):
            if slow_file in url and where in url: train(), train()
            return download(url, path)
        where = read_pointer('gs://bucket/run/checkpoints/last')
        monkeypatch.setattr(run_sync, 'download', late)
        got = fetch_checkpoint('gs://bucket/run/checkpoints/last', tmp_path/'cache')
        assert verify(got)['step'] == step
    m.close()
    assert step == 9 and len(list((tmp_path/'cache').glob('*/at-*'))) == 2, 'the cache keeps two'


def test_steps_go_on_while_the_line_stands_still(gcs, tmp_path, monkeypatch):
    monkeypatch.setenv('SAXGPT_CACHE', str(tmp_path))
    m = RunSync('gs://bucket/run')
    m.pull()
    save(m.here/'last', 1, 30*MB)
    gcs.gate.clear()
    begun = time.perf_counter()
    m.push('best')
    m.logged()
    took = time.perf_counter() - begun
    save(m.here/'last', 2)                      # `last` is replaced under the upload
    assert m.waiting and not gcs.count('POST .*at-1')
    gcs.gate.set()
    m.close()
    assert took < .5 and pointers(gcs) == dict(last=1, best=1)
    assert verify(fetch_checkpoint('gs://bucket/run/checkpoints/best', tmp_path/'c'))['step'] == 1


def test_a_bucket_that_cannot_be_written_is_told_before_the_training(gcs, tmp_path, monkeypatch):
    monkeypatch.setenv('SAXGPT_CACHE', str(tmp_path))
    gcs.fail('POST', 403, times=100)
    with pytest.raises(RemoteError, match='gs://bucket/run/run.json: this login may not'): RunSync('gs://bucket/run').pull()
    gcs.faults.clear()
    with pytest.raises(RemoteError, match='there is no bucket gs://bukcet'): RunSync('gs://bukcet/run').pull()


@pytest.mark.parametrize('seed', range(3))
def test_a_run_on_a_bad_line(gcs, tmp_path, monkeypatch, seed, capfd):
    "Every few requests one fails, is cut or is answered to nobody; in the end all is as it should be."
    monkeypatch.setenv('SAXGPT_CACHE', str(tmp_path/'one'))
    monkeypatch.setattr(remote, 'WAITS', (.005,)*200)     # more than there are faults
    dice, m, best = random.Random(seed), RunSync('gs://bucket/run'), 0
    m.pull()
    for step in range(1, 13):
        save(m.here/'last', step, 6*MB if step % 4 == 0 else 1000)
        for fault in (gcs.fail, gcs.lose, lambda m: gcs.cut(m, dice.randrange(3*MB))):
            for _ in range(dice.randrange(4)): fault(dice.choice(['GET', 'POST', 'DELETE', 'json', 'model', 'upload_id']))
        best = step if dice.random() < .3 else best
        m.push(*['best'] if best == step else [])
        m.logged()
        if dice.random() < .5: m.saves.close()
    (m.folder/'metrics.jsonl').write_text('the end')
    m.close()
    gcs.faults.clear()
    assert pointers(gcs)['last'] == 12 and pointers(gcs).get('best', 0) == best and read_text('gs://bucket/run/metrics.jsonl') == 'the end'
    assert folders(gcs) == set(m.pointers.values()) and list(m.snapshots.iterdir()) == []
    for name in m.pointers: verify(fetch_checkpoint(f'gs://bucket/run/checkpoints/{name}', tmp_path/'cache'))
    monkeypatch.setenv('SAXGPT_CACHE', str(tmp_path/'two'))
    n = RunSync('gs://bucket/run')
    n.pull()
    n.close()
    assert verify(n.here/'last')['step'] == 12 and 'Traceback' not in capfd.readouterr().err


def test_every_checkpoint_in_the_bucket_may_be_torn(gcs, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv('SAXGPT_CACHE', str(tmp_path/'one'))
    m = RunSync('gs://bucket/run')
    m.pull()
    for step in (1, 2, 3):
        save(m.here/'last', step)
        m.push(*['step-1'] if step == 1 else [])
        m.saves.close()
    m.close()
    monkeypatch.setenv('SAXGPT_CACHE', str(tmp_path/'two'))
    def newest():
        n = RunSync('gs://bucket/run')
        n.pull()
        step = verify(n.here/'last')['step'] if (n.here/'last').exists() else None
        n.close()
        return step
    names = {step_of(f): f for f in folders(gcs)}
    expect = {3: 2, 2: 1, 1: None}
    for step in (3, 2, 1):
        gcs.put('bucket', f'run/checkpoints/{names[step]}/trainer.safetensors', b'torn')
        monkeypatch.setenv('SAXGPT_CACHE', str(tmp_path/f'after-{step}'))
        assert newest() == expect[step]
        assert 'trying the one before' in capfd.readouterr().err
    with pytest.raises(CheckpointError, match='torn or was changed'): fetch_checkpoint('gs://bucket/run/checkpoints/step-1', tmp_path/'cache')
    assert list((tmp_path/'cache').rglob('model.safetensors')) == []
