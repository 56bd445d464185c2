"""How fast the model plays and learns, against peers measured in the same run: python tests/benchmarks/bench_generate.py

Playing: steps a second at a context of 750 of 1,500 `--frames`, two rows for each solo as guidance has them, after transformers' MusicgenForCausalLM
with an EncoderDecoderCache (same width, depth, heads, memory and rows), our own model without a cache, and the floor: the bytes that a step must
read over the copy bandwidth of this machine. `command` is a step of `saxgpt generate` with all that belongs to it: guidance, sampling, control of
silence, steering by heard chords. Weights are random, rounded to float16 as those of a released checkpoint are, and for transformers as well, which
computes in float32 on a CPU; our kernels read what is exact in float16 as float16.
Learning: forward and backward against torch.nn.Transformer. Length: a step at several contexts. Medians of interleaved rounds.
"""
import argparse
import json
import os
import statistics
import time
import warnings

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--sizes', nargs='*', default=['demo', 'small', 'medium'], help='names of configs; demo: the bundled model')
parser.add_argument('--batches', nargs='+', type=int, default=[1, 8])
parser.add_argument('--frames', type=int, default=1500, help='of the tune; a step has half of them before it')
parser.add_argument('--threads', type=int, default=min(2, os.cpu_count() or 1))
parser.add_argument('--device', default='cpu')
parser.add_argument('--rounds', type=int, default=7, help='of which the median is taken')
parser.add_argument('--steps', type=int, default=16, help='in a round')
parser.add_argument('--train-sizes', nargs='*', default=['xsmall', 'small'])
parser.add_argument('--lengths', nargs='*', type=int, default=[500, 1500, 6000])
parser.add_argument('--no-compile', action='store_true', help='leave out what is compiled first')
parser.add_argument('--json', help='also write the numbers to this file')
args = parser.parse_args()
os.environ['OMP_NUM_THREADS'] = str(args.threads)
warnings.simplefilter('ignore')

import torch  # noqa: E402  the number of threads comes first
from torch import nn  # noqa: E402

from saxgpt.codecs.load import load_codec  # noqa: E402
from saxgpt.config import ModelConfig, RunConfig, load_config  # noqa: E402
from saxgpt.model.decoding import (GraphStep, SilenceControl, Step, Window, half_precision, kernels_for,  # noqa: E402
                                   pack_decoder_weights, single_thread_if_small)
from saxgpt.model.transformer import SaxGPT, next_step_loss  # noqa: E402
from saxgpt.sampling import DEFAULT_SAMPLING, Sampler  # noqa: E402
from saxgpt.takes.changes import hold_to_changes  # noqa: E402
from saxgpt.training.throughput import has_bf16  # noqa: E402

torch.set_num_threads(args.threads)
torch.manual_seed(0)
dev, FRAMES, AT = torch.device(args.device), args.frames, args.frames//2
gpu = dev.type == 'cuda'


def sync():
    if gpu: torch.cuda.synchronize()


def medians(runs, rounds=args.rounds):
    "Median seconds of each of the interleaved `runs`: name -> function."
    times = {k: [] for k in runs}
    for f in runs.values(): f()
    for _ in range(rounds):
        for k, f in runs.items():
            sync()
            t = time.perf_counter()
            f()
            sync()
            times[k].append(time.perf_counter() - t)
    return {k: statistics.median(v) for k, v in times.items()}


def codes(*shape): return torch.randint(0, 2048, shape, device=dev)


def model_of(size, **kw):
    cfg = load_config(RunConfig, size).model.model_dump() | dict(fusion='cross', dropout=0., condition_dropout=0.) | kw
    model = SaxGPT(ModelConfig(**cfg)).eval()
    model.heads.proj.weight.data *= 8                                      # logits as far apart as trained ones
    return pack_decoder_weights(model.half().float().to(dev))


