"The data stages as a person meets them: recordings good and bad, real processes, real signals, real disks."
import ctypes
import functools
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
import yaml

from forks import first, warm
from kills import busy
from saxgpt.codecs.load import load_codec
from saxgpt.codecs.bundled import MelCodec
from saxgpt.config import DataConfig, load_config
from saxgpt.data.dataset import CodesDataset
from saxgpt.demo import make_corpus, tiny_demucs
from saxgpt.ops.files import read_jsonl
from saxgpt.pipeline import STAGES, run_pipeline

cold = dict(os.environ, OMP_NUM_THREADS='1')
env = cold | warm('saxgpt.pipeline', *(f'saxgpt.data.{s}' for s in ('download', 'stems', 'segments', 'augment', 'codes', 'splits')), 'av', 'demucs.api',
                  'librosa', 'scipy.signal', 'torch._dynamo', family=True)
torch.set_num_threads(1)
PATHS = dict(dl_dir='1_download', stems_dir='2_stems', metadata_path='3_metadata.csv', clips_dir='4_clips', aug_dir='5_aug_clips', codes_dir='6_codes',
             datasets_dir='7_datasets')
# A new stage: its folder here, its settings in CHANGES, and switched on in `config`, since the kill test waits for every stage to write.
FOLDER = dict(download='1_download', stems='2_stems', segments='4_clips', augment='5_aug_clips', codes='6_codes', dataset='7_datasets')
assert tuple(FOLDER) == STAGES
SPLITS = 'train', 'val', 'test'


# commands, and what they leave

def config(d, source, repo=None, **sections):
    "A configuration file: from `source` to datasets in `d`, over short segments."
    values = dict(source=source and str(source), data_paths={k: str(d/v) for k, v in PATHS.items()},
                  demucs=dict(n_splits=1, n_shifts=1, lead='other') | (dict(repo=str(repo), model=tiny_demucs(repo)) if repo else {}),
                  rms_window=dict(rms_threshold=.002, min_segment_seconds=3., rms_frame_length_seconds=1., rms_stride_seconds=.2),
                  augmentation=dict(semitone_steps=[2], tempo_ratios=[.9], n_fft=1024, hop_length=256),
                  train_test_split=dict(seed=1, test=.3, val=.3), dataset=dict(seq_len=100, stride=50))
    for k, v in sections.items(): values[k] = values.get(k, {}) | v if isinstance(v, dict) else v
    path = Path(d).with_name(f'{Path(d).name}.yaml')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


def command(config, *args): return [sys.executable, '-m', 'saxgpt.pipeline', '--config', str(config), *map(str, args)]


def pipeline(config, *args, ok=True, **kw):
    "Run the pipeline to its end, or to its error."
    r = subprocess.run(command(config, *args), capture_output=True, text=True, **dict(env=env) | kw)
    if ok: assert r.returncode == 0, r.stderr
    return r


def said(r):
    "What a command said on stderr beside its progress bars; every line of it is the house's own."
    lines = [l for l in re.split('[\r\n]+', r.stderr) if l.strip() and not re.search(r'it/s|s/it|\d+%\|', l)]
    assert all(l.startswith('saxgpt: ') for l in lines), r.stderr
    return lines


def hashes(folder):
    "Every file of a folder, except locks and notes, by content."
    files = sorted(p for p in Path(folder).rglob('*') if p.is_file() and p.name not in ('.lock', 'tidied.json'))
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def look(folder):
    "Every file of a folder, except locks, with its time and size; half-made ones too."
    out = set()
    for root, _, files in os.walk(folder):
        for f in files:
            try: s = os.lstat(os.path.join(root, f))
            except FileNotFoundError: continue
            if f != '.lock': out.add((os.path.relpath(os.path.join(root, f), folder), s.st_mtime_ns, s.st_size))
    return out


def temporary(name): return re.search(r'(^|/)\.\d+-[0-9a-f]{6}-', str(name))


def temporaries(folder): return [p for p in Path(folder).rglob('.*') if temporary(p)]


def in_datasets(d):
    "Ids of the recordings in the three datasets of `d`."
    return {c['recording'] for s in SPLITS for c in CodesDataset(Path(d)/f'7_datasets/{s}.safetensors').clips}


def group(pid):
    "Living processes of the process group `pid`, from /proc."
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try: state, _, pgrp = stat.read_text().rpartition(')')[2].split()[:3]
        except (OSError, ValueError): continue
        if int(pgrp) == pid and state not in 'ZX': found.append(int(stat.parent.name))
    return found


# recordings

