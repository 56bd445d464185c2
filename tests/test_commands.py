"The commands as a person uses them: real files in, real processes, real signals."
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from forks import warm
from saxgpt.audio import load_mono, resample
from saxgpt.config import ModelConfig, demo_backing
from saxgpt.data.dataset import CodesDataset
from saxgpt.data.recordings import find_recordings, ingest
from saxgpt.data.splits import SPLITS, split_of
from saxgpt.demo import make_corpus
from saxgpt.takes.backings import read_backing
from saxgpt.model.transformer import SaxGPT
from saxgpt.ops.files import read_jsonl, read_tensors
from saxgpt.pretrained import give_away, load_model

cold = dict(os.environ, OMP_NUM_THREADS='1')            # each command at least once
env = cold | warm('saxgpt.generate', 'saxgpt.music.backing', 'saxgpt.pipeline', 'saxgpt.train', 'librosa', 'matplotlib.pyplot', 'mido', 'scipy.signal', 'torch._dynamo',
                  *(f'saxgpt.data.{s}' for s in ('download', 'stems', 'segments', 'codes', 'splits')), family=True)


def run(*args, ok=True, env=env, **kw):
    "Run `python -m saxgpt.*` and give the finished process."
    r = subprocess.run([sys.executable, '-m', *map(str, args)], capture_output=True, text=True, env=env, **kw)
    if ok: assert r.returncode == 0, r.stderr
    return r


# a solo

def test_solo_over_a_stereo_44k_mp3(tmp_path):
    import av
    t = np.arange(5*44100)/44100
    x = np.stack([np.sin(2*np.pi*f*t) for f in (110, 165)]).astype(np.float32)/4
    with av.open(str(tmp_path/'band.mp3'), 'w') as c:
        stream = c.add_stream('mp3', rate=44100, layout='stereo')
        for i in range(0, x.shape[1], 1152):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(x[:, i:i + 1152]), 'fltp', 'stereo')
            frame.sample_rate, frame.pts = 44100, i
            c.mux(stream.encode(frame))
        c.mux(stream.encode(None))
    r = run('saxgpt.generate', tmp_path/'band.mp3', '-o', tmp_path/'solo.wav', '--seed', 1, env=cold)
    solo, rate = sf.read(tmp_path/'solo.wav')
    mix, _ = sf.read(tmp_path/'solo-mix.wav')
    assert rate == 32000 and abs(len(solo)/rate - 5) < .1 and len(mix) == len(solo)
    assert np.abs(mix).max() < 1 and np.isfinite(solo).all()
    assert (tmp_path/'solo.png').stat().st_size > 10_000
    assert 'solo.wav' in r.stdout and 'saxgpt' in r.stdout  # where it is, how to do it with one's own file


def test_solo_depends_on_the_seed_alone(tmp_path):
    backing = resample(load_mono(demo_backing()[0])[:, :3*32000], 32000, 8000)
    sf.write(tmp_path/'band.wav', np.repeat(backing, 6, 0).T, 8000)
    for name, seed in ('a', 1), ('b', 1), ('c', 2):
        run('saxgpt.generate', tmp_path/'band.wav', '-o', tmp_path/f'{name}.wav', '--seed', seed, '--temperature', 1.2)
    a, b, c = (sf.read(tmp_path/f'{n}.wav')[0] for n in 'abc')
    assert np.array_equal(a, b) and not np.array_equal(a, c) and np.abs(a).max() > .01


def test_the_seed_of_a_kept_solo_plays_it_again(tmp_path):
    def play(*args, name): return run('saxgpt.generate', 'demo', '--seconds', 2, '-o', tmp_path/f'{name}.wav', *args).stdout
    lines = play('--n', 2, '--keep', 1, '--seed', 4, name='best').splitlines()
    seeds = [l.split()[0] for l in lines[1:3]]
    assert sorted(seeds) == ['4', '5'] and lines[1].endswith('kept') and not lines[2].endswith('kept'), lines
    play('--seed', seeds[0], name='again')
    assert (tmp_path/'best.wav').read_bytes() == (tmp_path/'again.wav').read_bytes()
    assert not (tmp_path/'best-2.wav').exists()


