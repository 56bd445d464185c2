// The deck of the studio: sound that begins while the rest is being made, its picture, marks, files in and out.
// nbs/08b_studio.ipynb says what travels between it and the kernel.
const RATE = 32000, AHEAD = .06, FADE = .015          // Hz; s
const START = .3, AGAIN = 2                           // s of sound at hand before playing begins, and after a pause for want of it
const decks = new Map()

class Track {                                         // sound that arrives in pieces
  constructor(about) { Object.assign(this, { done: false, gain: 1, n: 0, line: [] }, about); this.data = new Float32Array(this.size) }
  add(view, at) {
    const x = new Int16Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength))
    for (let i = 0; i < x.length && at + i < this.data.length; i++) this.data[at + i] = x[i] / 32768
    this.n = Math.max(this.n, Math.min(at + x.length, this.data.length))
  }
  get have() { return this.n / RATE }
}

class Deck {                                          // one clock for backing and takes; times are s of the tune
  constructor(model) {
    Object.assign(this, { model, backing: null, takes: new Map(), current: null, other: null, views: new Set(), wanted: false, running: false,
                          at: 0, until: 0, mute: { sax: false, backing: false }, alone: null, volume: { sax: 1, backing: 1 }, errors: [] })
    this.heard = (m, buffers) => this.receive(m, buffers)
    this.gesture = () => { this.open(); if (!this.running) this.ctx.suspend() }
    this.space = e => this.key(e)
    this.ranged = () => {                             // the slider was moved, or follows; it moves by itself where a backing has fewer bars
      const bars = model.get('range')
      if (this.takes.size && String(bars) !== String(model.get('marked'))) { model.set('marked', bars); model.save_changes(); this.show() }
    }
    model.on('msg:custom', this.heard)
    model.on('change:range', this.ranged)
    document.addEventListener('pointerdown', this.gesture, { once: true })
    document.addEventListener('keydown', this.space, true)
    this.timer = setInterval(() => this.watch(), 60)
    model.send({ kind: 'hello' })
  }
  close() {
    clearInterval(this.timer)
    this.model.off('msg:custom', this.heard)
    this.model.off('change:range', this.ranged)
    document.removeEventListener('pointerdown', this.gesture)
    document.removeEventListener('keydown', this.space, true)
    if (this.ctx) this.ctx.close()
    this.takes.clear(); this.backing = null
  }
  open() {                                            // the context runs at the rate of the sound, so that blocks join exactly
    if (this.ctx) return
    this.ctx = new AudioContext({ sampleRate: RATE })
    this.out = new GainNode(this.ctx, { gain: .7 }); this.out.connect(this.ctx.destination)
    this.lanes = {}
    for (const k of ['sax', 'backing']) { this.lanes[k] = new GainNode(this.ctx); this.lanes[k].connect(this.out) }
    this.levels()
  }
  levels() {
    if (this.ctx) for (const k in this.lanes) {
      const on = this.alone ? this.alone === k : !this.mute[k]
      this.lanes[k].gain.setTargetAtTime(on ? this.volume[k] : 0, this.ctx.currentTime, .01)
    }
    this.show()
  }
  get take() { return this.takes.get(this.current) }
  get length() { const t = this.take; return t && t.done ? t.have : this.backing ? this.backing.size / RATE : 0 }
  get position() { return this.running ? Math.max(this.at, this.ctx.currentTime - this.origin) : this.at }

