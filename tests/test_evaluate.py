"The evaluation as its reader meets it: runs that are killed, a report in a real browser, the real FAD library."
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
import yaml

from browser import browser, need
from forks import another_server, warm
from saxgpt.codecs.base import CodecMismatch
from saxgpt.config import DataConfig, RunConfig, load_config, to_dict
from saxgpt.data.recordings import find_recordings, ingest
from saxgpt.data.splits import split_of
from saxgpt.demo import make_corpus
from saxgpt.evaluation.testset import make_plan
from saxgpt.metrics import mean_ci
from saxgpt.evaluation.fad import FadError, fad, library_points
from saxgpt.ops.files import read_jsonl, read_tensors, write_jsonl
from saxgpt.evaluation.fit import FIT
from saxgpt.evaluation.sweep import sweep
from saxgpt.pretrained import give_away, load_model
from saxgpt.takes.changes import STAY

# What cannot be reached is not waited for: a proxy that refuses is as good as no network.
offline = {k: 'http://127.0.0.1:9' for k in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY')} | dict(no_proxy='', NO_PROXY='')
cold = dict(os.environ, OMP_NUM_THREADS='1')
env = cold | warm('saxgpt.evaluate', 'saxgpt.evaluation.sweep', 'saxgpt.pipeline', *(f'saxgpt.data.{s}' for s in ('download', 'stems', 'segments', 'codes', 'splits')),
                  'librosa', 'matplotlib.pyplot', 'scipy.signal', 'torch._dynamo')
title = '<img src=x onerror="document.title=1"> & Söhne'


def run(*args, ok=True, env=env, **more):
    r = subprocess.run([sys.executable, '-m', *map(str, args)], capture_output=True, text=True, env=env | more)
    if ok: assert r.returncode == 0, r.stderr[-3000:]
    return r


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "A demo corpus taken to datasets by the pipeline, with folders of other names, and one recording with a wicked title."
    d = tmp_path_factory.mktemp('data')
    for folder in make_corpus(d/'corpus', 4, seed=5, n_jobs=1, progress=False):
        for p in folder.glob('*.wav'): sf.write(p, sf.read(p, stop=30*32_000, dtype='int16')[0], 32_000)     # half a minute of each will do
    ids = [ingest(r, d/'got')['id'] for r in find_recordings(d/'corpus')]
    seed = next(s for s in count() if sorted(split_of(i, s, .5, .3) for i in ids) == ['test', 'test', 'train', 'val'])
    paths = {k: str(d/v) for k, v in dict(dl_dir='got', stems_dir='stems', metadata_path='m.csv', clips_dir='cut', aug_dir='aug',
                                          codes_dir='codes',
                                          datasets_dir='sets').items()}
    c = to_dict(load_config(DataConfig, 'demo')) | dict(source=str(d/'corpus'), data_paths=paths)
    c['rms_window']['min_segment_seconds'] = 12.
    c['dataset'] |= dict(seq_len=200, stride=100)
    c['train_test_split'] = dict(val=.3, test=.5, seed=seed)
    (d/'data.yaml').write_text(yaml.safe_dump(c))
    run('saxgpt.pipeline', '--config', d/'data.yaml')
    lines = read_jsonl(d/'got/manifest.jsonl')
    write_jsonl(d/'got/manifest.jsonl', [line | dict(title=title) for line in lines])
    return d


def command(data, out, *more):
    return ['saxgpt.evaluate', '--config', 'demo', '--quick', '--windows', '6', '--fad-samples', '4', '--output-dir', out,
            f'data.test_path={data}/sets/test.safetensors',
            f'data.made_by={data}/data.yaml', *more]


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('whole')
    said = run(*command(data, out), env=cold).stdout
    return out, json.loads((out/'results.json').read_text()), said


def test_says_the_truth(whole):
    out, results, said = whole
    [m], d = results['models'], results['dataset']
    assert (d['truth'], d['sounds']) == ('known', 'recorded')
    exact = m['cache']['float32']
    assert exact['first_divergence'] is None and exact['consistency'] == 1 and exact['tolerance'] < 1e-3
    assert 0 < m['cache']['bfloat16']['tolerance'] < 2
    assert m['prediction']['gap_shuffled']['mean'] > 0 and m['prediction']['cross_entropy']['true']['mean'] < 3
    for k in ('note_in_chord', 'note_in_scale', 'onset_alignment'):
        assert m['fit'][k]['real']['mean'] > m['fit'][k]['shuffled']['low'], k
        assert abs(m['fit'][k]['real']['mean'] - np.mean([w['real'][k]
                                                          for w in results['samples']])) < 1e-9 and m['fit'][k]['real']['n'] == 4
    f = m['fad']['codec']
    assert f['n'] == 4 and f['real_real'] and f['real_roundtrip'] and f['played_roundtrip'] and len(f['reference_hash']) == 16
    assert f['value'] > f['real_roundtrip']['value'], 'the codec does less harm than the model'
    assert set(m['apa']) == {'real', 'shuffled', 'model', 'silence'} and 0 < m['fit']['beat_chance']['model']['mean'] < 1
    assert d['split'] == 'test' and 'note:' not in said
    alike = {n: [r['name'] for r in m['sampling'] if r['n'] == n] for n in (4, 2)}
    assert all({'real', 'played'} <= set(names) for names in alike.values()), 'each lot beside real solos of its size'
    assert len(m['sampling']) >= 9
    spoilt = results['spoilt']
    assert spoilt['note_in_chord']['tritone']['mean'] < spoilt['note_in_chord']['real']['mean'] - .1
    assert spoilt['onset_alignment']['late']['mean'] < spoilt['onset_alignment']['real']['mean'] - .1
    assert 'What the metrics see here' in (out/'report.html').read_text()
    assert m['sampling'][0]['accuracy']['mean'] == 1 and 'notes in the chord' in said and 'FAD (codec)' in said
    assert set(json.loads((out/'timing.json').read_text())) >= {'predict', 'cache', 'solos', 'sounds', 'fit', 'fad', 'apa'}


def test_interrupted_killed_and_started_again_ends_the_same(data, whole, tmp_path):
    args = [sys.executable, '-m', *map(str, command(data, tmp_path/'cut'))]

    def start_and_stop(how, stage, n):
        p = subprocess.Popen(args, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
        while p.poll() is None and len(list((tmp_path/'cut/items'/stage).glob('*.json'))) < n: time.sleep(.02)
        assert p.poll() is None, 'finished before it could be stopped'
        p.send_signal(how)
        said = p.communicate()[1]
        assert not (tmp_path/'cut/results.json').exists()
        return p.returncode, said
    code, said = start_and_stop(signal.SIGINT, 'fit', 2)
    assert code == 130 and 'goes on from there' in said.splitlines()[-1] and 'Traceback' not in said, said
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path/'cut/items').rglob('*.json')}
    start_and_stop(signal.SIGKILL, 'solos', 1)
    run(*command(data, tmp_path/'cut'))
    assert (tmp_path/'cut/results.json').read_bytes() == (whole[0]/'results.json').read_bytes()
    assert kept and all(p.stat().st_mtime_ns == t for p, t in kept.items()), 'what was done is not done again'