def test_a_solo_over_a_chart(tmp_path):
    "A chart in a file becomes a backing whose chords the solo knows, under any name."
    (tmp_path/'two.txt').write_text('title: Two\nbpm: 240\nDm7 G7 | CΔ', encoding='utf-8')
    r = run('saxgpt.music.backing', 'two.txt', '--feel', 'bossa', '-o', 'two.wav', cwd=tmp_path, env=cold)
    assert 'saxgpt generate two.wav' in r.stdout and not r.stderr
    path, x, truth = read_backing(tmp_path/'two.wav')
    assert [c['name'] for c in truth['chords']] == ['Dm7', 'G7', 'CΔ', 'Cmaj7'] and x.shape[1] == 3*32000
    r = run('saxgpt.generate', 'two.wav', '--temperature', 0, cwd=tmp_path)
    assert sf.info(tmp_path/'solo.wav').duration == 3 and 'two.json' not in r.stderr
    (tmp_path/'two.json').write_text('{"mine": true}')
    for args in ('two.txt', '-o', 'two.wav'), ('C | Q', '-o', 'new.wav'), ('C', '--feel', 'polka', '-o', 'new.wav'):
        r = run('saxgpt.music.backing', *args, cwd=tmp_path, ok=False)
        assert r.returncode in (1, 2) and r.stderr.count('\n') == 1, r.stderr
    assert (tmp_path/'two.json').read_text() == '{"mine": true}' and not (tmp_path/'new.wav').exists()


@pytest.mark.parametrize('make, says', [
    (lambda p: p.write_bytes(b''), 'empty'),
    (lambda p: p.write_text('this is not music'), 'audio'),
    (lambda p: sf.write(p, np.full(32000, np.nan), 32000, subtype='FLOAT'), 'NaN'),
    (lambda p: None, 'no such file'),
], ids=['empty', 'text', 'nan', 'absent'])
def test_bad_backing_is_one_line(tmp_path, make, says):
    make(tmp_path/'bad.wav')
    r = run('saxgpt.generate', tmp_path/'bad.wav', '-o', tmp_path/'solo.wav', ok=False)
    assert r.returncode == 2 and r.stderr.strip().count('\n') == 0, r.stderr
    assert 'bad.wav' in r.stderr and says.lower() in r.stderr.lower()
    assert not (tmp_path/'solo.wav').exists()


@pytest.mark.parametrize('args', [('--temperature', '-1'), ('--top-p', '2'), ('--checkpoint', 'no/such/folder'), ('--n', '0'), ('--keep', '2'), ('--n', '2', '--keep', '0')])
def test_bad_argument_is_one_line(tmp_path, args):
    r = run('saxgpt.generate', 'demo', '-o', tmp_path/'solo.wav', *args, ok=False)
    assert r.returncode == 2 and r.stderr.strip().count('\n') == 0, r.stderr


def test_nobody_listens(tmp_path):
    "What cannot be said is no reason to fail: no reader, no such letter, no stream, a full disk."
    r, (reader, gone) = {}, os.pipe()
    os.close(reader)
    full = open('/dev/full', 'w')
    for name, how in {'none': ('"$0" "${@}" >&- 2>&-', cold), 'caf\udce9 \u266f': ('"$0" "${@}"', cold | dict(PYTHONIOENCODING='ascii')),
                      'head': dict(stdout=gone, stderr=gone), 'full': dict(stdout=full, stderr=subprocess.PIPE)}.items():
        out = os.fsencode(tmp_path/name) + b'.wav'
        play = [os.fsencode(sys.executable), b'-m', b'saxgpt.generate', b'demo', b'--seconds', b'1', b'-o', out]
        if isinstance(how, dict): r[name] = subprocess.run(list(map(os.fsdecode, play)), env=env, **how)
        else: r[name] = subprocess.run([b'bash', b'-c', how[0].encode(), *play], capture_output=True, env=how[1])
        assert r[name].returncode == 0, (name, r[name])
        assert sf.info(out).duration == 1 and os.path.exists(out.replace(b'.wav', b'.png')), name
    os.close(gone)
    full.close()
    assert r['full'].stderr.count(b'saxgpt: standard output: No space left on device') == 1
    assert rb'caf\udce9 \u266f.wav' in r['caf\udce9 \u266f'].stdout
    for line in ['"${0%/*}/saxgpt"', '"$0" -m saxgpt.pipeline', '"$0" -m saxgpt.pipeline --help']:
        both = subprocess.run(['bash', '-c', f'{line} 2>&1 | true; exit ${{PIPESTATUS[0]}}', sys.executable], capture_output=True, text=True, env=env)
        assert both.returncode == (0 if line.endswith('help') or 'pipeline' not in line else 2) and not both.stderr, line