def stepper(model, B, frames=FRAMES, at=AT, steps=args.steps, kind=GraphStep if gpu else Step):
    "A function that plays some steps, and the bytes that one of them reads."
    cache = model.init_cache(model.encode(codes(B, 4, frames + 4)), frames + 4)
    step, now = kind(model, cache, B), codes(B, 4)

    def run():
        for s in range(at, at + steps): step(now, s).argmax(-1)
    weights = sum(t.numel()*t.element_size() for part in (model.decoder, model.heads) for t in part.state_dict().values())
    weights -= sum(2*t.numel()*t.element_size()//3 for k, t in model.decoder.state_dict().items() if 'cross_attn.qkv' in k)  # of the memory's keys and values
    own = sum((c.k[:, :, :at].numel() + c.v[:, :, :at].numel())*c.k.element_size() for c in cache.self_kv)
    return run, weights + own + sum(t.nbytes for kv in cache.cross_kv for t in kv)


def commanded(model, n, steps=args.steps):
    "A function that plays some steps of `n` solos as the command does."
    s = DEFAULT_SAMPLING
    kernels, gens = kernels_for(FRAMES, model.null), [torch.Generator(dev).manual_seed(i) for i in range(n)]
    sampler = (kernels.KernelSampler if kernels else Sampler)(s['temperature'], s['top_k'], s['top_p'])
    codec = load_codec('bundled', device=dev)
    control, steer = SilenceControl(codec, n, s['guidance'], s['density'], dev), hold_to_changes(codec)
    with single_thread_if_small(model):
        window = Window(model, codes(1, 4, FRAMES), codes(n, 4, AT), lambda x: sampler(x, gens), s['guidance'], control=control, steer=steer)
        window.frames(AT, AT + steps - 2)

    def run():
        window.at = AT + 1
        with single_thread_if_small(model): window.frames(AT, AT + steps - 2)
    return run


def uncached(model, B, steps=1):
    backing, lead = codes(B, 4, FRAMES + 4), codes(B, 4, AT)
    memory = model.encode(backing)

    def run():
        for _ in range(steps): model.decode(memory, lead)[:, :, -1].argmax(-1)
    return run, steps


def musicgen(cfg, B, steps=args.steps, compiled=False):
    "transformers' decoder with the same sizes, its cache filled up to the same step."
    from transformers import MusicgenDecoderConfig, MusicgenForCausalLM
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
    c = MusicgenDecoderConfig(vocab_size=2048, max_position_embeddings=2048, num_hidden_layers=cfg.num_decoder_layers, ffn_dim=cfg.dim_feedforward,
                              num_attention_heads=cfg.nhead, hidden_size=cfg.d_model, num_codebooks=4, activation_function='relu', pad_token_id=2048)
    model = MusicgenForCausalLM(c).eval().half().to(dev, torch.bfloat16 if gpu else torch.float32)
    memory = torch.randn(B, FRAMES + 4, cfg.d_model, device=dev, dtype=model.dtype)
    kind = (lambda: StaticCache(config=c, max_cache_len=FRAMES + 4)) if compiled else (lambda: DynamicCache(config=c))
    past, ids = EncoderDecoderCache(kind(), DynamicCache(config=c)), codes(B*4, 1)
    forward = torch.compile(model.forward, mode='reduce-overhead') if compiled else model.forward
    model(input_ids=codes(B*4, AT), encoder_hidden_states=memory, past_key_values=past, use_cache=True)

    def run():
        for _ in range(steps): forward(input_ids=ids, encoder_hidden_states=memory, past_key_values=past, use_cache=True).logits[:, -1].argmax(-1)
    return run


def bandwidth():
    "Bytes a second of a large copy, read and written."
    a = torch.empty(2**28 if gpu else 2**26, dtype=torch.float32, device=dev)
    b = torch.empty_like(a)
    return 2*a.nbytes/medians(dict(copy=lambda: b.copy_(a)))['copy']


@torch.inference_mode()
def playing(out, keep):
    copy = bandwidth()
    print(f'\nplaying: steps a second (context {AT} of {FRAMES} frames; copy bandwidth {copy/1e9:.0f} GB/s)')
    mine = ['command', 'ours', *['light']*gpu]
    names = [*mine, 'no cache', 'transformers', *(['tr. compiled'] if gpu and not args.no_compile else []), 'floor']
    print(f'{"size":8}{"solos":>6}' + ''.join(f'{n:>15}' for n in names) + f'   over transformers: {", ".join(mine)}')
    for size in args.sizes:
        model = model_of(size)
        for B in args.batches:
            rows = 2*B
            (ours, read), (bare, n) = stepper(model, rows), uncached(model, rows)
            runs = dict(command=commanded(model, B), ours=ours, transformers=musicgen(model.cfg, rows))
            if gpu: runs['light'] = stepper(half_precision(model), rows)[0]
            if gpu and not args.no_compile: runs['tr. compiled'] = musicgen(model.cfg, rows, compiled=True)
            per = {k: args.steps/t for k, t in medians(runs).items()} | {'no cache': n/medians({'': bare}, 1)[''], 'floor': copy/read}
            print(f'{size:8}{B:6}' + ''.join(f'{per[n]:15.0f}' for n in names)
                  + '   ' + ' '.join(f'{per[n]/per["transformers"]:.2f}x' for n in mine), flush=True)
            out[f'{size} x {B}'] = per
            keep()


def learning(out):
    "Forward and backward, batch 4 of 1,504 steps (of 304 on a CPU), against torch.nn.Transformer with the same embedding and heads around it."
    S = 1504 if gpu else 304
    kinds = dict(ours=gpu) | (dict(bf16=True) if not gpu and has_bf16() else {})
    print(f'\nlearning: ms of forward and backward, 4 x {S} steps, ' + ('bfloat16' if gpu else 'float32, and ours in bfloat16 where the processor has it'))
    print(f'{"size":8}' + ''.join(f'{k:>10}' for k in kinds) + f'{"torch.nn":>10}{"ratio":>8}' + (f'{"TFLOP/s":>10}{"MFU":>8}' if gpu else ''))
    for size in args.train_sizes:
        model = model_of(size).train()
        c, backing, lead = model.cfg, codes(4, 4, S), codes(4, 4, S)
        valid, future = torch.ones(4, 4, S, dtype=torch.bool, device=dev), nn.Transformer.generate_square_subsequent_mask(S, device=dev)
        twin = nn.Transformer(c.d_model, c.nhead, c.num_encoder_layers, c.num_decoder_layers, c.dim_feedforward, 0., c.activation,
                              norm_first=True, bias=False, batch_first=True).to(dev).train()

        def whole(loss, half):
            def run():
                with torch.autocast(dev.type, torch.bfloat16, enabled=half): loss()[0].backward()
                for m in (model, twin): m.zero_grad()
            return run

        def ours():
            if gpu: return next_step_loss(model(backing, lead), lead, valid)
            return next_step_loss(model(backing, lead, False, False), lead, valid, model.heads)      # as the training loop does

        def theirs():
            return next_step_loss(model.heads(twin(model.embed_steps(backing), model.embed_steps(lead), tgt_mask=future, tgt_is_causal=True)), lead, valid)
        t = medians({k: whole(ours, half) for k, half in kinds.items()} | dict(twin=whole(theirs, gpu)))
        # 6 x weights x steps for the matrices (Kaplan et al. 2020), 12 x layers x S^2 x D for attention, of which the causal one is half
        attention = 12*S*S*c.d_model*(c.num_encoder_layers + 1.5*c.num_decoder_layers)
        matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and 'table' not in n)
        flops = 4*(6*matrices*S + attention)
        mfu = f'{flops/t["ours"]/1e12:10.1f}{flops/t["ours"]/989e12:8.1%}' if gpu else ''
        print(f'{size:8}' + ''.join(f'{1e3*v:10.1f}' for v in t.values()) + ' '.join(f'{t["twin"]/t[k]:7.2f}x' for k in kinds) + mfu, flush=True)
        out[size] = t | dict(flops=flops)
    if gpu: print('MFU over 989 TFLOP/s, the dense bfloat16 peak of an H100 SXM')


@torch.inference_mode()
def length(out):
    "One step with that much before it and around it, and how much of its time is attention."
    print('\nlength: ms of a step at the end of so many frames (small, batch 1)')
    for n in args.lengths:
        model = model_of('small', max_seq_len=n + 5)
        ours, read = stepper(model, 1, n, n - args.steps)
        out[str(n)] = medians(dict(ours=ours))['ours']/args.steps*1e3
        print(f'{n:6} frames{out[str(n)]:10.2f} ms, {read/1e6:.0f} MB read', flush=True)


if __name__ == '__main__':
    print(f'{args.device}, {args.threads} threads, torch {torch.__version__}')
    numbers = dict(playing={}, learning={}, length={}, threads=args.threads, device=args.device)

    def keep():
        if not args.json: return
        with open(args.json, 'w') as f: json.dump(numbers, f, indent=1)
    playing(numbers['playing'], keep)
    if args.train_sizes: learning(numbers['learning'])
    if args.lengths: length(numbers['length'])
    keep()