def test_two_checkpoints_side_by_side(data, whole, tmp_path):
    model = load_model('bundled')[0]
    w = model.heads.proj.weight
    with torch.no_grad(): w[-len(w)//4:].zero_()           # knows nothing about the last codebook
    give_away(model, tmp_path/'worse')
    shutil.copytree(whole[0], tmp_path/'out')                    # its pieces serve here, too
    run(*command(data, tmp_path/'out', '--against', tmp_path/'worse'))
    both = json.loads((tmp_path/'out/results.json').read_text())
    assert both['models'][0] == whole[1]['models'][0] and len(both['models']) == 2
    loss = both['difference']['cross_entropy']
    mine, theirs = (m['prediction']['cross_entropy']['true'] for m in both['models'])
    assert loss['high'] < 0 and abs(loss['mean'] - (mine['mean'] - theirs['mean'])) < 1e-6
    assert loss['high'] - loss['low'] < mine['high'] - mine['low']
    means, ends = ({k: both['difference'][k][k2] for k in FIT} for k2 in ('mean', 'low'))
    for k in FIT:
        d = [s['model'][k] - s['against'][k] for s in both['samples']]
        want = mean_ci(d, both['plan']['draws'], [s['recording'] for s in both['samples']])
        assert (means[k], ends[k]) == (want['mean'], want['low']), 'intervals of differences are over recordings, too'
    page = (tmp_path/'out/report.html').read_text()
    assert 'Paired differences' in page and 'generated, against solo' in page


def make_checkpoint(folder, codec_hash=None, **model):
    "The bundled weights, or random ones where they do not fit, under another config."
    from saxgpt.config import RunConfig, parse
    from saxgpt.model.transformer import SaxGPT
    m = load_model('bundled')[0]
    about = json.loads(json.dumps(m.about))
    about['config']['model'].update(model)
    if codec_hash: about['codec_hash'] = codec_hash
    if 'd_model' in model: m = SaxGPT(parse(RunConfig, about['config']).model).eval()
    m.about = about
    give_away(m, folder)
    return folder


def test_the_same_weights_under_another_config_are_another_model(data, tmp_path):
    same, other = make_checkpoint(tmp_path/'same'), make_checkpoint(tmp_path/'unscaled', scale_embeddings=False)
    assert len({json.loads((p/'hashes.json').read_text())['model.safetensors'] for p in (same, other)}) == 1
    r = run(*command(data, tmp_path/'out', '--checkpoint', same, '--against', other, '--windows', '2', '--fad-samples', '2',
             '--seconds', '1'))
    results = json.loads((tmp_path/'out/results.json').read_text())
    assert abs(results['difference']['cross_entropy']['mean']) > .1, r.stdout


def test_a_second_checkpoint_is_looked_at_first_and_the_shorter_one_sets_the_length(data, tmp_path):
    for against, says in (tmp_path/'none', 'none'), (make_checkpoint(tmp_path/'foreign', codec_hash='another'),
                                                     f'{tmp_path}/foreign: made with codec'):
        r = run(*command(data, tmp_path/'out', '--against', against), ok=False)
        assert r.returncode == 2 and says in r.stderr and not list((tmp_path/'out').rglob('*.json')), 'refused before anything is measured'
    small = make_checkpoint(tmp_path/'small', d_model=32, nhead=2, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=32,
                            max_seq_len=120, condition_dropout=0.)
    said = run(*command(data, tmp_path/'out', '--against', small, '--windows', '2', '--fad-samples', '2', '--seconds', '3')).stdout
    results = json.loads((tmp_path/'out/results.json').read_text())
    assert results['dataset']['seconds'] == 2.3 and 'reads no more' in said and str(small) in results['dataset']['limited_by']
    assert [m['prediction']['gap_null'] is None for m in results['models']] == [False,
        True], 'no backing is nothing to a model that never went without'
    r = run(*command(data, tmp_path/'val', '--windows', '2', '--fad-samples', '2', '--seconds', '1'),
            f'data.val_path={data}/sets/test.safetensors', 'data.test_path=')
    assert 'validation set' in r.stdout and 'validation set' in (tmp_path/'val/report.html').read_text()


def test_a_fault_of_the_cache_is_seen(data, whole):
    from saxgpt.evaluate import summary
    from saxgpt.evaluation.report import report
    wrong = json.loads(json.dumps(whole[1]))
    wrong['models'][0]['cache']['float32'] |= dict(consistency=.41, first_divergence=5)
    assert 'the cached decoding is wrong' in summary(wrong) and report(wrong, {}, []).count('class="bad"') == 2
    assert 'wrong' not in summary(whole[1]) and 'class="bad"' not in (whole[0]/'report.html').read_text()


def test_recordings_without_truth_and_a_library_without_weights(data, tmp_path):
    "A dataset by itself, as of one's own recordings whose intermediates are gone; and no network."
    (tmp_path/'sets').mkdir()
    shutil.copy(data/'sets/test.safetensors', tmp_path/'sets')
    r = run('saxgpt.evaluate', '--config', 'demo', '--quick', '--windows', '4', '--fad-samples', '2', '--output-dir', tmp_path/'out',
            '--embedders', 'codec,vggish',
            f'data.test_path={tmp_path}/sets/test.safetensors', TORCH_HOME=str(tmp_path/'torch'), HF_HOME=str(tmp_path/'hf'), **offline)
    results = json.loads((tmp_path/'out/results.json').read_text())
    assert results['dataset']['truth'] == 'estimated' and results['dataset']['sounds'] == 'decoded from the codes'
    fads = results['models'][0]['fad']
    assert fads['codec']['real_roundtrip'] is None and fads['codec']['value'] > 0
    assert 'vggish' in fads['vggish']['error'] and '\n' not in fads['vggish']['error'] and fads['vggish']['error'] in r.stdout
    assert results['models'][0]['fit']['note_in_chord']['real']['mean'] > 0


@pytest.mark.parametrize('args, says', [
    (('--fad-samples', '1'), 'fad-samples'), (('--embedders', 'mfcc'), 'vggish'), (('--seed', '-1'), 'seed'),
    (('--temperature', '-1'), 'temperature'),
    (('--checkpoint', 'no/such/folder'), 'no/such/folder'), (('data.test_path=none.safetensors',), 'none.safetensors'),
    (('data.made_by=none.yaml',), 'none.yaml')])
def test_mistakes_are_one_line(data, tmp_path, args, says):
    r = run(*command(data, tmp_path/'out'), *args, ok=False)
    assert r.returncode == 2 and r.stderr.strip().count('\n') == 0 and says in r.stderr, r.stderr


# the report in a browser

def test_report_in_a_browser(whole, browser, tmp_path):
    shutil.copy(whole[0]/'report.html', tmp_path/'alone.html')           # it needs nothing that lies beside it
    browser('Page.navigate', url=f'file://{tmp_path}/alone.html')
    for _ in range(300):
        if browser.js('document.readyState') == 'complete' and browser.js('location.protocol') == 'file:': break
        time.sleep(.1)
    played = browser.js('''(async () => { const out = [];
        for (const a of document.querySelectorAll('audio')) {
            await a.play(); const t = Date.now();
            while (a.currentTime < .15 && Date.now() - t < 20000) await new Promise(r => setTimeout(r, 50));
            a.pause(); out.push([a.duration, a.currentTime, a.error && a.error.message]); }
        return out })()''')
    assert len(played) == 5*3 and all(3.5 < d < 4.6 and t >= .15 and not e for d, t, e in played), played
    assert browser.js("document.querySelector('h3').textContent").startswith(title) and browser.js('document.title').startswith('SaxGPT')
    assert browser.js("document.querySelectorAll('section img, section script').length") == 0
    assert browser.js("document.querySelectorAll('svg').length") >= 2 and browser.js("document.querySelectorAll('table').length") >= 8
    urls = [r['request']['url'] for r in browser.said('Network.requestWillBeSent')]
    assert all(u.startswith(('file:', 'data:', 'about:')) for u in urls), [u[:80] for u in urls]
    for kind in ('Log.entryAdded', 'Runtime.consoleAPICalled', 'Runtime.exceptionThrown'): assert not browser.said(kind)


def test_report_on_a_phone_and_in_the_dark(whole, browser):
    browser('Emulation.setDeviceMetricsOverride', width=360, height=740, deviceScaleFactor=2, mobile=True)
    colors = {}
    for scheme in ('light', 'dark'):
        browser('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=scheme)])
        browser('Page.navigate', url=f'file://{whole[0]}/report.html')
        for _ in range(300):
            if browser.js('document.readyState') == 'complete' and browser.js('location.protocol') == 'file:': break
            time.sleep(.1)
        assert browser.js('document.documentElement.scrollWidth') <= 360, 'the page is wider than the phone'
        colors[scheme] = browser.js("['body', 'svg text'].map(s => getComputedStyle(document.querySelector(s)))"
                                    ".map((c, i) => i ? c.fill : c.backgroundColor)"
                                    ".map(c => c.match(/\\d+/g).slice(0, 3).map(Number).reduce((a, b) => a + b))")
    (paper, ink), (night, chalk) = colors['light'], colors['dark']
    assert paper > 600 > 200 > ink and night < 200 < 600 < chalk, colors


# the real library, with random weights in the place of what it would fetch

def small_hub(home):
    "What CLAP's code asks a hub for when it is imported and built: three tokenizers and a text model, all tiny."
    from transformers import RobertaConfig, RobertaModel
    words = ['<s>', '<pad>', '</s>', '<unk>', '<mask>', 'a']
    for name in ('roberta-base', 'facebook/bart-base', 'bert-base-uncased'):
        repo = home/'hub'/f"models--{name.replace('/', '--')}"
        for file, text in {'refs/main': '0', 'snapshots/0/vocab.json': json.dumps({w: i for i, w in enumerate(words)}),
                           'snapshots/0/merges.txt': '#version: 0.2\n',
                           'snapshots/0/vocab.txt': '[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na',
                           'snapshots/0/config.json': json.dumps(dict(model_type=name.split('/')[-1].split('-')[0]))}.items():
            (repo/file).parent.mkdir(parents=True, exist_ok=True)
            (repo/file).write_text(text)
    small = RobertaConfig(vocab_size=len(words), num_hidden_layers=1, intermediate_size=8, max_position_embeddings=80)
    RobertaModel(small).save_pretrained(home/'hub/models--roberta-base/snapshots/0')


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "Checkpoints as the library fetches them. VGGish comes as a repository: that one is a stand-in for its code, too."
    need(importlib.util.find_spec('frechet_audio_distance'), 'frechet-audio-distance is not installed (make env does it)')
    d = tmp_path_factory.mktemp('hub')
    torch.manual_seed(0)
    small_hub(d/'hf')
    # What the library imports takes longer than what it computes here, and its part for CLAP asks a hub when it is imported.
    offline_hub = dict(HF_HOME=str(d/'hf'), HF_HUB_OFFLINE='1')
    with pytest.MonkeyPatch.context() as m, another_server():
        for k, v in (offline_hub | warm('frechet_audio_distance')).items(): m.setenv(k, v)
        make_weights(d)
        yield d


def make_weights(d):
    from encodec import EncodecModel
    code = ("import sys, torch; torch.manual_seed(0)\n"
            "from frechet_audio_distance.models.pann import Cnn14\n"
            "m = Cnn14(sample_rate=32000, window_size=1024, hop_size=320, mel_bins=64, fmin=50, fmax=16000, classes_num=527)\n"
            "torch.save(dict(model=m.state_dict()), sys.argv[1])\n"
            "from laion_clap import CLAP_Module\n"
            "m = CLAP_Module(device='cpu').model.state_dict()\n"
            "m['text_branch.embeddings.position_ids'] = torch.zeros(1)\n"                      # which its loader takes out
            "torch.save(dict(state_dict=m), sys.argv[2])")
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code, d/'Cnn14_mAP%3D0.431.pth', d/'630k-audioset-best.pt'], check=True,
                   capture_output=True)
    (d/'checkpoints').mkdir()
    torch.save(EncodecModel._get_model([1.5, 3., 6, 12., 24.], 24_000, 1, causal=True, model_norm='weight_norm',
                                       audio_normalize=False).state_dict(),
               d/'checkpoints/encodec_24khz-d7cc33bc.th')
    (d/'harritaylor_torchvggish_master').mkdir()
    (d/'harritaylor_torchvggish_master/hubconf.py').write_text(
        "dependencies = ['torch']\nimport torch\nfrom torch import nn\n\n"
        "class VGGish(nn.Module):\n    'A fake: the interface of torchvggish over random weights.'\n"
        "    def __init__(self):\n        super().__init__()\n        torch.manual_seed(0)\n        self.postprocess = True\n"
        "        self.embeddings = nn.Sequential(nn.Linear(160, 128), nn.ReLU())\n"
        "    def forward(self, x, fs):\n        x = torch.as_tensor(x).float()[:len(x)//15360*15360]\n"
        "        x = x.reshape(-1, 160, 96).square().mean(2)\n"
        "        return self.embeddings((x + 1e-6).log())\n\ndef vggish(**kwargs): return VGGish()\n")
