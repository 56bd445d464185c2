"A real browser, driven through its debugging protocol."
import importlib.util
import json
import os
import shutil
import subprocess
import time
import urllib.request
from itertools import count
from pathlib import Path

import pytest

from saxgpt.doctor import BROWSERS

required = bool(os.environ.get('SAXGPT_TEST_ALL'))      # set in CI: nothing may be skipped there


def need(ok, what):
    if not ok: (pytest.fail if required else pytest.skip)(what)


class Chromium:
    "A real browser, spoken to through its debugging protocol."
    def __init__(self, folder):
        import websocket
        exe = next(filter(None, map(shutil.which, BROWSERS)), None)
        need(exe, 'no Chromium on this machine')
        self.process = subprocess.Popen([exe, '--headless=new', '--no-sandbox', '--disable-gpu', '--remote-debugging-port=0',
                                         '--remote-allow-origins=*', '--mute-audio',
                                         '--autoplay-policy=no-user-gesture-required', '--no-first-run', '--disable-background-networking',
                                         f'--user-data-dir={folder}', 'about:blank'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        told = Path(folder)/'DevToolsActivePort'
        for _ in range(600):
            if told.is_file() and told.read_text().strip(): break
            time.sleep(.1)
        pages = json.load(urllib.request.urlopen(f'http://127.0.0.1:{told.read_text().split()[0]}/json'))
        self.socket, self.ids, self.events = websocket.create_connection(next(p['webSocketDebuggerUrl'] for p in pages
            if p['type'] == 'page'), timeout=600), count(1), []
        for domain in ('Page', 'Runtime', 'Log', 'Network'): self(f'{domain}.enable')

    def __call__(self, method, **params):
        n = next(self.ids)
        self.socket.send(json.dumps(dict(id=n, method=method, params=params)))
        while True:
            m = json.loads(self.socket.recv())
            if m.get('id') == n:
                assert 'error' not in m, m
                return m['result']
            self.events.append(m)

    def js(self, code):
        r = self('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True)
        assert 'exceptionDetails' not in r, r
        return r['result'].get('value')

    def until(self, code, seconds=120):
        "What an expression gives as soon as that is something."
        end = time.monotonic() + seconds
        while not (value := self.js(code)):
            assert time.monotonic() < end, f'it never came: {code}'
            time.sleep(.05)
        return value

    def at(self, element):
        "Where an element is, once it is in view: x, y, width, height."
        return self.js(f"(async () => {{ const e = {element}; e.scrollIntoView({{block: 'center'}});"
                       "await new Promise(r => setTimeout(r, 50)); const b = e.getBoundingClientRect();"
                       "return [b.x, b.y, b.width, b.height] })()")

    def mouse(self, kind, x, y, **more):
        self('Input.dispatchMouseEvent', type=kind, x=x, y=y, **dict(button='left', buttons=int(kind != 'mouseReleased'), clickCount=1) | more)

    def click(self, element):
        self.until(f'!!({element})')
        x, y, width, height = self.at(element)
        for kind in ('mousePressed', 'mouseReleased'): self.mouse(kind, x + width/2, y + height/2)

    def key(self, key, code=None, modifiers=0, number=0):
        more = dict(key=key, code=code or key, modifiers=modifiers, windowsVirtualKeyCode=number)
        self('Input.dispatchKeyEvent', type='keyDown', **more)
        self('Input.dispatchKeyEvent', type='keyUp', **more)

    def choose_file(self, element, path):
        "Give a file to an input of the page."
        found = self('Runtime.evaluate', expression=element)['result']['objectId']
        self('DOM.setFileInputFiles', objectId=found, files=[str(path)])

    def said(self, method): return [e['params'] for e in self.events if e.get('method') == method]

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(300)


@pytest.fixture
def browser(tmp_path):
    need(importlib.util.find_spec('websocket'), 'no websocket-client in this environment')
    b = Chromium(tmp_path/'profile')
    yield b
    b.close()
