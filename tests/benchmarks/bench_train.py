"""How fast our trainer trains, beside a plain PyTorch loop over the same model and data, measured in the same run.

    python tests/benchmarks/bench_train.py [--sizes xsmall small] [--device cuda] [--compile] [--steps 40] [--rounds 5] [--out F.json]

Ours is a whole `TrainingRun(cfg).fit()`, as the command runs it: its loader, moving average, log and safety checks, without validation; the clock
runs from the end of the last warm-up step to the end of the last step. The plain loop is `plain` below, with torch's own DataLoader. Rounds
alternate; the ratio is that of neighbours: median, lowest and highest, and the median by processor time, which other programs on the machine
disturb less. `wait` is the share of the time in which a step waits for its batch; `loader` is how fast the loader is when nothing waits for it
but the next batch, and `idle` the share of the time in which it has nothing to do, 1 - ours/loader.
"""
import argparse
import contextlib
import gc
import io
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--sizes', nargs='+', default=['xsmall', 'small'], help='bundled model configs')
parser.add_argument('--device', default='cpu', help='cpu or cuda')
parser.add_argument('--precisions', nargs='+', help='of fp32, bf16 and fp16; without it fp32 on a CPU, bf16 and fp16 on a GPU')
parser.add_argument('--compile', action='store_true', help='also with torch.compile')
parser.add_argument('--average', action='store_true', help='also ours without the moving average of the weights')
parser.add_argument('--seq-len', type=int, help='frames in a window; 500 on a CPU, 1500 on a GPU')
parser.add_argument('--batch', type=int, help='windows in a batch; 4 on a CPU, 16 on a GPU')
parser.add_argument('--accumulation', type=int, default=1, help='batches in a step')
parser.add_argument('--workers', type=int, help='loader processes; 0 on a CPU, 2 on a GPU')
parser.add_argument('--steps', type=int, default=20, help='that are timed, in a round')
parser.add_argument('--warm', type=int, default=5, help='steps before them')
parser.add_argument('--log-interval', type=int, default=10, help='steps from log line to log line')
parser.add_argument('--rounds', type=int, default=5, help='of which the median is taken')
parser.add_argument('--threads', type=int, default=min(2, os.cpu_count() or 1))
parser.add_argument('--out', help='where to write all numbers')
args = parser.parse_args()
gpu = args.device == 'cuda'
for name, cpu, cuda in (('precisions', ['fp32'], ['bf16', 'fp16']), ('seq_len', 500, 1500), ('batch', 4, 16), ('workers', 0, 2)):
    if getattr(args, name) is None: setattr(args, name, cuda if gpu else cpu)
if args.steps % args.log_interval or args.warm < 1: parser.error('--steps has to be a multiple of --log-interval, and --warm at least 1')
os.environ['OMP_NUM_THREADS'] = str(args.threads)
if not gpu: os.environ['CUDA_VISIBLE_DEVICES'] = ''
warnings.simplefilter('ignore')

import numpy as np  # noqa: E402  the number of threads comes first
import torch  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from saxgpt.config import RunConfig, load_config  # noqa: E402
from saxgpt.data.dataset import CodesDataset, make_loader  # noqa: E402
from saxgpt.ops.files import read_jsonl  # noqa: E402
from saxgpt.model.transformer import SaxGPT, next_step_loss  # noqa: E402
from saxgpt.training.dist import World  # noqa: E402
from saxgpt.training.run import TrainingRun  # noqa: E402

torch.set_num_threads(args.threads)
torch.set_flush_denormal(True)
dev, LAST = torch.device('cuda', 0) if gpu else torch.device('cpu'), args.warm + args.steps
FRAMES = args.steps*args.accumulation*args.batch*args.seq_len    # of solo, in the timed part of a round


