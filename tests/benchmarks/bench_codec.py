"""What a codec keeps of saxophones it has not heard: other tunings, rooms, levels, telephones, noise, and other instruments.

    python tests/benchmarks/bench_codec.py [--codec bundled] [--tunes 6] [--seed 91]

Solos of the demo corpus, 15 s each, with a seed of their own. "Pitch kept" is the share of frames voiced in the original whose
pitch, by pYIN, is within 50 cents of it after the round trip.
"""
import argparse

import numpy as np
import torch
from scipy.signal import butter, fftconvolve, sosfilt

from saxgpt.codecs.load import load_codec
from saxgpt.demo import _frame, compose
from saxgpt.music.soundfont import load_font
from saxgpt.music.synth import render_lead
from saxgpt.training.fit_codec import mel_distance, voiced_pitch

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--codec', default='bundled', help='bundled, encodec or a folder')
parser.add_argument('--tunes', type=int, default=6, help='solos for each line')
parser.add_argument('--seed', type=int, default=91, help='of the tunes; the bundled codec has heard those of seed 1')
SR, SECONDS = 32_000, 15


def kept(x, y):
    "Frames whose pitch is still within 50 cents, and frames that had one"
    (a, voiced), (b, still) = voiced_pitch(x, 1600), voiced_pitch(y, 1600)
    n = min(len(a), len(b))
    cents = 1200*np.abs(np.log2(np.where(still, b, 1.)[:n]/np.where(voiced, a, 1.)[:n]))
    return (voiced[:n] & still[:n] & (cents <= 50)).sum(), voiced[:n].sum()


def tuned(x, rng): return np.interp(np.arange(0, len(x) - 1, 2**(50/1200)), np.arange(len(x)), x)
def softer(x, rng): return x/10
def telephone(x, rng): return sosfilt(butter(4, [300, 3400], 'band', fs=SR, output='sos'), x)
def noisy(x, rng): return x + rng.standard_normal(len(x))*np.sqrt((x**2).mean())/10
def room(x, rng):
    m = int(.6*SR)
    tail = rng.standard_normal(m)*np.exp(-6.9*np.arange(m)/m)
    return x + .4*fftconvolve(x, tail)[:len(x)]/np.sqrt((tail**2).sum())


LINES = {'as it is': (None, lambda x, rng: x), 'a quarter tone high': (None, tuned), 'in a room of 0.6 s': (None, room),
         '20 dB softer': (None, softer), '300 to 3400 Hz': (None, telephone), 'noise 20 dB below': (None, noisy)}
LINES |= {name: (program, lambda x, rng: x) for name, program in
          {'soprano saxophone': 64, 'baritone saxophone': 67, 'clarinet': 71, 'flute': 73, 'trumpet': 56, 'violin': 40}.items()}

if __name__ == '__main__':
    args = parser.parse_args()
    codec, tunes = load_codec(args.codec), [compose(_frame(args.seed, i)[0], 20.) for i in range(args.tunes)]
    print(f'{"":20}pitch kept   log-mel distance')
    for name, (program, change) in LINES.items():
        rng, counts, far = np.random.default_rng(0), np.zeros(2), []
        for t in tunes:
            x = render_lead(load_font(), t.program if program is None else program, t.lead, round(t.duration*SR))[0, SR:SR*(1 + SECONDS)]
            x = np.asarray(change(x*(.07/np.sqrt((x**2).mean())), rng), 'f4')
            y = codec.decode(codec.encode(torch.from_numpy(x)[None, None]))[0].cpu().numpy()
            counts += kept(x[None], y)
            far.append(mel_distance(x[None], y))
        print(f'{name:20}{counts[0]/counts[1]:10.1%}{np.mean(far):15.2f} dB', flush=True)
