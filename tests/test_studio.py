"The studio as a person uses it: a real JupyterLab in a real browser, with sound that advances."
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import mido
import numpy as np
import pytest
import soundfile as sf

from browser import Chromium, need
from saxgpt.audio import SAMPLE_RATE
from saxgpt.config import demo_backing

DECK = "document.querySelector('.saxgpt-deck').saxgpt"
STATUS = "document.querySelector('.saxgpt-status')"


def button(text): return f"[...document.querySelectorAll('.saxgpt-studio button')].find(e => e.textContent.trim() === '{text}')"


def field(label): return (f"[...document.querySelectorAll('.saxgpt-studio label')].find(e => e.textContent === '{label}')"
                          ".parentElement.querySelector('input, select')")


AREA = field('its chords').replace('input, select', 'textarea')                                    # for the changes of any backing
TYPED = f"[...document.querySelectorAll('.saxgpt-studio textarea')].find(e => e !== {AREA})"       # for a backing to be made


@contextmanager
def jupyter(d):
    "JupyterLab as `saxgpt studio` starts it, with settings of its own: its address, with the token, and its folder."
    own = {f'JUPYTER_{k}_DIR': str(d/k) for k in ('RUNTIME', 'CONFIG', 'DATA')} | {f'JUPYTERLAB_{k}_DIR': str(d/k) for k in ('SETTINGS', 'WORKSPACES')}
    (d/'work').mkdir()
    settings = d/'CONFIG/labconfig/default_setting_overrides.json'
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({'@jupyterlab/apputils-extension:notification': dict(fetchNews='false')}))
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    with open(d/'log', 'w') as log:
        p = subprocess.Popen([sys.executable, '-m', 'saxgpt.studio', '--no-browser', '--port', str(port)], cwd=d/'work',
                             env=dict(os.environ, OMP_NUM_THREADS='1', IPYTHONDIR=str(d/'ipython'), **own), stdout=log, stderr=log)
    try:
        end = time.monotonic() + 120
        while not (found := [*d.glob('RUNTIME/jpserver-*.json')]):
            assert time.monotonic() < end and p.poll() is None, (d/'log').read_text()
            time.sleep(.1)
        about = json.loads(found[0].read_text())
        yield f'{about["url"]}doc/tree/studio.ipynb?token={about["token"]}', d/'work'
    finally:
        p.terminate()
        try: p.wait(60)
        except subprocess.TimeoutExpired: p.kill()


def run_cell(b, n):
    "Press Shift and Enter in a cell, again where the page was not ready for it."
    cell = f"document.querySelectorAll('.jp-CodeCell')[{n}]"
    while True:
        b.click(f"{cell}.querySelector('.cm-content')")
        b.key('Enter', modifiers=8, number=13)
        try: return b.until(f"/[*0-9]/.test({cell}.querySelector('.jp-InputPrompt').textContent)", 5)
        except AssertionError: assert 'Idle' in b.js("document.body.textContent"), 'the kernel does not start'


def enter(b, url):
    "Open the notebook in a browser and run its cell."
    b('Emulation.setDeviceMetricsOverride', width=1200, height=900, deviceScaleFactor=1, mobile=False)
    b('Page.navigate', url=url)
    b.until("document.querySelector('.jp-Toolbar-kernelName')?.textContent.includes('Python 3')"
            " && document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'", 300)
    run_cell(b, 0)
    b.until(f"document.querySelector('.saxgpt-deck') && {DECK}.backing?.bars.length && {STATUS}.textContent.includes(' s')", 300)


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    need(importlib.util.find_spec('jupyterlab'), 'JupyterLab is not installed (make env does it)')
    with jupyter(tmp_path_factory.mktemp('studio')) as where: yield where


@pytest.fixture(scope='module')
def page(lab, tmp_path_factory):
    "The page, with 8 s of the demo backing open."
    need(importlib.util.find_spec('websocket'), 'no websocket-client in this environment')
    b = Chromium(tmp_path_factory.mktemp('browser'))
    try:
        enter(b, lab[0])
        open_first(b, 8)
        yield b
    finally: b.close()


def open_first(b, seconds):
    b.click(field('at most s'))
    b.js(f'{field("at most s")}.select()')
    b('Input.insertText', text=str(seconds))
    b.click(button('Open'))
    b.until(f"{DECK}.backing.size === {seconds*SAMPLE_RATE} && {DECK}.backing.n === {seconds*SAMPLE_RATE} && {STATUS}.textContent.includes('{seconds} s')")


def play(b, text='Play a solo'):
    "Press a button that plays; the take, which is not whole yet when it is heard."
    before = b.js(f'{DECK}.current')
    b.click(button(text))
    take, done = b.until(f'{DECK}.running && {DECK}.take && {DECK}.current !== {json.dumps(before)} && [{DECK}.current, {DECK}.take.done]')
    assert not done, 'nothing was heard before all was made'
    return take