def test_home_is_where_the_tilde_is(tmp_path):
    (tmp_path/'ella').mkdir()
    (tmp_path/'ella'/'tune.wav').write_bytes(demo_backing()[0].read_bytes())
    at = env | dict(HOME=str(tmp_path/'ella'))
    run('saxgpt.generate', '~/tune.wav', '--output=~/out/solo.wav', '--seconds', 1, env=at, cwd=tmp_path)
    assert (tmp_path/'ella'/'out'/'solo.wav').is_file() and not (tmp_path/'~').exists()


def test_a_prompt_is_never_the_output(tmp_path):
    "The default output, in the folder that one is in."
    sf.write(tmp_path/'solo.wav', np.sin(np.arange(32000)/20)/4, 32000)
    (tmp_path/'matplotlibrc').write_text('text.usetex: True\n')
    mine = (tmp_path/'solo.wav').read_bytes()
    r = run('saxgpt.generate', 'demo', '--prompt', 'solo.wav', '--seconds', 2, cwd=tmp_path, ok=False)
    assert (r.returncode, r.stderr.count('\n')) == (2, 1) and 'solo.wav: is read by the same command and would be lost' in r.stderr
    assert (tmp_path/'solo.wav').read_bytes() == mine
    run('saxgpt.generate', 'demo', '--prompt', 'solo.wav', '--seconds', 2, '-o', 'mine.wav', cwd=tmp_path, env=cold)   # a picture without LaTeX
    assert (tmp_path/'mine.png').is_file() and (tmp_path/'solo.wav').read_bytes() == mine


def sigint_as_usual():
    "SIGINT is ignored where the tests run in the background."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def change(folder, **cfg):
    "The bundled weights, as far as they fit a model of other settings; gives the folder"
    model, about = load_model()
    other = SaxGPT(ModelConfig(**about['config']['model'] | cfg)).eval()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if k in other.state_dict()})
    other.about = about | dict(config=about['config'] | dict(model=other.cfg.model_dump()))
    give_away(other, folder)
    return folder


def test_whole_tune_after_a_beginning_and_ctrl_c_keeps_what_was_played(tmp_path):
    x, rate = np.random.default_rng(0).normal(size=32000*120)*.05, 32000
    sf.write(tmp_path/'tune.wav', x, rate)
    sf.write(tmp_path/'begin.wav', np.sin(2*np.pi*220*np.arange(2*rate)/rate)/4, rate)
    short = change(tmp_path/'short', max_seq_len=405)         # hears 8 s at once
    args = ['saxgpt.generate', tmp_path/'tune.wav', '-o', tmp_path/'solo.wav', '--prompt', tmp_path/'begin.wav', '--checkpoint', short]
    with open(tmp_path/'bar', 'w') as bar:
        p = subprocess.Popen([sys.executable, '-m', *map(str, args)], env=env, stdout=subprocess.DEVNULL, stderr=bar, start_new_session=True,
                             preexec_fn=None if 'SAXGPT_WARM' in env else sigint_as_usual)
        def frames(): return [int(n) for n in re.findall(r'(\d+)/6000 frames', (tmp_path/'bar').read_text())] or [0]
        while p.poll() is None and frames()[-1] < 600: time.sleep(.05)      # in the second window
        p.send_signal(signal.SIGINT)
        p.wait(600)
    said = (tmp_path/'bar').read_text().splitlines()[-1]
    assert p.returncode == 130 and 'interrupted: the first' in said and 'Traceback' not in said, said
    solo, mix = (sf.read(tmp_path/n)[0] for n in ('solo.wav', 'solo-mix.wav'))
    assert 600*640 <= len(solo) == len(mix) < 6000*640


# recordings to weights