@pytest.fixture(scope='session')
def music(tmp_path_factory):
    "Two recordings of the demo corpus: [(lead, backing), ...] at 32 kHz."
    folders = make_corpus(tmp_path_factory.mktemp('music')/'corpus', 2, seed=5, n_jobs=1, progress=False)
    return [tuple(sf.read(f/f'{k}.wav', dtype='float32')[0] for k in ('lead', 'backing')) for f in folders]


def piece(music, i, seconds):
    "The `i`-th stretch of music that is like no other: lead, backing."
    lead, backing = music[i % 2]
    a = 32000*(3 + 7*(i//2))
    return lead[a:a + int(32000*seconds)], backing[a:a + int(32000*seconds)]


def write(path, x, sr=32000):
    "Mono sound as a file of any kind: m4a by FFmpeg, the others by libsndfile."
    if path.suffix != '.m4a': return sf.write(path, x, sr, **dict(format='OGG', subtype='OPUS') if path.suffix == '.opus' else {})
    import av
    with av.open(str(path), 'w') as c:
        stream = c.add_stream('aac', rate=sr, layout='mono')
        for i in range(0, len(x), 1024):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(x[None, i:i + 1024], 'f4'), 'fltp', 'mono')
            frame.sample_rate, frame.pts = sr, i
            c.mux(stream.encode(frame))
        c.mux(stream.encode(None))


def write_stems(folder, lead, backing, sr=32000, suffix='.wav'):
    folder.mkdir(parents=True)
    for k, x in dict(lead=lead, backing=backing).items(): sf.write(folder/f'{k}{suffix}', x, sr)


@pytest.fixture(scope='module')
def small(music, tmp_path_factory):
    "A source of five recordings with their stems and two mixes, one of several chunks, and the folder of a small separator for these."
    d = tmp_path_factory.mktemp('small')
    for i in range(5): write_stems(d/f'source/band {i}', *piece(music, i, 7))
    long, short = sum(piece(music, 1, 45)), sum(piece(music, 6, 7))
    long[9*32000:38*32000] = 0                                    # Demucs has to hear all of it, the later stages have not
    for i, x in (1, long), (6, short): sf.write(d/f'source/mix {i}.wav', np.stack([x]*2, 1), 32000)
    return d/'source', d/'repo'


@pytest.fixture(scope='module')
def finished(music, tmp_path_factory):
    "Three recordings with stems and one mix, taken to datasets: (config, folder, ids of mixes)."
    d = tmp_path_factory.mktemp('finished')
    for i in range(3): write_stems(d/f'source/band {i}', *piece(music, i, 8))
    sf.write(d/'source/mix.wav', sum(piece(music, 3, 6)), 32000)
    c = config(d/'data', d/'source', d/'repo')
    pipeline(c, '--n-jobs', 1)
    return c, d/'data', {e['id'] for e in read_jsonl(d/'data/1_download/manifest.jsonl') if e['kind'] == 'mix'}


def again(finished, d): return config(d, finished[0].with_name('source'), finished[0].with_name('repo'))


@pytest.fixture(scope='module')
def undisturbed(small, tmp_path_factory):
    "The small run, stage by stage, each to its end: (folder, {stage: seconds from the first file to the last})."
    d, span = tmp_path_factory.mktemp('undisturbed')/'data', {}
    c = config(d, *small)
    for stage in STAGES:
        p, seen = subprocess.Popen(command(c, '--only', stage, '--quiet', '--n-jobs', 1), env=env, stdout=subprocess.DEVNULL), []
        before = look(d/FOLDER[stage])
        while p.poll() is None:
            if (now := look(d/FOLDER[stage])) != before: seen, before = seen + [time.monotonic()], now
            time.sleep(.01)
        assert p.returncode == 0 and seen
        span[stage] = seen[-1] - seen[0]
    return d, span


# killed

def kill(c, stage, folder, delay, n_jobs, whole):
    "Start a stage, kill it `delay` seconds after its first sign of life; (whether that hit, how many others of its group were alive)."
    p = subprocess.Popen(command(c, '--only', stage, '--quiet', '--n-jobs', n_jobs), env=env, start_new_session=True,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = look(folder)
    while p.poll() is None and look(folder) == before: time.sleep(.005)
    time.sleep(delay)
    if p.poll() is not None: return False, 0
    others = [] if whole else [i for i in group(p.pid) if i != p.pid]
    (os.killpg if whole else os.kill)(p.pid, signal.SIGKILL)
    hit = p.wait() == -signal.SIGKILL
    end = time.monotonic() + 20*busy()
    while time.monotonic() < end:
        if not group(p.pid): return hit, len(others) if hit else 0
        time.sleep(.05)
    raise AssertionError(f'workers outlive their parent: {group(p.pid)}')


def test_killed_anywhere_and_started_again_ends_the_same(small, undisturbed, tmp_path):
    whole, span = undisturbed
    rng, c, d = random.Random(0), config(tmp_path/'data', *small), tmp_path/'data'
    hits, orphans, misses, chunks = dict.fromkeys(STAGES, 0), 0, 0, set()
    for stage in STAGES:
        for n_jobs, all_at_once in (1, True), (2, False), (1, True), (2, False):
            while True:
                delay = rng.uniform(0, .9)*span[stage]/n_jobs*(1 - hits[stage]/5)
                hit, others = kill(c, stage, d/FOLDER[stage], delay, n_jobs, all_at_once)
                orphans += others > 0
                hits[stage] += hit
                if stage == 'stems' and hit:      # what Demucs has done it does not do again
                    now = {(name, time) for name, time, _ in look(d/FOLDER[stage]) if name.endswith('.safetensors') and not temporary(name)}
                    ready = {i.parent.name for i in (d/'2_stems').glob('*/stems.json')}
                    assert {name.split('/')[1].split('-')[0] for name, _ in chunks - now} <= ready
                    chunks |= now
                if hit: break
                misses += 1                       # it was done already: let it begin anew
                assert misses < 40, (stage, hits)
                shutil.rmtree(d/FOLDER[stage])
                chunks.clear()
        pipeline(c, '--only', stage, '--n-jobs', 1)
    print(f'\n{sum(hits.values())} kills survived: ' + ', '.join(f'{k} {n}' for k, n in hits.items()) + f'; {orphans} with workers left behind')
    pipeline(c, '--n-jobs', 1)
    assert sum(hits.values()) >= 20 and min(hits.values()) >= 3 and orphans >= 3
    assert not temporaries(tmp_path)
    assert {p.name for p in (whole/'7_datasets').glob('*.safetensors')} == {f'{s}.safetensors' for s in SPLITS}
    a, b = hashes(whole), hashes(d)
    assert {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)} == set()


def test_nothing_changed_nothing_touched(undisturbed):
    d, _ = undisturbed
    before = look(d)
    pipeline(d.with_name('data.yaml'), '--n-jobs', 1)
    assert look(d) == before


# every kind of file

def zoo(music, d, at=lambda i: i):
    "Fill a source folder; ({bad file: its reason}, titles of what is left out on purpose, titles of good ones)."
    d.mkdir()
    mixes = [sum(piece(music, i, 6)) for i in range(10)]
    bad, left, good = {}, [], []

    def damaged(name, why, data=None, like=None):
        path = d/name
        if like is not None:
            write(path, like)
            data = path.read_bytes()[:path.stat().st_size//2]
        path.write_bytes(data)
        bad[name] = why
    damaged('empty.wav', 'empty', b'')
    for suffix in 'wav', 'mp3', 'flac', 'm4a': damaged(f'cut.{suffix}', 'truncated|damaged|decoded', like=mixes[0])
    damaged('letter.mp3', 'not audio', b'Dear listener, this is no music. ' * 50)
    damaged('page.m4a', 'not audio', b'<!doctype html><html><body>404 not found</body></html>' * 20)
    damaged('bytes.flac', 'not audio|no audio', np.random.default_rng(0).bytes(50_000))
    damaged('upper\nlower\x1b[31m.mp3', 'not audio', b'two lines?' * 50)
    (d/'gone.wav').symlink_to(d/'never/was.wav')
    bad['gone.wav'] = 'no such file|link'
    x = mixes[0].copy(); x[1000] = np.nan
    sf.write(d/'nan.wav', x, 32000, subtype='FLOAT'); bad['nan.wav'] = 'NaN'
    sf.write(d/'nothing.wav', x[:0], 32000); bad['nothing.wav'] = 'no samples'
    write_stems(d/'uneven', mixes[0], mixes[0][:64000]); bad['uneven'] = 'length'
    (d/'alone').mkdir(); sf.write(d/'alone/lead.wav', mixes[0], 32000); bad['alone'] = 'backing'

    for name, x in dict(silent=np.zeros(32000*6), silence=np.zeros(32000*7), short=mixes[0][:9600], click=np.array([.5])).items():
        sf.write(d/f'{name}.flac', x, 32000); left.append(f'{name}.flac')
    (d/'hollow.wav').mkdir()

    for i, suffix in enumerate(('mp3', 'm4a', 'flac')): write(d/f'song.{suffix}', mixes[i + 1]); good.append(f'song.{suffix}')
    write(d/'song.opus', np.repeat(mixes[4][::2], 3), 48000); good.append('song.opus')
    sf.write(d/'8 kHz mono.wav', mixes[5][::4], 8000); good.append('8 kHz mono.wav')
    sf.write(d/'96 kHz six channels.wav', np.stack([np.repeat(mixes[6], 3)*g for g in (.5, .5, .3, .2, .1, .05)], 1), 96000)
    good.append('96 kHz six channels.wav')
    good.append('🎷'*60 + '.flac'); sf.write(d/good[-1], mixes[7], 32000)
    deep = d/('ñ'*60)/('長い'*30); deep.mkdir(parents=True)
    sf.write(deep/'name\nof 300 bytes.flac', mixes[8], 32000); good.append((deep/'name\nof 300 bytes.flac').relative_to(d).as_posix())
    raw = os.path.join(os.fsencode(d), b'caf\xe9.flac')
    try:
        with open(raw, 'wb') as f: f.write((d/'song.flac').read_bytes())
        os.unlink(raw); sf.write(d/'x.flac', mixes[9], 32000); os.rename(d/'x.flac', raw); good.append('caf?.flac')
    except OSError: pass                                      # a file system that takes no such names
    write_stems(d/'folder.wav', *piece(music, 10, 6)); good.append('folder.wav')
    lead, backing = (t[::4] for t in piece(music, 11, 12))
    (d/'an hour').mkdir()
    for k, x in dict(lead=lead, backing=backing).items():     # a solo late in a long evening
        with sf.SoundFile(d/f'an hour/{k}.flac', 'w', 8000, 1, compression_level=0) as f:
            for i in range(300): f.write(x if k == 'backing' or i == 225 else 0*x)
    good.append('an hour')
    return bad, left, good


def test_every_kind_of_file_is_named_or_gets_through(music, tmp_path):
    bad, left, good = zoo(music, tmp_path/'zoo')
    c = config(tmp_path/'data', tmp_path/'zoo', tmp_path/'repo', augmentation=None, rms_window=dict(rms_threshold=.001))   # of leads without offset
    with open(tmp_path/'out', 'w') as out, open(tmp_path/'err', 'w') as err:
        p = subprocess.Popen(command(c, '--quiet', '--n-jobs', 1), stdout=out, stderr=err, env=cold)
        _, status, used = os.wait4(p.pid, 0)
        p.returncode = os.waitstatus_to_exitcode(status)
    table = (tmp_path/'out').read_text()
    lines = (tmp_path/'err').read_text().splitlines()
    assert p.returncode == 1 and len(lines) == len(bad) and all(l.startswith('saxgpt: ') for l in lines), '\n'.join(lines)
    for name, why in bad.items():
        parts = re.split('[\n\x1b]', name)
        found = [l for l in lines if all(part in l for part in parts) and re.search(why, l.split(parts[-1], 1)[1])]
        assert len(found) == 1, f'{name!r}: {why}\n' + '\n'.join(lines)
    assert all(name in table for name in left), table
    ids = {e['title']: e['id'] for e in read_jsonl(tmp_path/'data/1_download/manifest.jsonl')}
    through = in_datasets(tmp_path/'data')
    missing = [t for t in good if ids.get(t) not in through]
    assert not missing and len(through) == len(good), (missing, sorted(ids), table)
    assert used.ru_maxrss < 1.6e6, f'{used.ru_maxrss/1e6:.2f} GB'          # kB; an hour of both stems is .9 GB
    print(f'\n{len(bad)} bad files named, {len(left)} left out, {len(good)} good ones through; peak {used.ru_maxrss/1e6:.2f} GB')


# one at a time

def test_second_run_on_the_same_folders_is_told_so(small, tmp_path):
    c, d = config(tmp_path/'data', *small), tmp_path/'data'
    p = subprocess.Popen(command(c, '--quiet', '--n-jobs', 2), env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        while p.poll() is None and not (d/'2_stems/manifest.jsonl').is_file() and not list((d/'2_stems').glob('*/stems.json')): time.sleep(.01)
        assert p.poll() is None
        os.killpg(p.pid, signal.SIGSTOP)                       # at work, and staying so
        r = pipeline(c, '--only', 'download', '--quiet', ok=False)
        assert r.returncode == 2 and len(said(r)) == 1 and re.search(str(d/r'\d_'), r.stderr) and str(p.pid) in r.stderr, r.stderr
        other = config(tmp_path/'other', small[0], data_paths=dict(dl_dir=str(d/'1_download')))
        r = pipeline(other, '--only', 'download', '--quiet', ok=False)
        assert r.returncode == 2 and str(d/'1_download') in r.stderr, 'one shared folder is enough'
    finally:
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
        p.wait()
    pipeline(c, '--only', 'download')


# disks

@pytest.fixture(params=['limit', 'disk'])
def disk(tmp_path, request):
    "A folder, and what fills its disk to the last but `n` bytes; None when files are limited instead, and where nothing may be mounted."
    libc = ctypes.CDLL(None, use_errno=True)
    at = tmp_path/'disk'
    at.mkdir()
    if request.param == 'limit' or libc.mount(b'tmpfs', os.fsencode(at), b'tmpfs', 0, b'size=96m'): yield at, None; return

    def fill(n):
        (at/'ballast').unlink(missing_ok=True)
        free = os.statvfs(at).f_bavail*os.statvfs(at).f_frsize
        with open(at/'ballast', 'wb') as f: os.posix_fallocate(f.fileno(), 0, free - n)
    yield at, fill
    libc.umount2(os.fsencode(at), 2)


def test_full_disk_is_one_line_and_nothing_half_written_counts(finished, disk):
    at, fill = disk
    c, d = again(finished, at/'data'), at/'data'
    for stage in STAGES:
        little = 2048 if stage in ('codes', 'dataset') else 64 if stage == 'download' else 100_000
        if fill:
            fill(4096 if little < 4096 else 65536)
            r = pipeline(c, '--only', stage, '--quiet', '--n-jobs', 2, ok=False)          # workers notice, too
            (at/'ballast').unlink()
        else: r = pipeline(c, '--only', stage, '--quiet', '--n-jobs', 1, ok=False, env=env | first(f'limit_files({little})'))
        assert r.returncode in (1, 2) and len(said(r)) == 1, (stage, r.returncode, r.stderr)
        assert str(d) in r.stderr and re.search('space|large|full', r.stderr), (stage, r.stderr)
        run_pipeline(load_config(DataConfig, c), only=stage)
    assert not temporaries(at) and hashes(d) == hashes(finished[1])


def test_unwritable_folder_is_one_line(finished, tmp_path):
    d, file = tmp_path/'data', tmp_path/'file'
    shutil.copytree(finished[1], d)
    c = again(finished, d)
    file.write_text('')
    for stage, key in ('download', 'dl_dir'), ('stems', 'stems_dir'), ('dataset', 'datasets_dir'):
        folder = d/FOLDER[stage]
        shutil.rmtree(folder)
        folder.mkdir()
        folder.chmod(0o500)
        r = pipeline(c, '--quiet', ok=False, env=env | first('forget_rights()'))
        assert r.returncode in (1, 2) and len(said(r)) == 1 and str(folder) in r.stderr, r.stderr
        folder.chmod(0o700)
        r = pipeline(c, f'data_paths.{key}={file}/deeper', '--quiet', ok=False)
        assert r.returncode in (1, 2) and len(said(r)) == 1 and str(file) in r.stderr, r.stderr
    run_pipeline(load_config(DataConfig, c))
    assert not file.read_text() and hashes(d) == hashes(finished[1])


# settings

CHANGES = {                                       # what is set -> stages that work; 'mixes' and 'copies' restrict what they touch
    'demucs.n_jobs=2': '', 'encodec.chunk_len_s=3': '', 'intermediates.keep_dl=true': '',
    'demucs.n_shifts=0': 'stems segments augment codes dataset', 'demucs.n_splits=2': 'stems segments augment codes dataset',
    'demucs.lead=vocals': 'stems segments augment codes dataset', 'demucs.normalize_before=false': 'stems segments augment codes dataset',
    'demucs.normalize_after=false': 'stems segments augment codes dataset',
    'rms_window.rms_threshold=0.04': 'segments augment codes dataset', 'rms_window.min_segment_seconds=7.5': 'segments augment dataset',
    'rms_window.rms_frame_length_seconds=2': 'segments augment codes dataset', 'rms_window.rms_stride_seconds=0.5': 'segments augment codes dataset',
    'augmentation.n_fft=2048': 'augment codes dataset', 'augmentation.hop_length=128': 'augment codes dataset',
    'augmentation.semitone_steps=[-1]': 'augment codes dataset', 'augmentation.tempo_ratios=[1.1]': 'augment codes dataset',
    'train_test_split.seed=9': 'dataset', 'train_test_split.val=0.1': 'dataset', 'dataset.stride=25': 'dataset', 'dataset.seq_len=80': 'dataset',
}


def changed(finished, tmp_path, *overrides, before=lambda d: None):
    "Run again over a copy with other settings; ({stage: names of the items that were made, removed or touched}, the copy)."
    c, whole, _ = finished
    d = tmp_path/'data'
    if d.exists(): shutil.rmtree(d)
    shutil.copytree(whole, d)
    before(d)
    was = {s: look(d/FOLDER[s]) for s in STAGES}
    run_pipeline(load_config(DataConfig, c, [*(f'data_paths.{k}={d/v}' for k, v in PATHS.items()), *overrides]))
    told = {'manifest.jsonl', 'datasheet.md', 'datasheet.json'}          # lists, of settings too
    touched = {s: {name.split('/')[0] for name, *_ in was[s] ^ look(d/FOLDER[s])} - told for s in STAGES}
    return {s: names for s, names in touched.items() if names}, d


@pytest.mark.parametrize('setting', CHANGES)
def test_setting_reruns_what_depends_on_it(finished, tmp_path, setting):
    touched, _ = changed(finished, tmp_path, setting)
    assert ' '.join(touched) == CHANGES[setting], {s: sorted(n)[:3] for s, n in touched.items()}
    mixes = finished[2]
    if setting.startswith('demucs.') and touched and 'normalize' not in setting:          # what came with stems has nothing to do with Demucs
        for s in 'stems', 'segments', 'augment', 'codes': assert {n.split('-')[0] for n in touched[s]} <= mixes, (s, touched[s])
    if setting.startswith('augmentation.'): assert all('+' in n for s in ('augment', 'codes') for n in touched[s])


def test_new_recording_makes_its_own_work_only(finished, music, tmp_path):
    more = tmp_path/'source'
    shutil.copytree(load_config(DataConfig, finished[0]).source, more)
    touched, d = changed(finished, tmp_path, f'source={more}')
    assert not touched, 'the same recordings in another place'
    write_stems(more/'new band', *piece(music, 8, 8))
    touched, d = changed(finished, tmp_path, f'source={more}')
    [new] = {e['id'] for e in read_jsonl(d/'1_download/manifest.jsonl') if e['title'] == 'new band'}
    assert list(touched) == list(STAGES) and all({n.split('-')[0] for n in touched[s]} == {new} for s in STAGES[:-1]), touched
    assert {c['recording'] for c in CodesDataset(finished[1]/'7_datasets/val.safetensors').clips} - {new} <= \
           {c['recording'] for c in CodesDataset(d/'7_datasets/val.safetensors').clips}, 'a recording stays in its split'


def test_another_codec_makes_other_codes(finished, tmp_path):
    codec = load_codec('bundled')
    codec.save(tmp_path/'same')
    assert not changed(finished, tmp_path, f'codec={tmp_path}/same')[0]
    MelCodec(codec.codebooks.flip(1), codec.settings).save(tmp_path/'other')
    assert list(changed(finished, tmp_path, f'codec={tmp_path}/other')[0]) == ['codes', 'dataset']


def test_damaged_output_is_made_again(finished, tmp_path):
    def damage(d):
        shutil.rmtree(sorted((d/'4_clips').glob('*/clip.json'))[0].parent)
        f = sorted((d/'6_codes').glob('*.safetensors'))[0]
        f.write_bytes(f.read_bytes()[:-1])
        (d/'7_datasets/train.safetensors').write_bytes(b'')
    _, d = changed(finished, tmp_path, before=damage)
    a, b = hashes(finished[1]), hashes(d)
    assert {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)} == set()


# the configuration in the README of the first SaxGPT, word by word

SEED = '''
url: 'https://www.youtube.com/playlist?list=YOUR_PLAYLIST_ID'

data_paths:
  dl_dir: 'data/your_dataset/1_download/'
  stems_dir: 'data/your_dataset/2_stems/'
  metadata_path: 'data/your_dataset/3_metadata.csv'
  clips_dir: 'data/your_dataset/4_clips/'
  aug_dir: 'data/your_dataset/5_aug_clips/'
  codes_dir: 'data/your_dataset/6_codes/'
  datasets_dir: 'data/your_dataset/7_datasets/'

intermediates: # keep / discard intermediate outputs
  keep_dl: true
  keep_stems: true
  keep_clips: true
  keep_aug_clips: true
  keep_codes: true

demucs:
  n_splits: 2          # Higher = higher quality, slower
  n_shifts: 2          # Averaging shifts for equivariance
  n_jobs: 16           # Parallel jobs
  normalize_before: true
  normalize_after: true

rms_window:
  rms_threshold: 0.05  # Minimum RMS energy for valid sections
  min_window_size_seconds: 30.0
  rms_frame_length_seconds: 10.0
  rms_stride_seconds: 0.2

augmentation:
  sample_rate: 32000
  semitone_steps: [-2, 2]  # Pitch shift range
  tempo_ratios: [0.9, 1.1]  # Speed adjustment range
  n_fft: 4096
  hop_length: 512

encodec:
  chunk_len_s: 25      # Process audio in chunks to manage memory

train_test_split:
  seed: 67
  test: 0.1            # 10% test set
  val: 0.1             # 10% validation set

dataset:
  seq_len: 1500        # 30 seconds at 50Hz
  stride: 300          # Stride for overlapping windows
  padding_idx: 2048
'''


def test_first_configuration_works_as_it_is(music, tmp_path):
    for i in range(2): write_stems(tmp_path/f'source/band {i}', *piece(music, i, 8))
    sf.write(tmp_path/'source/mix.wav', sum(piece(music, 3, 6)), 32000)
    (tmp_path/'seed.yaml').write_text(SEED)
    load_config(DataConfig, tmp_path/'seed.yaml')
    name, d = tiny_demucs(tmp_path/'repo'), tmp_path/'data/your_dataset'
    own = ['url=null', 'source=source', 'demucs.repo=repo', f'demucs.model={name}', 'rms_window.min_segment_seconds=4',
           'rms_window.rms_frame_length_seconds=1', 'rms_window.rms_threshold=0.001', *(f'intermediates.{k}=false' for k in (
               'keep_dl', 'keep_stems', 'keep_clips', 'keep_aug_clips', 'keep_codes'))]
    pipeline('seed.yaml', *own[:-5], cwd=tmp_path)
    kept = hashes(d/'7_datasets')
    assert kept.keys() >= {f'{s}.safetensors' for s in SPLITS} and list(d.glob('2_stems/*/lead.wav')) and list(d.glob('6_codes/*.safetensors'))
    pipeline('seed.yaml', *own, '--n-jobs', 1, cwd=tmp_path)
    assert hashes(d/'7_datasets') == kept
    assert not [p for p in d.rglob('*') if p.suffix in ('.wav', '.flac') or p.suffix == '.safetensors' and '7_' not in p.parent.name], 'intermediates go'
    pipeline('seed.yaml', *own, '--n-jobs', 1, cwd=tmp_path)
    assert hashes(d/'7_datasets') == kept, 'a rerun does no harm'


# a cluster

HEAD = '''
import ray, sys
how = dict(num_cpus=2, include_dashboard=False, object_store_memory=80*2**20, configure_logging=False, log_to_driver=False)
for left in range(9, -1, -1): # ray gives its processes 30 s to start, and a busy machine may take longer
    try: c = ray.init(**how); break
    except Exception:
        if not left: raise
        ray.shutdown()
print(c.address_info['gcs_address'], flush=True)
sys.stdin.read()
ray.shutdown()
'''


def marked(mark):
    "Living processes whose environment holds `mark`."
    found = []
    for f in Path('/proc').glob('[0-9]*/environ'):
        try: found += [int(f.parent.name)] if mark.encode() in f.read_bytes() else []
        except OSError: continue
    return found


def test_ray_with_two_workers_makes_the_same(finished, tmp_path):
    mark = f'SAXGPT_TEST_RAY={os.getpid()}-{os.urandom(4).hex()}'
    c, quiet = again(finished, tmp_path/'data'), dict(RAY_USAGE_STATS_ENABLED='0', RAY_AUTH_MODE='token', RAY_AUTH_TOKEN=os.urandom(32).hex())
    head = subprocess.Popen([sys.executable, '-c', HEAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=dict(cold, **dict([mark.split('=')]), **quiet))
    try:
        address = head.stdout.readline().strip()
        assert address, head.stderr.read()
        for _ in range(2):
            assert not said(pipeline(c, '--ray', address, '--quiet', env=dict(env, **quiet)))
            assert hashes(tmp_path/'data') == hashes(finished[1])
    finally:
        head.stdin.close()
        try: head.wait(600)
        except subprocess.TimeoutExpired: pass
        for _ in range(100):
            if not (left := marked(mark)): break
            time.sleep(.1)
        for pid in left: os.kill(pid, signal.SIGKILL)
    assert not left, 'Ray leaves nothing behind'


# people who mean harm

def test_manifest_cannot_write_elsewhere(finished, tmp_path):
    d = tmp_path/'a/b/data'
    shutil.copytree(finished[1], d)
    c = again(finished, d)
    sf.write(tmp_path/'secret.wav', np.ones(32000*6, 'f4')/4, 32000)
    entries = read_jsonl(d/'1_download/manifest.jsonl')
    stems = next(e for e in entries if e['kind'] == 'stems')
    shutil.copytree(d/'1_download'/stems['id'], tmp_path/'a/b/outside')
    hostile = [dict(stems, title='../../x', id=entries[0]['id']), dict(stems, id='../../outside', title='id'), dict(stems, id='/outside', title='root'),
               dict(stems, id='x/../../../outside', title='through'), dict(stems, id=3, title='number'), dict(title='nothing'),
               dict(stems, id=entries[0]['id'] + 'a', files=dict(lead='../../../../secret.wav', backing='../../../../secret.wav'), title='files')]
    def outside(): return {p for p in tmp_path.rglob('*') if not p.is_relative_to(d)}
    with open(d/'1_download/manifest.jsonl', 'w') as f: f.writelines(json.dumps(e) + '\n' for e in entries[1:] + hostile)
    (d/'1_download'/(entries[0]['id'] + 'a')).mkdir()
    was = outside()
    r = pipeline(c, '--only', 'stems', '--quiet', ok=False)
    assert r.returncode in (1, 2) and said(r) and outside() == was, r.stderr
    lines = [json.dumps(dict(e, recording='../../outside')) for e in read_jsonl(finished[1]/'2_stems/manifest.jsonl')[:1]]
    (d/'2_stems/manifest.jsonl').write_text('\n'.join(lines) + '\n')
    for stage in STAGES[2:]:
        r = pipeline(c, '--only', stage, '--quiet', ok=False)
        assert said(r) or r.returncode == 0
        assert outside() == was, stage
    run_pipeline(load_config(DataConfig, c))                   # the download stage writes its manifest anew
    assert hashes(d/'7_datasets') == hashes(finished[1]/'7_datasets') and outside() == was


def test_title_from_the_web_cannot_write_elsewhere(music, tmp_path):
    import http.server
    import threading
    www = tmp_path/'www'
    www.mkdir()
    titles = ['../../x', '/etc/passwd', 'ü🎷'*250, 'a\nb']
    for i, _ in enumerate(titles): sf.write(www/f'{i}.flac', sum(piece(music, i, 5)), 32000)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(type('Quiet', (http.server.SimpleHTTPRequestHandler,), dict(
        log_message=lambda *a: None)), directory=str(www)))
    at = f'http://127.0.0.1:{server.server_port}'
    items = ''.join(f'<item><title>{t}</title><guid>{i}-{t}</guid><link>{at}/{i}.flac</link><enclosure url="{at}/{i}.flac" type="audio/flac"/></item>'
                    for i, t in enumerate(titles))
    (www/'feed.rss').write_text(f'<?xml version="1.0"?><rss version="2.0"><channel><title>../../list</title>{items}</channel></rss>')
    threading.Thread(target=server.serve_forever, daemon=True).start()
    c, d = config(tmp_path/'a/b/data', None, url=f'{at}/feed.rss', download=dict(pause_s=0.)), tmp_path/'a/b/data'
    was = set(tmp_path.rglob('*'))
    try: pipeline(c, '--only', 'download', '--quiet')
    finally: server.shutdown(); server.server_close()
    assert all(p.is_relative_to(d) for p in set(tmp_path.rglob('*')) - was)
    assert len(read_jsonl(d/'1_download/manifest.jsonl')) == len(titles)


class Trojan:
    "What runs a command when it is unpickled."
    def __init__(self, command): self.command = command
    def __reduce__(self): return os.system, (self.command,)


@pytest.mark.parametrize('packed', ['torch', 'pickle'])
def test_model_that_would_run_code_does_not(music, tmp_path, packed):
    (tmp_path/'source').mkdir()
    sf.write(tmp_path/'source/mix.wav', sum(piece(music, 0, 5)), 32000)
    c = config(tmp_path/'data', tmp_path/'source', tmp_path/'repo')
    for f in (tmp_path/'repo').glob('*.th'):
        trojan = dict(torch.load(f, weights_only=False), more=Trojan(f'touch {tmp_path}/done'))
        torch.save(trojan, f) if packed == 'torch' else f.write_bytes(pickle.dumps(trojan))
        sum8 = hashlib.sha256(f.read_bytes()).hexdigest()[:8]
        f.rename(f.with_name(f'{f.stem.rpartition("-")[0]}-{sum8}.th' if '-' in f.stem else f.name))
    r = pipeline(c, '--quiet', ok=False)
    assert r.returncode in (1, 2) and said(r) and not (tmp_path/'done').exists(), r.stderr