HEAR = f'''(async () => {{ const d = {DECK}, a = d.ctx.createAnalyser(), x = new Float32Array(a.fftSize), from = d.position, t = d.ctx.currentTime
    d.out.connect(a); let peak = 0
    for (let i = 0; i < 400 && (peak < .01 || d.position < from + .3); i++) {{
        await new Promise(r => setTimeout(r, 25)); a.getFloatTimeDomainData(x); peak = Math.max(peak, ...x.map(Math.abs)) }}
    d.out.disconnect(a)
    return [peak, d.ctx.currentTime - t, d.position - from] }})()'''


def test_a_solo_is_heard_while_it_is_made_and_taken_home(page, lab, tmp_path):
    b, work = page, lab[1]
    take = play(b)
    done, waiting = b.js(f"""(() => {{ const d = {DECK}; d.halt(); d.need = 7; d.show()   // as where the next block is late
        return [d.take.done, document.querySelector('.saxgpt-waiting').textContent] }})()""")
    made, plays = map(float, re.search(r'([\d.]+) s are made.* ([\d.]+) s[.]', waiting).groups())
    assert not done and 0 < made < plays == min(8, round(plays, 1)) and plays >= 7, waiting
    b.js(f'{DECK}.need = 0')
    b.until(f"{DECK}.running && !document.querySelector('.saxgpt-waiting').textContent")
    peak, clock, moved = b.js(HEAR)
    assert peak > .01 and clock > .2 and moved > .2, (peak, clock, moved)
    b.until(f'{DECK}.take.done')
    n, loudest, lines = b.js(f'[{DECK}.take.n, {DECK}.take.data.reduce((a, v) => Math.max(a, Math.abs(v)), 0), {DECK}.take.line.length]')
    assert n == 8*SAMPLE_RATE and loudest > .02 and lines
    b.until("document.querySelector('.saxgpt-scores').textContent.includes('chord tones')")
    b.until(f'!{DECK}.running')                                           # it ends by itself

    b('Browser.setDownloadBehavior', behavior='allow', downloadPath=str(tmp_path))
    def fetch(kind, name):
        b.js(f"(() => {{ const e = {field('download')}; e.value = '{kind}'; e.dispatchEvent(new Event('change', {{bubbles: true}})) }})()")
        b.click(button('Download'))
        end = time.monotonic() + 60
        while not (tmp_path/name).is_file():
            assert time.monotonic() < end, b.js(f'{STATUS}.textContent')
            time.sleep(.1)
        return tmp_path/name
    for kind, name in ('solo', 'take 1.wav'), ('mix', 'take 1-mix.wav'):
        x, rate = sf.read(fetch(kind, name))
        assert (rate, len(x)) == (SAMPLE_RATE, 8*SAMPLE_RATE) and np.abs(x).max() > .05
    notes = [m for m in mido.MidiFile(fetch('MIDI', 'take 1.mid')) if m.type == 'note_on' and m.velocity]
    assert len(notes) > 2
    score = ElementTree.parse(fetch('score', 'take 1.musicxml'))
    assert len(score.findall('.//measure')) >= 4 and score.findall('.//note/pitch')
    b.click(button('Keep'))
    b.until(f"{STATUS}.textContent.startsWith('kept')")
    assert {'take 1.wav', 'take 1-mix.wav', 'take 1.mid', 'take 1.json'} <= {p.name for p in (work/'takes').iterdir()}
    assert json.loads((work/'takes/take 1.json').read_text())['seed'] == 1 and take


def test_two_takes_are_compared_and_the_kernel_stays_free(page):
    b = page
    first, second = b.js(f'{DECK}.current'), play(b, 'Another')
    b.click("document.querySelectorAll('.jp-CodeCell .cm-content')[1]")
    b('Input.insertText', text='import time; time.sleep(1e4)')
    b.key('Enter', modifiers=8, number=13)
    b.until("document.querySelectorAll('.jp-CodeCell')[1].querySelector('.jp-InputPrompt').textContent.includes('*')")
    b.js(f'{DECK}.mark({DECK}.backing.bars[1] + .1, {DECK}.backing.bars[2] + .1)')
    b.until("[...document.querySelectorAll('.saxgpt-studio .widget-readout')].some(e => e.textContent === '2 – 3')")   # the slider follows
    b.until(f'{DECK}.take.done')                                          # while the kernel is busy
    b.click("document.querySelector('[data-command=\"notebook:interrupt-kernel\"]')")
    b.until("document.querySelectorAll('.jp-CodeCell')[1].textContent.includes('KeyboardInterrupt')")
    b.click(button('A/B'))
    b.until(f"{DECK}.current === '{first}'")
    b.click(button('A/B'))
    b.until(f"{DECK}.current === '{second}'")
    b.click(button('Play'))
    b.until(f'{DECK}.running')
    b.click(button('mute'))
    b.until(f"{DECK}.mute.sax && {DECK}.lanes.sax.gain.value < .01")
    b.click(button('mute'))
    b.until(f"{DECK}.lanes.sax.gain.value > .9")
    b.js("document.querySelector('.saxgpt-picture').focus()")
    b.key(' ', 'Space', number=32)                                        # pauses
    b.until(f'!{DECK}.running && !{DECK}.wanted')


