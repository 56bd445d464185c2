"""What the data stages cost beside the bare libraries they are made of, from one run.

    python tests/benchmarks/bench_data.py [--minutes 2] [--threads 1] [--rounds 5] [--model NAME --repo FOLDER] [--codec encodec] [--json F]

Without `--model` the separator is a small untrained Demucs of the real class; `--model full` is one of the real size, untrained, too.
Ratios are of neighbouring runs, ours over bare: median, and lowest to highest.
"""
import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--minutes', type=float, default=2, help='of the mix that is separated, and of the demo corpus')
parser.add_argument('--rounds', type=int, default=5, help='interleaved runs of each')
parser.add_argument('--threads', type=int, default=1, help='of torch')
parser.add_argument('--splits', type=int, default=2, help='demucs.n_splits')
parser.add_argument('--shifts', type=int, default=1, help='demucs.n_shifts')
parser.add_argument('--model', default='tiny', help='tiny, full, or a name that Demucs knows')
parser.add_argument('--repo', help='folder of a local Demucs repository')
parser.add_argument('--codec', default='bundled', help='bundled, encodec or a folder')
parser.add_argument('--device', default='cpu', help='cpu or cuda')
parser.add_argument('--lengths', type=float, nargs='*', default=[10, 60], help='minutes of the files whose peak memory is measured')
parser.add_argument('--json', help='where to write all numbers')
parser.add_argument('--peak', nargs=2, help=argparse.SUPPRESS)     # a stage and its configuration: run it, print the peak
args = parser.parse_args()

for k in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ[k] = str(args.threads)

import numpy as np
import soundfile as sf
import torch
import yaml

from saxgpt.codecs.load import load_codec
from saxgpt.config import DataConfig, load_config
from saxgpt.data import codes, stems
from saxgpt.demo import make_corpus, tiny_demucs
from saxgpt.pipeline import run_pipeline

torch.set_num_threads(args.threads)
PATHS = dict(dl_dir='1', stems_dir='2', metadata_path='3.csv', clips_dir='4', aug_dir='5', codes_dir='6', datasets_dir='7')


def config(d, source, repo, model, **more):
    values = dict(source=str(source), data_paths={k: str(d/v) for k, v in PATHS.items()}, codec=args.codec,
                  demucs=dict(model=model, n_splits=args.splits, n_shifts=args.shifts) | (dict(repo=str(repo)) if repo else {}),
                  rms_window=dict(rms_threshold=.01), augmentation=dict(semitone_steps=[2], tempo_ratios=[.9])) | more
    path = d.with_suffix('.yaml')
    path.write_text(yaml.safe_dump(values))
    return path


def full_demucs(folder):
    "A repository with an untrained model of the size of htdemucs_6s."
    from demucs.htdemucs import HTDemucs
    torch.manual_seed(0)
    net = HTDemucs('drums bass other vocals guitar piano'.split(), segment=39/5, dconv_mode=3)
    folder.mkdir(parents=True, exist_ok=True)
    a, k = net._init_args_kwargs
    state = {n: t.half() for n, t in net.state_dict().items()}
    torch.save(dict(klass=HTDemucs, args=a, kwargs=k, state=state, training_args={}), folder/'full_untrained.th')
    (folder/'full_untrained_bag.yaml').write_text("models: ['full_untrained']\n")
    return 'full_untrained_bag'


