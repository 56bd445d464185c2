"""One part of what tests/benchmarks/gpu.sh checks and measures on an NVIDIA card: python tests/benchmarks/bench_gpu.py PART [--out out/gpu]

Parts: machine, codes, attention, training, find-batch, processes, and `report`, which joins what the parts and the two other benchmarks wrote.
Each writes OUT/PART.json, also where it fails, and ends with 0 only if all its checks hold. `--device cpu --tiny` rehearses all of it without a card;
then CUDA graphs are those of tests/cuda.py, a fake.
"""
import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

root = Path(__file__).resolve().parents[2]
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('part')
parser.add_argument('--out', default='out/gpu', help='folder of the results')
parser.add_argument('--device', default='cuda', choices=['cuda', 'cpu'])
parser.add_argument('--tiny', action='store_true', help='small sizes, for a rehearsal')
args = parser.parse_args()
warnings.simplefilter('ignore')
sys.path.insert(0, str(root/'tests'))

import torch  # noqa: E402

gpu, dev = args.device == 'cuda', torch.device(args.device)
TINY = dict(d_model=32, nhead=2, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=64)


def relative_error(out, ref): return float((out.double().cpu() - ref.double().cpu()).norm()/ref.double().norm())


def sync():
    if gpu: torch.cuda.synchronize()


def seconds(f, rounds=7):
    "Median seconds of `f`."
    times = []
    f()
    for _ in range(rounds):
        sync()
        t = time.perf_counter()
        f()
        sync()
        times.append(time.perf_counter() - t)
    return statistics.median(times)


def config(size='xsmall', **changes):
    from saxgpt.config import RunConfig, load_config
    more = {f'model.{k}': v for k, v in TINY.items()} if args.tiny else {}
    return load_config(RunConfig, size, [f'{k}={json.dumps(v) if v is None else v}' for k, v in (more | changes).items()])


def a_model(size='xsmall'):
    from saxgpt.model.transformer import SaxGPT
    torch.manual_seed(0)
    return SaxGPT(config(size).model).eval()


def machine():
    "What the card is and what it can do at best."
    import saxgpt
    from saxgpt.training.throughput import peak_flops
    n = 2**20 if args.tiny else 2**28
    a, b = (torch.randn(n, device=dev) for _ in range(2))
    m = 256 if args.tiny else 8192
    x, y = (torch.randn(m, m, device=dev, dtype=torch.bfloat16) for _ in range(2))
    found = dict(device=torch.cuda.get_device_name() if gpu else 'cpu', memory_gb=torch.cuda.get_device_properties(0).total_memory/1e9 if gpu else None,
                 cards=torch.cuda.device_count(), torch=torch.__version__, cuda=torch.version.cuda, saxgpt=saxgpt.__version__, peak_flops=peak_flops(dev),
                 copy_gb_s=2*a.nbytes/seconds(lambda: b.copy_(a))/1e9, bf16_tflop_s=2*m**3/seconds(lambda: x @ y)/1e12)
    try:
        import flash_attn
        found['flash_attn'] = flash_attn.__version__
    except Exception as e: found['flash_attn'] = f'none ({type(e).__name__})'
    return found


@contextlib.contextmanager
def graphs():
    "CUDA graphs, on a CPU the fake ones."
    if gpu:
        yield
        return
    from cuda import fake_cuda
    with fake_cuda(): yield


@torch.inference_mode()
def codes():
    "fp32: logits of the card against the CPU's, steps one by one against a recorded graph, and solos drawn either way."
    from unittest import mock

    from saxgpt.model import decoding
    from saxgpt.patterns import delay
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    here, T = a_model(), 20 if args.tiny else 500
    there = a_model().to(dev)
    backing, lead = torch.randint(0, 2048, (2, 1, 4, T)).unbind(0)
    a, b = here(delay(backing), delay(lead)), there(delay(backing).to(dev), delay(lead).to(dev))
    flips = (a.argmax(-1) != b.argmax(-1).cpu()).float().mean()
    found = dict(cpu_error=relative_error(b, a), flips=float(flips))

    def play(kind):
        new = lambda self, model, memory: kind(model, model.init_cache(memory, self.tokens.shape[2]), len(memory.x))
        with mock.patch.object(decoding.Window, 'new_step', new):
            return decoding.generate_codes(there, backing.to(dev), [3, 4], guidance=2.).cpu()
    eager = play(decoding.Step)
    with graphs(): recorded = play(decoding.GraphStep)
    found['graph_flips'] = float((eager != recorded).float().mean())
    assert found['cpu_error'] < 1e-4 and flips < 1e-3, 'the card computes something else than the CPU'
    assert torch.equal(eager, recorded), 'a recorded step plays another solo'
    return found


