"""Seconds from a click to sound in the studio, in a real browser on a real JupyterLab.

python tests/benchmarks/bench_studio.py                        # a table, as JSON
python tests/benchmarks/bench_studio.py --pictures nbs/images  # and the pictures of the documentation
"""
import argparse
import base64
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from browser import Chromium
from test_studio import DECK, STATUS, button, enter, jupyter


def picture(b, path):
    "The studio as it looks now."
    box = b.js("(e => [e.x, e.y, e.width, e.height])(document.querySelector('.saxgpt-studio').getBoundingClientRect())")
    clip = dict(zip(('x', 'y', 'width', 'height'), box)) | dict(scale=1)
    data = base64.b64decode(b('Page.captureScreenshot', clip=clip)['data'])
    Image.open(io.BytesIO(data)).convert('RGB').quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def mark(b, first, last):
    "Draw a stroke over bars, from 1."
    left, top, _, _ = b.at("document.querySelector('.saxgpt-sheet')")
    bars, scale = b.js(f'[{DECK}.backing.bars, [...{DECK}.views][0].scale]')
    x = [left + bars[i]*scale for i in (first - 1, last - 1)]
    b.mouse('mousePressed', x[0] + 5, top + 100)
    for to in (x[0] + 20, x[1] - 5, x[1] + 12): b.mouse('mouseMoved', to, top + 100)
    b.mouse('mouseReleased', x[1] + 12, top + 100)


def on_a_phone(b, shot):
    b('Emulation.setDeviceMetricsOverride', width=390, height=2000, deviceScaleFactor=1, mobile=True)
    b.until("document.querySelector('.saxgpt-studio').getBoundingClientRect().width < 390")
    shot()
    b('Emulation.setDeviceMetricsOverride', width=1200, height=900, deviceScaleFactor=1, mobile=False)
    b.until("document.querySelector('.saxgpt-studio').getBoundingClientRect().width > 500")


def measured(b, pictures):
    times, t0 = dict(cores=os.cpu_count(), load=os.getloadavg()[0]), time.monotonic()
    def shot(name): return pictures and picture(b, pictures/f'studio-{name}.png')
    shot('fresh')
    for name, text in ('first take', 'Play a solo'), ('another', 'Another'):
        old, t0 = b.js(f'{DECK}.current'), time.monotonic()
        b.click(button(text))
        b.until(f'{DECK}.running && {DECK}.current !== {json.dumps(old)} && {DECK}.ctx.currentTime > {DECK}.origin')
        times[f'{name}: click to sound'] = time.monotonic() - t0
        if name == 'first take':
            b.until(f'{DECK}.running && {DECK}.position > 9 && {DECK}.take.have > {DECK}.position + 1', 600)
            shot('playing')
        b.until(f'{DECK}.take.done', 600)
        times[f'{name}: all {b.js(f"{DECK}.take.have"):.1f} s made'] = time.monotonic() - t0
        b.until(f"!{STATUS}.textContent.startsWith('Playing') && [...document.querySelectorAll('.saxgpt-scores')].every(e => e.textContent.includes('%'))", 600)
        times[f'{name}: scored'] = time.monotonic() - t0
    b.until(f'!{DECK}.running', 120)
    mark(b, 5, 8)
    shot('takes')
    if pictures: on_a_phone(b, lambda: shot('phone'))
    mark(b, 5, 12)
    t0 = time.monotonic()
    b.click(button('Redo bars'))
    b.until(f"{DECK}.take.name.endsWith('bars 5-12') && {DECK}.running", 600)
    times['redo of 8 bars: click to sound'] = time.monotonic() - t0
    return {k: round(v, 2) for k, v in times.items()}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--pictures', type=Path)
    pictures = parser.parse_args().pictures
    with tempfile.TemporaryDirectory() as folder, jupyter(Path(folder)) as (url, _):
        t0, b = time.monotonic(), Chromium(Path(folder)/'browser')
        try:
            enter(b, url)
            print(json.dumps({'page and studio open': round(time.monotonic() - t0, 2)} | measured(b, pictures), indent=2))
        finally: b.close()