def dataset(path):
    "Random codes, enough for one round without coming to the end of an epoch."
    n = (LAST + 2)*args.accumulation*args.batch
    rng, clips = np.random.default_rng(0), [dict(clip=f'{i}', recording=f'{i}', augmentation='') for i in range(n)]
    codes = {k: rng.integers(0, 2048, (4, n*args.seq_len), dtype=np.int16) for k in ('backing', 'lead')}
    meta = dict(codec_name='random', codec_hash='0', frame_rate='50', seq_len=str(args.seq_len), stride=str(args.seq_len), padding_idx='2048',
                settings='0', clips=json.dumps(clips))
    save_file(codes | dict(offsets=np.arange(n + 1, dtype=np.int64)*args.seq_len), path, meta)
    return path


def config(size, data, out, **training):
    t = dict(num_epochs=1, max_steps=LAST, batch_size=args.batch, gradient_accumulation_steps=args.accumulation, num_workers=args.workers,
             log_interval=args.log_interval, output_dir=out, use_pbar='false') | training
    values = {f'training.{k}': v for k, v in t.items()} | {'data.train_path': data, 'data.val_path': 'null', 'data.test_path': 'null',
                                                           'model.max_seq_len': max(1505, args.seq_len + 5)}
    return load_config(RunConfig, size, [f'{k}={v}' for k, v in values.items()])


def now():
    "Seconds on the wall and of the processor, all threads of this process."
    if gpu: torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


@contextlib.contextmanager
def quiet():
    "What both loops print goes nowhere, unless they fail."
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try: yield said
        except BaseException:
            sys.__stderr__.write(said.getvalue())
            raise


def ours(cfg):
    "Frames per second (on the wall, of the processor) of a run of our trainer, and what it logs of itself."
    run, at = TrainingRun(cfg, World(device=dev)), {}
    step = run.trainer.train_step

    def timed(*a, **kw):
        out = step(*a, **kw)
        if (n := timed.n + 1) in (args.warm, LAST): at[n] = now()
        timed.n = n
        return out
    timed.n, run.trainer.train_step = 0, timed
    assert run.fit() == 0, 'stopped'
    lines = [l for l in read_jsonl(run.sync.folder/'metrics.jsonl') if l['split'] == 'train' and l['step'] > args.warm]
    said = {k: median(l[k] for l in lines) for k in ('data_wait', 'mfu') if lines and lines[0].get(k) is not None}
    return FRAMES/(at[LAST] - at[args.warm]), said | dict(compiled=bool(run.state.compiled))


def plain(cfg):
    "The same of the loop that anybody would write."
    t, o = cfg.training, cfg.training.optimizer
    torch.manual_seed(0)
    model = SaxGPT(cfg.model).to(dev).train()
    net = torch.compile(model) if getattr(t, 'compile', False) else model
    half = dict(bf16=torch.bfloat16, fp16=torch.float16).get(t.precision)
    optimizer = torch.optim.AdamW(model.parameters(), o.lr, o.betas, o.eps, o.weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, LAST)
    scaler = torch.amp.GradScaler(dev.type, enabled=t.precision == 'fp16')
    batches = iter(DataLoader(CodesDataset(cfg.data.train_path), t.batch_size, shuffle=True, num_workers=t.num_workers, pin_memory=gpu))
    for step in range(1, LAST + 1):
        for _ in range(t.gradient_accumulation_steps):
            b = {k: v.to(dev, non_blocking=True) for k, v in next(batches).items()}
            with torch.autocast(dev.type, half, enabled=half is not None):
                loss = next_step_loss(net(b['backing'], b['lead']), b['lead'], b['valid'])[0]
            scaler.scale(loss/t.gradient_accumulation_steps).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), t.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step % t.log_interval == 0: print(step, loss.item())
        if step == args.warm: start = now()
    return FRAMES/(now() - start), {}


def loader_alone(cfg):
    "Frames a second that our loader gives when nobody uses them."
    loader = iter(make_loader(CodesDataset(cfg.data.train_path), args.batch, num_workers=args.workers, pin_memory=gpu))
    for _ in range(max(2, 4*args.workers)): next(loader)     # what the workers have prepared meanwhile does not count
    n, start = 0, time.perf_counter()
    for _ in loader: n += 1
    return n*args.batch*args.seq_len/(time.perf_counter() - start)