  async start(p = this.position) {                    // everything at hand from p on; what comes later is appended by `append`
    this.open()
    if (this.ctx.state !== 'running') await Promise.race([this.ctx.resume(), new Promise(r => setTimeout(r, 1000))])
    if (this.ctx.state !== 'running') { this.wanted = false; return this.note('The browser wants a click before it plays: press Play.') }
    const when = Math.round((this.ctx.currentTime + AHEAD) * RATE) / RATE
    this.halt(when)
    this.bus = { sax: new GainNode(this.ctx, { gain: 0 }), backing: new GainNode(this.ctx, { gain: 0 }), sources: [] }
    for (const k of ['sax', 'backing']) {
      this.bus[k].connect(this.lanes[k])
      this.bus[k].gain.setValueAtTime(0, when)
      this.bus[k].gain.linearRampToValueAtTime(k === 'sax' && this.take ? this.take.gain : 1, when + FADE)
    }
    this.origin = when - p; this.at = p; this.until = p; this.running = true
    if (this.backing) this.schedule(this.backing, 'backing', p, this.backing.have)
    this.append()
    this.show()
  }
  schedule(track, lane, a, b) {
    const i = Math.round(a * RATE), n = Math.round(b * RATE) - i
    if (n <= 0) return
    const buffer = new AudioBuffer({ length: n, sampleRate: RATE })
    buffer.copyToChannel(track.data.subarray(i, i + n), 0)
    const source = new AudioBufferSourceNode(this.ctx, { buffer })
    source.connect(this.bus[lane])
    source.start(Math.max(0, this.origin + a))
    this.bus.sources.push(source)
  }
  append() { if (this.running && this.take && this.take.have > this.until) { this.schedule(this.take, 'sax', this.until, this.take.have); this.until = this.take.have } }
  halt(when) {                                        // fade out what sounds, at once or at a given time of the context
    if (!this.bus) return
    const at = when || this.ctx.currentTime, bus = this.bus
    this.at = Math.max(this.at, this.position); this.running = false; this.bus = null
    for (const k of ['sax', 'backing']) bus[k].gain.setTargetAtTime(0, at, FADE / 4)
    for (const s of bus.sources) s.stop(at + FADE)
    if (!when) setTimeout(() => { if (!this.running && this.ctx && this.ctx.state === 'running') this.ctx.suspend() }, 200)
  }
  play() { this.wanted = true; if (this.position >= this.length - .05) this.at = 0; this.watch(); this.show() }
  pause() { this.wanted = false; this.halt(); this.show() }
  toggle() { this.wanted ? this.pause() : this.play() }
  seek(p) { p = Math.max(0, Math.min(p, this.length)); const on = this.running; if (on) this.start(p); else { this.at = p; this.show() } }
  choose(id, play) {
    if (id !== this.current && this.takes.has(id)) {
      this.other = this.current; this.current = id
      this.model.set('current', id); this.model.save_changes()
      if (!this.take.n && this.take.done) this.model.send({ kind: 'want', take: id })
    }
    if (play) this.wanted = true
    if (this.running) this.start()
    this.show()
  }
  swap() { if (this.takes.has(this.other)) this.choose(this.other) }
  watch() {                                           // begin when there is enough, pause where the next block is late, end at the end
    const t = this.take, p = this.position
    if (this.running) {
      if (p >= this.length) { this.wanted = false; this.halt(); this.at = 0; this.show() }
      else if (t && !t.done && p > t.have - .05) { this.halt(); this.need = AGAIN; this.show() }
    } else if (this.wanted && !this.starting && this.backing && this.length) {
      if (t && !t.done && t.have < p + (this.need || START)) return
      if (!this.backing.n) return
      this.starting = true
      this.start(p).finally(() => { this.starting = false; this.need = 0 })
    }
  }
  get waits() {                                       // what a player waits for whose machine is slower than the music
    const t = this.take
    if (!this.wanted || this.running || !t || t.done) return ''
    const from = Math.min(this.position + (this.need || START), this.backing.size / RATE)
    return `Waiting for sound: ${t.have.toFixed(1)} s are made, it plays as soon as there are ${from.toFixed(1)} s.`
  }
  receive(m, buffers) {
    const what = this['on_' + m.kind.replace('-', '_')]
    if (what) what.call(this, m, buffers)
    this.show(m.kind !== 'sound')
  }
  on_backing(m) {
    if (this.backing && this.backing.id !== m.id) { this.model.set('marked', []); this.model.save_changes() }
    this.halt(); this.wanted = false; this.at = 0; this.takes.clear(); this.current = this.other = null; this.backing = new Track(m)
  }
  on_chords(m) { if (this.backing) Object.assign(this.backing, m) }
  on_backing_sound(m, [b]) { if (this.backing && m.id === this.backing.id) this.backing.add(b, m.at) }
  on_take(m) {
    this.takes.set(m.id, new Track(m))
    if (!m.fresh) { if (this.model.get('current') === m.id) this.current = m.id; return }   // the page was loaded again
    this.halt(); this.other = this.current; this.current = m.id; this.at = m.at || 0; this.need = START; this.wanted = true
    this.model.set('current', m.id); this.model.set('marked', []); this.model.save_changes()
  }
  on_sound(m, [b]) { const t = this.takes.get(m.id); if (t) { t.add(b, m.at); if (t === this.take) { this.append(); this.watch() } } }
  on_line(m, [b]) { const t = this.takes.get(m.id); if (t) { if (m.whole) t.line = []; t.line.push({ at: m.at, hop: m.hop, midi: new Float32Array(b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength)) }) } }
  on_done(m) { const t = this.takes.get(m.id); if (t) { t.done = true; t.gain = m.gain } }
  on_name(m) { const t = this.takes.get(m.id); if (t) t.name = m.name }
  on_drop(m) {
    this.takes.delete(m.id)
    if (this.other === m.id) this.other = null
    if (this.current !== m.id) return
    this.pause(); this.current = null
    const left = [...this.takes.keys()]
    if (left.length) this.choose(left[left.length - 1])
  }
  on_stop() { this.pause() }
  on_hear(m) { this.choose(m.id, true) }
  on_file(m, [b]) {
    const a = document.createElement('a')
    a.href = URL.createObjectURL(new Blob([b], { type: m.mime })); a.download = m.name; a.click()
    setTimeout(() => URL.revokeObjectURL(a.href), 10000)
  }
  on_more() { this.sent() }
  note(text) { this.said = text; this.show() }

  async upload(file) {                                // in pieces, each after the last has arrived: a server takes no large message
    for (let at = 0; at === 0 || at < file.size; at += 1 << 20) {
      const arrived = new Promise(r => { this.sent = r })
      this.model.send({ kind: 'upload', name: file.name, size: file.size, at }, undefined, [await file.slice(at, at + (1 << 20)).arrayBuffer()])
      this.note(`Uploading ${file.name}: ${Math.round(100 * at / Math.max(1, file.size))} %`)
      await arrived
    }
    this.note('')
  }
  bar(t) { const b = this.backing ? this.backing.bars : []; let i = -1; while (i + 1 < b.length && b[i + 1] <= t + 1e-3) i++; return i }
  mark(a, b) {                                        // bars from that at a to that at b
    const [i, j] = [this.bar(Math.min(a, b)), this.bar(Math.max(a, b))]
    const bars = j < 0 ? [] : [Math.max(0, i) + 1, j + 1]
    this.model.set('marked', bars); if (j >= 0) this.model.set('range', bars)
    this.model.save_changes(); this.show()
  }
  key(e) {
    const inside = e.target.closest && e.target.closest('.saxgpt-studio')
    if (!inside || e.ctrlKey || e.metaKey || e.altKey || e.target.closest('input:not([type=range]), textarea, select')) return
    const step = { ArrowLeft: -1, ArrowRight: 1 }[e.key]
    if (e.key === ' ' && !e.target.closest('button, a, label')) this.toggle()
    else if (step && e.target.closest('.saxgpt-picture')) {
      const b = this.backing ? this.backing.bars : [], i = this.bar(this.position) + step
      this.seek(b.length ? b[Math.max(0, Math.min(i, b.length - 1))] : this.position + 2 * step)
    } else return
    e.preventDefault(); e.stopPropagation()
  }
  show(redraw) { for (const v of this.views) v.show(redraw) }
}