def attention():
    "Every backend against equation 1 in double precision, forward and backward."
    from saxgpt.model import attention as A
    found, names = {}, ['sdpa', 'plain'] + ['flash']*bool(gpu and A.flash_attn_func)
    for half in (torch.float32, torch.float16, torch.bfloat16):
        for causal, S in ((False, 130), (True, 130), (True, 64)):
            q, k, v, d = (torch.randn(2, 4, n, 64, dtype=half).double() for n in (S, 130, 130, S))
            xs = [t.requires_grad_() for t in (q, k, v)]
            y = A.reference_attention(*xs, causal=causal)
            ref = (y, *torch.autograd.grad(y, xs, d))
            for name in names:
                if name == 'flash' and half is torch.float32: continue
                xs = [t.detach().to(dev, half).requires_grad_() for t in (q, k, v)]
                y = A.attention(*xs, causal=causal, backend=name)
                out = (y, *torch.autograd.grad(y, xs, d.to(dev, half)))
                key = f'{name} {str(half)[6:]}'
                found[key] = max(found.get(key, 0), *(relative_error(o.detach(), r.detach()) for o, r in zip(out, ref)))
    if gpu and not A.flash_attn_func: found['flash'] = 'not installed'
    most = dict(float32=2e-3, float16=5e-3, bfloat16=3e-2)     # fp32 may be tf32 where the user allows it
    for key, e in found.items():
        assert isinstance(e, str) or e < most[key.split()[1]], f'{key}: relative error {e:.1e}'
    return found


def training():
    "Steps in every precision: the loss falls, a bad batch is survived in fp16, and a step waits for the card nowhere."
    from torch.utils.data import DataLoader

    from saxgpt.training.dist import World
    from saxgpt.training.loop import Trainer
    S, found = (40, {}) if args.tiny else (500, {})
    torch.manual_seed(0)
    lead = torch.randint(0, 2048, (8, 4, S))
    batch = dict(backing=lead.roll(1, 0), lead=lead, valid=torch.ones_like(lead, dtype=torch.bool))
    precisions = ['fp32', 'bf16'] + ['fp16']*gpu
    for precision in precisions:
        cfg = config(**{'training.precision': precision, 'training.max_steps': 40, 'training.scheduler.warmup_steps': 5,
                        'data.train_path': 'x', 'data.val_path': None})
        trainer = Trainer(cfg, DataLoader([0]*8), None, World(device=dev))
        losses = [trainer.train_step([batch]).mean() for _ in range(6 if args.tiny else 30)]
        losses = [float(x) for x in losses]
        found[precision] = dict(first=losses[0], last=losses[-1])
        assert losses[-1] < losses[0], f'{precision}: the loss went from {losses[0]:.2f} to {losses[-1]:.2f}'
        if gpu and precision != 'fp16':                        # the scaler has to look at its gradients
            torch.cuda.set_sync_debug_mode('error')
            try: trainer.train_step([{k: v.pin_memory() for k, v in batch.items()}])
            finally: torch.cuda.set_sync_debug_mode('default')
            found[precision]['waits'] = 0
        if precision == 'fp16':
            before = [p.clone() for p in trainer.model.parameters()]
            trainer.scaler.update(2.**60)                      # all gradients overflow: the step has to be left out
            trainer.train_step([batch])
            assert not trainer.stepped and all(map(torch.equal, before, trainer.model.parameters())), 'fp16: an overflow moved the weights'
    return found