tiny = ['model.d_model=32', 'model.nhead=2', 'model.num_encoder_layers=1', 'model.num_decoder_layers=1', 'model.dim_feedforward=64',
        'model.dropout=0.1', 'training.batch_size=2', 'training.gradient_accumulation_steps=2', 'training.num_workers=0', 'training.log_interval=1',
        'training.scheduler.warmup_steps=2', 'training.use_pbar=false', 'training.val_batches=1']


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    "A demo corpus of a few minutes, taken all the way to datasets by the pipeline's command."
    d = tmp_path_factory.mktemp('data')
    make_corpus(d/'corpus', 3, seed=5, n_jobs=1)
    ids = [ingest(r, d/'1')['id'] for r in find_recordings(d/'corpus')]
    seed = next(s for s in count() if {split_of(i, s, .3, .3) for i in ids} == set(SPLITS))
    paths = [f'data_paths.{k}={d/v}' for k, v in dict(dl_dir='1', stems_dir='2', metadata_path='3.csv', clips_dir='4', aug_dir='5', codes_dir='6',
                                                      datasets_dir='7').items()]
    settings = [f'source={d/"corpus"}', *paths, 'rms_window.min_segment_seconds=12', 'dataset.seq_len=300', 'dataset.stride=150',
                'train_test_split.val=0.3', 'train_test_split.test=0.3', f'train_test_split.seed={seed}']
    first = run('saxgpt.pipeline', '--config', 'demo', *settings, '--n-jobs', 1, env=cold)
    hashes = {p.name: p.read_bytes() for p in (d/'7').glob('*.safetensors')}
    run('saxgpt.pipeline', '--config', 'demo', *settings)
    assert hashes == {p.name: p.read_bytes() for p in (d/'7').glob('*.safetensors')}, 'a second run changes nothing'
    assert 'dataset' in first.stdout
    return d/'7'


def train_args(dataset, out, *more):
    data = [f'data.{k}_path={dataset/k}.safetensors' for k in ('train', 'val', 'test')]
    return ['saxgpt.train', '--config', 'xsmall', *data, *tiny, f'training.output_dir={out}', *more]


def weights(out): return read_tensors(Path(out)/'checkpoints/last/model.safetensors')[0]


def same(a, b): return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def test_splits_are_by_recording(dataset):
    seen = {s: {c['recording'] for c in CodesDataset(dataset/f'{s}.safetensors').clips} for s in ('train', 'val', 'test')}
    assert all(seen.values()) and not (seen['train'] & seen['val'] or seen['train'] & seen['test'] or seen['val'] & seen['test'])


def test_killed_and_started_again_ends_the_same(dataset, tmp_path):
    more = ['training.max_steps=12', 'training.val_interval=3']
    run(*train_args(dataset, tmp_path/'whole', *more), env=cold)
    args = [sys.executable, '-m', *train_args(dataset, tmp_path/'cut', *more)]
    p = subprocess.Popen(args, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path/'cut/metrics.jsonl'
    while p.poll() is None and not any(m.get('step', 0) >= 5 for m in read_jsonl(log)): time.sleep(.02)
    assert p.poll() is None, 'finished before it could be killed'
    p.send_signal(signal.SIGKILL)
    p.wait()
    run(*train_args(dataset, tmp_path/'cut', *more))
    assert same(weights(tmp_path/'whole'), weights(tmp_path/'cut'))


def test_sigterm_saves_and_leaves(dataset, tmp_path):
    args = [sys.executable, '-m', *train_args(dataset, tmp_path/'run', 'training.max_steps=100000')]
    p = subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while p.poll() is None and not read_jsonl(tmp_path/'run/metrics.jsonl'): time.sleep(.02)
    p.send_signal(signal.SIGTERM)
    out, _ = p.communicate(timeout=600)
    assert 'Traceback' not in out, out
    assert json.loads((tmp_path/'run/checkpoints/last/config.json').read_text())['step'] >= 1


def test_two_processes_train_as_one(dataset, tmp_path):
    more = ['training.max_steps=3', 'model.dropout=0', 'model.condition_dropout=0', *(f'training.context_dropout.{k}=0' for k in ('start_rate', 'end_rate', 'span_rate'))]
    run(*train_args(dataset, tmp_path/'one', *more, 'training.batch_size=4', 'training.gradient_accumulation_steps=1'))
    run(*train_args(dataset, tmp_path/'two', *more, 'training.batch_size=2', 'training.gradient_accumulation_steps=1'), '--ddp', '--num-gpus', 2)
    a, b = weights(tmp_path/'one'), weights(tmp_path/'two')
    assert max((a[k].float() - b[k].float()).abs().max() for k in a) < 1e-4


def test_bad_config_is_one_line(tmp_path):
    for args, key in ((['model.nhead=5'], 'nhead'), (['training.optimizer.lr=fast'], 'lr'), (['model.dmodel=3'], 'd_model'),
                      ([f'data.train_path={tmp_path}/none.safetensors'], 'none.safetensors')):
        r = run('saxgpt.train', '--config', 'xsmall', f'training.output_dir={tmp_path}/out', *args, ok=False)
        assert r.returncode == 2 and r.stderr.strip().count('\n') == 0 and key in r.stderr, r.stderr