@pytest.mark.parametrize('embedder, shape', [('pann', (4, 2048)), ('clap', (2, 512)), ('encodec', (1500, 128)), ('vggish', (20, 128))])
def test_the_real_library(weights, embedder, shape, tmp_path):
    rng = np.random.default_rng(0)
    n = 32000
    tones = [.1*np.sin(np.arange(n)*f*np.linspace(.9, 1.1, n))[None].astype('f4') for f in rng.uniform(.03, .1, 6)]
    noise = [.1*rng.standard_normal((1, k)).astype('f4') for k in (20*n, n, n, n, n, n)]
    got = fad(tones, noise, embedder=embedder, weights=weights, cache=tmp_path)
    points = max((read_tensors(p, 'np')[0]['points'] for p in tmp_path.iterdir()), key=len)      # of the long one
    assert abs(points.shape[0] - shape[0]) <= 4*(shape[0] > 9) and points.shape[1] == shape[1] and np.isfinite(points).all()
    least = 0 if embedder == 'encodec' else got['real_real']['value']       # with random weights that one hears hardly anything
    assert got['value'] > least and got['low'] < got['high'] < float('inf'), 'noise is farther from tones than tones are'
    assert got['dimensions'] == shape[1] and got['real_real']['n'] == 3 and got['n'] == 6