def test_bars_are_marked_and_played_again_and_a_click_seeks(page):
    b = page
    left, top, _, _ = b.at("document.querySelector('.saxgpt-sheet')")
    bars, scale = b.js(f'[{DECK}.backing.bars, [...{DECK}.views][0].scale]')
    x = [left + t*scale for t in bars]
    b.mouse('mousePressed', x[1] + 5, top + 100)
    for to in (x[1] + 20, x[2] - 5, x[2] + 12): b.mouse('mouseMoved', to, top + 100)
    b.mouse('mouseReleased', x[2] + 12, top + 100)
    assert b.js(f"{DECK}.model.get('marked')") == [2, 3]
    box = b.js("(e => [e.x, e.width])(document.querySelector('.saxgpt-marked').getBoundingClientRect())")
    end = bars[3] if len(bars) > 3 else 8
    assert abs(box[0] - x[1]) < 2 and abs(box[1] - (end - bars[1])*scale) < 3
    old = b.js(f'{DECK}.current')
    b.click(button('Redo bars'))
    b.until(f"{DECK}.take.name.endsWith('bars 2-3') && {DECK}.take.done && {DECK}.running")
    differs = b.js(f"""(() => {{ const a = {DECK}.take.data, b = {DECK}.takes.get('{old}').data, at = t => Math.round(t*{SAMPLE_RATE})
        const most = (i, j) => {{ let m = 0; for (let k = i; k < j; k++) m = Math.max(m, Math.abs(a[k] - b[k])); return m }}
        return [most(0, at({bars[1]} - .2)), most(at({bars[1]}), at({end})), most(at({end} + .2), a.length)] }})()""")
    assert differs[0] == differs[2] == 0 < differs[1], differs            # only the bars that were marked
    b.click(button('Pause'))
    left, top, _, _ = b.at("document.querySelector('.saxgpt-sheet')")
    for kind in ('mousePressed', 'mouseReleased'): b.mouse(kind, left + bars[2]*scale, top + 100)
    assert abs(b.js(f'{DECK}.position') - bars[2]) < .1 and b.js(f"{DECK}.model.get('marked')") == []


def test_the_best_of_several_is_kept(page):
    b = page
    before = b.js(f'[...{DECK}.takes.keys()]')
    b.click(button('Best of 4'))
    b.until(f"/at once: [0-9]+%/.test({STATUS}.textContent)")
    assert b.js(f'[...{DECK}.takes.keys()]') == before                    # progress is shown, nothing is heard
    b.until(f"{DECK}.takes.size === {len(before) + 1} && {DECK}.take.done && {DECK}.running && {STATUS}.textContent.includes('fits best')")
    said = b.js(f'{STATUS}.textContent')
    totals = [float(v) for v in re.findall(r'[(]([\d.]+)[)]', said)]
    assert len(totals) == 4 and totals == sorted(totals, reverse=True), said
    b.click(button('Pause'))


def test_a_page_that_asks_again_is_told_all(page):
    b = page
    about = f"[{DECK}.backing.n, {DECK}.current, ...[...{DECK}.takes.values()].map(t => [t.name, t.n, t.done, t.gain])]"
    old = b.js(about)
    b.js(f"{DECK}.backing = null; {DECK}.takes.clear(); {DECK}.model.send({{kind: 'hello'}})")   # as after a reload
    b.until(f"{DECK}.backing && {DECK}.takes.size === 4 && [...{DECK}.takes.values()].every(t => t.done)")
    assert b.js(about) == old and len(old) == 6