const make = (tag, about = {}, ...children) => {
  const { data = {}, ...rest } = about, e = Object.assign(document.createElement(tag), rest)
  for (const k in data) e.setAttribute(k, data[k])
  e.append(...children)
  return e
}
const clock = s => `${Math.floor(s / 60)}:${String(Math.floor(s % 60)).padStart(2, '0')}`
const TOP = 34, HIGH = 230                            // px: names of bars and chords, and the whole picture

class View {
  constructor(deck, el) {
    Object.assign(this, { deck, el })
    const button = (text, label, click) => make('button', { type: 'button', textContent: text, title: label, onclick: click, data: { 'aria-label': label } })
    this.playing = button('Play', 'Play or pause (space)', () => deck.toggle())
    this.back = button('|<', 'To the beginning', () => deck.seek(0))
    this.ab = button('A/B', 'The take that was heard before, at the same place', () => deck.swap())
    this.time = make('span', { className: 'saxgpt-time' })
    this.strips = ['sax', 'backing'].map(k => this.strip(k, button))
    const file = make('input', { type: 'file', accept: 'audio/*,video/*,.flac,.opus,.ogg,.m4a' })
    file.onchange = () => { if (file.files.length) deck.upload(file.files[0]); file.value = '' }
    const upload = make('label', { className: 'saxgpt-upload' }, 'Upload a backing', file)
    this.canvas = make('canvas', { height: HIGH, data: { role: 'img', 'aria-label': 'Pitch of the take over the chords' } })
    this.cursor = make('div', { className: 'saxgpt-cursor' }); this.marked = make('div', { className: 'saxgpt-marked' })
    this.sheet = make('div', { className: 'saxgpt-sheet' }, this.canvas, this.marked, this.cursor)
    this.picture = make('div', { className: 'saxgpt-picture', tabIndex: 0, title: 'Click: hear from there. Drag: mark bars.' }, this.sheet)
    this.status = make('div', { className: 'saxgpt-status', data: { role: 'status', 'aria-live': 'polite' } })
    this.waiting = make('div', { className: 'saxgpt-waiting' })
    el.classList.add('saxgpt-deck'); el.dataset.lmSuppressShortcuts = 'true'
    el.append(make('div', { className: 'saxgpt-bar' }, this.playing, this.back, this.ab, this.time, ...this.strips, upload), this.picture, this.status, this.waiting)
    el.saxgpt = deck                                  // for whoever looks from outside
    this.drag()
    this.sized = new ResizeObserver(() => this.show(true)); this.sized.observe(el)
    this.changed = () => this.show()
    for (const k of ['message', 'bad', 'marked']) deck.model.on('change:' + k, this.changed)
    deck.views.add(this)
    const frame = () => { this.follow(); this.frame = requestAnimationFrame(frame) }
    frame(); this.show(true)
  }
  close() {
    cancelAnimationFrame(this.frame); this.sized.disconnect(); this.deck.views.delete(this)
    for (const k of ['message', 'bad', 'marked']) this.deck.model.off('change:' + k, this.changed)
  }
  strip(k, button) {
    const d = this.deck, name = k === 'sax' ? 'Sax' : 'Band'
    const mute = button('mute', `Mute the ${name.toLowerCase()}`, () => { d.mute[k] = !d.mute[k]; d.levels() })
    const solo = button('solo', `Only the ${name.toLowerCase()}`, () => { d.alone = d.alone === k ? null : k; d.levels() })
    const level = make('input', { type: 'range', min: 0, max: 1.5, step: .05, value: 1, oninput: () => { d.volume[k] = +level.value; d.levels() }, data: { 'aria-label': `Volume of the ${name.toLowerCase()}` } })
    this[k] = { mute, solo }
    return make('span', { className: 'saxgpt-strip' }, name, mute, solo, level)
  }
  get scale() { const l = this.deck.backing ? this.deck.backing.size / RATE : 1; return this.width / l }
  drag() {                                            // a click seeks, a stroke marks
    const at = e => (e.clientX - this.sheet.getBoundingClientRect().left) / this.scale
    let from = null
    this.picture.onpointerdown = e => { if (this.deck.backing && e.button === 0) from = { x: e.clientX, t: at(e), moved: false } }
    this.picture.onpointermove = e => {
      if (!from || e.pointerType === 'touch') return
      from.moved ||= Math.abs(e.clientX - from.x) > 6
      if (from.moved) { this.picture.setPointerCapture(e.pointerId); this.deck.mark(from.t, at(e)) }
    }
    this.picture.onpointerup = e => { if (from && !from.moved) { this.deck.model.set('marked', []); this.deck.model.save_changes(); this.deck.seek(from.t) } from = null; this.show() }
    this.picture.onpointercancel = () => { from = null }
  }
  show(redraw) {
    const d = this.deck, m = d.model, bars = d.backing ? d.backing.bars : []
    if (redraw) this.draw()                           // sets the scale of what follows
    this.playing.textContent = d.wanted ? 'Pause' : 'Play'
    this.playing.disabled = !d.backing; this.back.disabled = !d.backing; this.ab.disabled = !d.takes.has(d.other)
    for (const k of ['sax', 'backing']) {
      this[k].mute.setAttribute('aria-pressed', d.mute[k]); this[k].solo.setAttribute('aria-pressed', d.alone === k)
    }
    this.status.textContent = m.get('message') || d.said || ''
    this.waiting.textContent = d.waits
    this.status.classList.toggle('saxgpt-bad', m.get('bad'))
    const [a, b] = m.get('marked')
    Object.assign(this.marked.style, a ? { display: 'block', left: bars[a - 1] * this.scale + 'px', width: ((bars[b] || d.backing.size / RATE) - bars[a - 1]) * this.scale + 'px' } : { display: 'none' })
  }
  follow() {
    const p = this.deck.position, x = p * this.scale
    this.cursor.style.transform = `translateX(${x}px)`
    const text = `${clock(p)} / ${clock(this.deck.length)}${this.deck.take ? ' ' + this.deck.take.name : ''}`
    if (this.time.textContent !== text) this.time.textContent = text
    const { scrollLeft, clientWidth } = this.picture
    if (this.deck.running && (x < scrollLeft || x > scrollLeft + .8 * clientWidth)) this.picture.scrollLeft = x - .2 * clientWidth
  }
  draw() {                                            // chords and bars behind, the line of the take in front
    const d = this.deck, dpr = Math.min(2, window.devicePixelRatio || 1), wide = this.picture.clientWidth
    if (!wide) return
    const seconds = d.backing ? d.backing.size / RATE : 0
    this.width = Math.min(Math.max(wide, Math.round(seconds * 24)), Math.max(wide, 16000 / dpr))
    this.canvas.width = this.width * dpr; this.canvas.height = HIGH * dpr
    Object.assign(this.canvas.style, { width: this.width + 'px', height: HIGH + 'px' })
    const g = this.canvas.getContext('2d'), ink = getComputedStyle(this.el).color, x = s => s * this.scale
    g.scale(dpr, dpr)
    if (!d.backing) return
    const pitches = (d.take ? d.take.line : []).flatMap(l => [...l.midi].filter(Number.isFinite)).sort((a, b) => a - b)
    const q = s => pitches[Math.floor(s * (pitches.length - 1))], lo = pitches.length ? Math.floor(q(.02)) - 3 : 52, hi = pitches.length ? Math.ceil(q(.98)) + 3 : 80
    const y = m => TOP + (HIGH - TOP) * (hi + .5 - m) / (hi - lo + 1), tall = y(0) - y(1)
    g.font = '11px sans-serif'; g.textAlign = 'left'
    let free = -1e9, before = ''
    for (const c of d.backing.chords) {
      for (let m = lo; m <= hi; m++) if (c.tones.includes(m % 12)) {
        g.fillStyle = m % 12 === c.tones[0] ? 'rgba(66,133,190,.42)' : 'rgba(66,133,190,.2)'
        g.fillRect(x(c.start), y(m) - tall / 2, x(c.end) - x(c.start), tall)
      }
      g.fillStyle = ink
      if (x(c.start) > free && c.name !== before) { g.fillText(c.name, x(c.start) + 2, TOP - 5); free = x(c.start) + g.measureText(c.name).width + 4; before = c.name }
    }
    free = -1e9
    d.backing.bars.forEach((b, i) => {
      g.globalAlpha = .35; g.fillStyle = ink; g.fillRect(x(b), 14, 1, HIGH); g.globalAlpha = .7
      if (x(b) > free) { g.fillText(i + 1, x(b) + 2, 11); free = x(b) + 22 }
    })
    g.globalAlpha = .6
    for (let left = 0; left < this.width; left += wide)   // where the octaves are, again in each width of the page
      for (let m = Math.ceil(lo / 12) * 12; m <= hi; m += 12) g.fillText('C' + (m / 12 - 1), left + 3, y(m) + 4)
    g.globalAlpha = 1; g.strokeStyle = '#d9541e'; g.lineWidth = 2.5; g.lineJoin = 'round'; g.beginPath()
    for (const l of d.take ? d.take.line : []) {
      let last = NaN
      l.midi.forEach((m, i) => { const s = x(l.at + i * l.hop); if (Math.abs(m - last) < .8) g.lineTo(s, y(m)); else if (Number.isFinite(m)) g.moveTo(s, y(m)); last = m })
    }
    g.stroke()
  }
}

export default {
  initialize({ model }) {
    const key = model.get('key'), deck = new Deck(model)
    decks.set(key, deck)
    return () => { deck.close(); decks.delete(key) }
  },
  render({ model, el }) {
    const view = new View(decks.get(model.get('key')), el)
    return () => view.close()
  },
}