def command(*words):
    "The last lines of a command of SaxGPT that ended well."
    done = subprocess.run([sys.executable, '-m', *words], capture_output=True, text=True, timeout=240, cwd=root,
                          env=os.environ | ({} if gpu else dict(CUDA_VISIBLE_DEVICES='')))
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout.splitlines()[-6:]


def toy_words(out, **training):
    from kills import config_file, toy_data
    return list(map(str, config_file(toy_data(Path(out)/'toy'), Path(out)/'run', **training)))


def find_batch():
    "`saxgpt train --find-batch` ends with a batch."
    lines = command('saxgpt.train', '--find-batch', *toy_words(args.out))
    assert any('largest batch' in x for x in lines), lines
    return dict(lines=lines)


def processes():
    "Training on two cards; on a CPU in two processes. With one card there is nothing to do."
    if gpu and torch.cuda.device_count() < 2: return dict(left_out='one card')
    command('saxgpt.train', '--ddp', '--num-gpus', '2', *toy_words(args.out))
    from kills import whole_checkpoints
    found = whole_checkpoints(Path(args.out)/'run')
    assert found.get('last', 0) > 0, found
    return dict(steps=found['last'])


def read(name):
    try: return json.loads((Path(args.out)/f'{name}.json').read_text())
    except (OSError, ValueError): return None


def report():
    "All results in one file, and as a table."
    names = ('machine', 'codes', 'attention', 'training', 'find-batch', 'processes', 'decoding', 'learning')
    found = {k: read(k) for k in names}
    m = found['machine'] or {}
    lines = [f'{m.get("device", "?")}, torch {m.get("torch", "?")}, CUDA {m.get("cuda", "?")}, flash-attn {m.get("flash_attn", "?")}, '
             f'copies at {m.get("copy_gb_s", 0):.0f} GB/s, bf16 products at {m.get("bf16_tflop_s", 0):.0f} TFLOP/s', '', '| part | result |', '|---|---|']
    for k in names[:6]:
        r = found[k]
        said = 'did not end' if r is None else r.get('failed') or r.get('left_out') or 'holds'
        lines.append(f'| {k} | {said.splitlines()[-1]} |')
    playing = (found['decoding'] or {}).get('playing') or {}
    if playing:
        kinds = list(next(iter(playing.values())))
        lines += ['', '| guided steps a second | ' + ' | '.join(kinds) + ' |', '|---'*(len(kinds) + 1) + '|']
        lines += [f'| {size} | ' + ' | '.join(f'{r[k]:.0f}' for k in kinds) + ' |' for size, r in playing.items()]
    runs = (found['learning'] or {}).get('runs') or []
    if runs: lines += ['', '| training | frames a second | plain loop | MFU |', '|---|---|---|---|']
    for r in runs:
        mfu = f'{r["mfu"]:.1%}' if r.get('mfu') is not None else ''
        lines.append(f'| {r["size"]} {r["precision"]} {r["kind"]} | {r["wall"]["ours"]:.0f} | {r["wall"]["plain"]:.0f} | {mfu} |')
    (Path(args.out)/'gpu.md').write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))
    failed = [k for k in names if found[k] is None or 'failed' in found[k]]
    assert not failed, f'failed or did not end: {", ".join(failed)}'
    return found


PARTS = dict(machine=machine, codes=codes, attention=attention, training=training, processes=processes, report=report) | {'find-batch': find_batch}

if __name__ == '__main__':
    if args.part not in PARTS: parser.error(f'PART: one of {", ".join(PARTS)}')
    if gpu and not torch.cuda.is_available(): sys.exit('no NVIDIA card that torch can use; saxgpt doctor says more')
    Path(args.out).mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    try: found, status = PARTS[args.part](), 0
    except Exception as e:
        traceback.print_exc()
        found, status = dict(failed=f'{type(e).__name__}: {e}'), 1
    path = Path(args.out)/('gpu.json' if args.part == 'report' else f'{args.part}.json')
    path.write_text(json.dumps(found, indent=1))
    if args.part != 'report': print(f'{args.part}: {json.dumps(found)[:1500]} ({time.perf_counter() - begun:.0f} s)')
    sys.exit(status)