def test_uploads(page, tmp_path):
    b = page
    (tmp_path/'words.txt').write_text('Dm7 G7 Cmaj7')
    b.choose_file("document.querySelector('.saxgpt-upload input')", tmp_path/'words.txt')
    b.until(f"{STATUS}.classList.contains('saxgpt-bad') && {STATUS}.textContent.startsWith('words.txt: ')")
    assert b.js(f'{DECK}.takes.size') == 4                                # nothing is lost
    x, rate = sf.read(demo_backing()[0], frames=12*44100)
    stereo = np.tile(x[:, None] if x.ndim == 1 else x[:, :1], (2, 2))     # more than a piece
    sf.write(tmp_path/'my band.wav', stereo, rate)
    assert (tmp_path/'my band.wav').stat().st_size > 2 << 20
    b.js(f'{DECK}.mark({DECK}.backing.bars[1] + .1, {DECK}.backing.bars[2] + .1)')
    b.choose_file("document.querySelector('.saxgpt-upload input')", tmp_path/'my band.wav')
    b.until(f"{DECK}.backing.name === 'my band.wav' && {DECK}.backing.n > 0 && {STATUS}.textContent.startsWith('my band.wav')")
    b.until(f'{DECK}.backing.estimated && {DECK}.backing.chords.length > 0')
    assert b.js(f"{DECK}.model.get('marked')") == []                      # another tune, other bars
    assert b.js(f'{DECK}.takes.size') == 0 and not b.js(f"{STATUS}.classList.contains('saxgpt-bad')")
    b.click(AREA)
    b('Input.insertText', text='Gm7 | C7 | Fmaj7 | H7')
    b.click(button('Lay on'))
    b.until(f"{STATUS}.classList.contains('saxgpt-bad') && {STATUS}.textContent.includes('H7')")
    assert b.js(f'{DECK}.backing.estimated')                              # as it was
    b.js(f'{AREA}.select()')
    b('Input.insertText', text='Gm7 | C7 | Fmaj7 | Fmaj7')
    b.click(button('Lay on'))
    b.until(f"!{DECK}.backing.estimated && {DECK}.backing.chords[0].name === 'Gm7' && {STATUS}.textContent.includes('first bar at')")


def test_a_chart_is_typed(page):
    b = page
    b.js(f"(() => {{ const e = {field('backing')}; e.value = 'a chart'; e.dispatchEvent(new Event('change', {{bubbles: true}})) }})()")
    b.click(TYPED)
    b('Input.insertText', text='Dm7 G7 | Hm7')
    b.click(button('Open'))
    b.until(f"{STATUS}.classList.contains('saxgpt-bad') && {STATUS}.textContent.includes('Hm7')")
    b.js(f'{TYPED}.select()')
    b('Input.insertText', text='Dm7 G7 | Cmaj7')
    b.click(button('Open'))
    b.until(f"{DECK}.backing.chords.map(c => c.name).slice(0, 3).join(' ') === 'Dm7 G7 Cmaj7' && {DECK}.backing.n > 0", 240)
    b.js(f"(() => {{ const e = {field('backing')}; e.value = 'the demo'; e.dispatchEvent(new Event('change', {{bubbles: true}})) }})()")


def test_stop_ends_the_generation(page):
    b = page
    open_first(b, 20)
    play(b)
    b.click(button('Stop'))
    b.until(f'{DECK}.take.done && !{DECK}.running')
    assert 0 < b.js(f'{DECK}.take.n') < 20*SAMPLE_RATE
    b.until("document.querySelector('.saxgpt-scores').textContent.includes('plays')")


def test_a_phone(page):
    b = page
    b.js(f'{DECK}.mark({DECK}.backing.bars[1] + .1, {DECK}.backing.bars[1] + .1)')
    b('Emulation.setDeviceMetricsOverride', width=390, height=844, deviceScaleFactor=2, mobile=True)
    b.until('innerWidth === 390')
    outside = '''[...document.querySelectorAll('.saxgpt-studio button, .saxgpt-studio input, .saxgpt-studio select, .saxgpt-picture')]
        .filter(e => e.offsetWidth > 1 && e.getBoundingClientRect().right > 390).map(e => e.outerHTML.slice(0, 120))'''
    b.until(f'{outside}.length === 0')
    b.until(f'[...{DECK}.views].every(v => Math.abs(parseFloat(v.marked.style.left) - {DECK}.backing.bars[1]*v.scale) < 1)', 20)   # the mark moves along
    b.click(button('Play'))
    b.until(f'{DECK}.running')
    b.click(button('Pause'))
    b('Emulation.setDeviceMetricsOverride', width=1200, height=900, deviceScaleFactor=1, mobile=False)


def test_no_errors_in_the_console(page):
    said = [e['entry'] for e in page.said('Log.entryAdded') if e['entry']['level'] == 'error']
    said += [e for e in page.said('Runtime.consoleAPICalled') if e['type'] == 'error'] + page.said('Runtime.exceptionThrown')
    assert not said, json.dumps(said)[:2000]


def test_without_jupyterlab_there_is_a_line(tmp_path):
    (tmp_path/'jupyterlab.py').write_text('raise ImportError("none")')
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get('PYTHONPATH')])])
    r = subprocess.run([sys.executable, '-m', 'saxgpt.studio'], cwd=tmp_path, env=dict(os.environ, PYTHONPATH=path), capture_output=True, text=True)
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'JupyterLab' in r.stderr, r.stderr
    assert not (tmp_path/'studio.ipynb').exists()