def test_a_library_that_cannot_fetch_says_so_in_a_line(tmp_path, monkeypatch):
    need(importlib.util.find_spec('frechet_audio_distance'), 'frechet-audio-distance is not installed (make env does it)')
    for k, v in offline.items(): monkeypatch.setenv(k, v)
    with pytest.raises(FadError) as e: library_points([np.zeros((1, 64000), 'f4')], 'pann', tmp_path)
    assert 'FAD with pann' in str(e.value) and '\n' not in str(e.value) and 'rror' in str(e.value)


# settings of the sampling

def test_sweep_plays_validation_tunes_once(data, tmp_path, monkeypatch):
    "The config's test set is not even looked at; what was played is not played again; solos are held to the chords, as the command's"
    import saxgpt.evaluate
    cfg = load_config(RunConfig, 'demo', [f'data.val_path={data}/sets/test.safetensors', f'data.test_path={tmp_path}/none.safetensors',
                                          f'data.made_by={data}/data.yaml'])
    played, real = [], saxgpt.evaluate.generate_codes
    def generate(*a, steer, **kw):
        played.append(kw)
        assert steer.weight == STAY and steer.temperature == kw['temperature']
        return real(*a, steer=steer, **kw)
    monkeypatch.setattr(saxgpt.evaluate, 'generate_codes', generate)
    bold, shy = (dict(temperature=t, top_k=250, top_p=0., guidance=g) for t, g in ((1., 2.), (.5, 1.)))
    plan = make_plan(samples=2, seconds=4.)
    def swept(*grid): return sweep(cfg, 'bundled', tmp_path/'out', grid, plan, progress=lambda x: x)
    one = swept(bold)
    assert played == [bold] and [r['name'] for r in one['rows']] == ['real', 'shuffled', 'played'] and one['windows'] == 2 and one['seconds'] == 4
    two = swept(bold, shy)
    assert played == [bold, shy] and two['rows'][:3] == one['rows'] and two['rows'][3]['temperature'] == .5
    assert two['rows'][3]['voiced'] != two['rows'][2]['voiced'] and json.dumps(two, allow_nan=False)
    with pytest.raises(CodecMismatch, match='foreign: made with'):
        sweep(cfg, make_checkpoint(tmp_path/'foreign', codec_hash='another'), tmp_path/'none', [bold], plan)
    r = run('saxgpt.evaluation.sweep', '--config', 'demo', '--n', 1, ok=False, env=cold)
    assert r.returncode == 2 and r.stderr == 'saxgpt: --n: given 1; at least 2\n', r.stderr