def sounds(corpus, seconds, sr=44100):
    "A stereo mix of the corpus, over and over."
    import soxr
    x = np.concatenate([sf.read(f/'mix.wav', dtype='f4')[0] for f in corpus])
    x = soxr.resample(x, 32000, sr)
    x = np.tile(x, int(seconds*sr//len(x)) + 1)[:int(seconds*sr)]
    return np.stack([x, np.roll(x, 30)], 1)*.9


def write_long(path, corpus, seconds, sr, channels):
    "The corpus over and over, in blocks."
    x = sounds(corpus, 60, sr)[:, :channels]
    with sf.SoundFile(path, 'w', sr, channels) as f:
        for i in range(0, int(seconds), 60): f.write(x[:int(min(60, seconds - i)*sr)])


def clocked(f):
    "Seconds on the wall and of the processor, all threads."
    wall, cpu = time.perf_counter(), time.process_time()
    f()
    return dict(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def interleaved(ours, bare, anew):
    "Both in turns, after one of each that does not count: medians, and the ratio of neighbours."
    anew(); ours(); bare()
    runs = []
    for i in range(args.rounds):
        t = {}
        for name in ('ours', 'bare') if i % 2 else ('bare', 'ours'):
            if name == 'ours': anew()
            t[name] = clocked(ours if name == 'ours' else bare)
        runs.append(t)
    out = dict(runs=runs)
    for clock in 'wall', 'cpu':
        ratios = [t['ours'][clock]/t['bare'][clock] for t in runs]
        out[clock] = {k: median(t[k][clock] for t in runs) for k in ('ours', 'bare')} | dict(ratio=median(ratios), low=min(ratios), high=max(ratios))
    return out


def separation(d, corpus, repo, model):
    from demucs.api import Separator
    (d/'mixes').mkdir()
    sf.write(d/'mixes/mix.wav', sounds(corpus, 60*args.minutes), 44100)
    cfg = load_config(DataConfig, config(d/'separation', d/'mixes', repo, model))
    run_pipeline(cfg, only='download')
    separator = Separator(model, repo and Path(repo), device=args.device, shifts=args.shifts, overlap=1 - 1/args.splits)
    return interleaved(lambda: stems.run(cfg, device=args.device), lambda: separator.separate_audio_file(d/'mixes/mix.wav'),
                       lambda: shutil.rmtree(cfg.data_paths.stems_dir, ignore_errors=True))


def stages(d, corpus, repo, model):
    "Every stage over the corpus, one process: hours of work, seconds, and how many times faster than it plays."
    cfg = load_config(DataConfig, config(d/'stages', d/'corpus', repo, model))
    made = {o.stage: (o.made, o.seconds) for o in run_pipeline(cfg, args.device)}
    return cfg, {k: dict(hours=h or 0, seconds=s) for k, (h, s) in made.items()}


def tokenisation(cfg):
    clips = sorted(p.parent for f in (cfg.data_paths.clips_dir, cfg.data_paths.aug_dir) for p in Path(f).glob('*/clip.json'))
    codec = load_codec(args.codec, args.device)

    def bare():
        for clip in clips:
            for k, c in (('lead', codec), ('backing', codec.for_backing)): c.encode(torch.from_numpy(sf.read(clip/f'{k}.wav', dtype='f4')[0])[None, None])
    return dict(clips=len(clips)) | interleaved(lambda: codes.run(cfg, device=args.device), bare,
                                                lambda: shutil.rmtree(cfg.data_paths.codes_dir, ignore_errors=True))


def peak(stage, config_path):
    "Run one stage in this process; its highest resident memory in GB, on stdout."
    run = dict(stems=stems, codes=codes)[stage].run
    res = run(load_config(DataConfig, config_path), device=args.device)
    assert res['done'] and not res['failed'], res
    kb = next(int(l.split()[1]) for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('VmHWM'))
    print(kb*1024/1e9)


def memory(d, corpus, repo, model):
    "Peak memory of separation and tokenisation of one long file, each in a process of its own."
    found = {}
    for minutes in (.2, *args.lengths):
        at = d/f'peak {minutes:g}'
        (at/'source').mkdir(parents=True)
        write_long(at/'source/mix.flac', corpus, 60*minutes, 44100, 2)
        path = config(at/'data', at/'source', repo, model, demucs=dict(model=model, n_splits=1, n_shifts=0) | (dict(repo=str(repo)) if repo else {}))
        run_pipeline(load_config(DataConfig, path), only='download')
        clip = at/'data/4/clip'
        clip.mkdir(parents=True)
        for k in 'lead', 'backing': write_long(clip/f'{k}.wav', corpus, 60*minutes, 32000, 1)
        (clip/'clip.json').write_text(json.dumps(dict(clip='clip', recording='long', augmentation='', start_s=0, stop_s=60*minutes,
                                                      duration_s=60*minutes, sample_rate=32000)))
        for stage in 'stems', 'codes':
            call = [sys.executable, __file__, *sys.argv[1:], '--peak', stage, str(path)]
            start = time.perf_counter()
            r = subprocess.run(call, capture_output=True, text=True)
            if r.returncode: sys.exit(f'{stage}, {minutes:g} min:\n{r.stderr}')
            found[f'{stage} {minutes:g} min'] = dict(peak_gb=float(r.stdout.split()[-1]), seconds=time.perf_counter() - start)
        shutil.rmtree(at)
    return found


def main():
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        repo = args.repo or (d/'repo' if args.model in ('tiny', 'full') else None)
        model = tiny_demucs(repo) if args.model == 'tiny' else full_demucs(repo) if args.model == 'full' else args.model
        corpus = make_corpus(d/'corpus', args.minutes, n_jobs=1, progress=False)
        out = dict(machine=dict(cores=os.cpu_count(), processor=platform.machine(), system=platform.system(), python=platform.python_version(),
                                torch=torch.__version__, threads=args.threads, device=args.device),
                   settings=dict(minutes=args.minutes, rounds=args.rounds, model=model, codec=args.codec, splits=args.splits, shifts=args.shifts))
        print(' '.join(f'{k}={v}' for k, v in (out['machine'] | out['settings']).items()), flush=True)
        print(f'\n{"seconds: median of " + str(args.rounds):<30}{"":6}{"ours":>9}{"bare":>9}{"ours/bare":>11}   lowest to highest')

        def show(name, r):
            for clock in 'wall', 'cpu':
                t = r[clock]
                print(f'{name:<30}{clock:<6}{t["ours"]:>9.2f}{t["bare"]:>9.2f}{t["ratio"]:>11.3f}   {t["low"]:.3f} to {t["high"]:.3f}', flush=True)
        r = out['separation'] = separation(d, corpus, repo, model)
        show(f'separation, {args.minutes:g} min', r)
        cfg, out['stages'] = stages(d, corpus, repo, model)
        out['stages']['stems, of a mix'] = dict(hours=args.minutes/60, seconds=r['wall']['ours'])
        r = out['tokenisation'] = tokenisation(cfg)
        show(f'tokenisation, {r["clips"]} clips', r)
        print(f'\n{"stage, in one process":<36}{"audio (h)":>9}{"time (s)":>9}{"x real time":>11}')
        for k, s in out['stages'].items():
            s['realtime'] = 3600*s['hours']/s['seconds']
            print(f'{k:<36}{s["hours"]:>9.3f}{s["seconds"]:>9.2f}{s["realtime"]:>11.3g}', flush=True)
        out['memory'] = memory(d, corpus, repo, model)
        print(f'\n{"one file, a process of its own":<36}{"peak (GB)":>9}{"time (s)":>9}')
        for k, m in out['memory'].items(): print(f'{k:<36}{m["peak_gb"]:>9.2f}{m["seconds"]:>9.1f}')
    if args.json: Path(args.json).write_text(json.dumps(out, indent=1))


if __name__ == '__main__': peak(*args.peak) if args.peak else main()