def measure(make, rounds):
    "Both in turns: rates, the ratio of neighbours and what ours says of itself."
    runs, said, memory = [], [], {}
    for i in range(rounds):
        pair = {}
        for kind in (ours, plain) if i % 2 else (plain, ours):
            gc.collect()
            if gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            with tempfile.TemporaryDirectory() as out, quiet():
                rate, more = kind(make(out, kind))
            pair[kind.__name__] = dict(zip(('wall', 'cpu'), rate.tolist()))
            if kind is ours: said.append(more)
            if gpu: memory[kind.__name__] = torch.cuda.max_memory_allocated()/1e9
        runs.append(pair)
    out = dict(runs=runs, compiled=[s['compiled'] for s in said], memory_gb=memory)
    for clock in ('wall', 'cpu'):
        ratios = [p['ours'][clock]/p['plain'][clock] for p in runs]
        out[clock] = {k: median(p[k][clock] for p in runs) for k in ('ours', 'plain')} | dict(ratio=median(ratios), low=min(ratios), high=max(ratios))
    return out | {k: median(s[k] for s in said if k in s) for k in {k for s in said for k in s} - {'compiled'}}


def show(r):
    "A line of the table."
    def share(k): return f'{r[k]:7.1%}' if k in r else f'{"-":>7}'
    w, name = r['wall'], ', '.join(filter(None, (r['size'], r['precision'], r['kind'])))
    span = f'{w["low"]:.3f} to {w["high"]:.3f}'
    line = f'{name:26}{w["ours"]:9.0f}{w["plain"]:9.0f}{w["ratio"]:12.3f}  {span:19}{r["cpu"]["ratio"]:11.3f}'
    line += f'{share("data_wait")}{r["loader"]:10.0f}{share("idle")}'
    if gpu: line += f'{share("mfu")}   {r["memory_gb"]["ours"]:.1f} {r["memory_gb"]["plain"]:.1f}'
    if r['kind'] == 'compiled' and not all(r['compiled']): line += f'   ours compiled in {sum(r["compiled"])} of {len(r["compiled"])}: it did not help'
    print(line, flush=True)


def main():
    machine = dict(device=torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(), cores=os.cpu_count(), torch=torch.__version__,
                   threads=args.threads)
    settings = {k: v for k, v in vars(args).items() if k not in ('out', 'threads')}
    print(' '.join(f'{k}={v}' for k, v in (machine | settings).items()), flush=True)
    heads = f'{"frames/s":26}{"ours":>9}{"plain":>9}{"ours/plain":>12}  {"lowest to highest":19}{"of cpu time":>11}{"wait":>7}{"loader":>10}{"idle":>7}'
    print('\n' + heads + f'{"MFU":>7}   GB, ours and plain'*gpu)
    out = dict(machine=machine, settings=settings, runs=[])
    known = type(config('xsmall', 'x', 'x').training).model_fields
    with tempfile.TemporaryDirectory() as folder:
        data = dataset(f'{folder}/train.safetensors')
        for size in args.sizes:
            alone = loader_alone(config(size, data, folder))
            for precision in args.precisions:
                for kind in ['', *['compiled']*args.compile, *['no average']*args.average]:
                    more = dict(compile='true') if kind == 'compiled' else dict(ema_decay=0) if kind else {}
                    if not set(more) <= set(known): continue
                    r = measure(lambda out, kind: config(size, data, out, precision=precision, **(more if kind is ours or 'compile' in more else {})), args.rounds)
                    r |= dict(size=size, precision=precision, kind=kind, loader=alone, idle=1 - r['wall']['ours']/alone)
                    out['runs'].append(r)
                    show(r)
                    if args.out: Path(args.out).write_text(json.dumps(out, indent=1))


if __name__ == '__main__': main()
