// Blocks of texts, cut anew in the page. The first part has the steps of blockattn/segmentation/granularity.py, in the
// same order, so that both choose the same cuts; the second shows them.

const FORCED = -100;   // gains below this are no candidates
const MAX_LOG_ODDS = 50;

function thresholdCuts(gains, logOdds) {
  const cuts = [];
  for (let i = 0; i < gains.length; i++) if (gains[i] > FORCED && gains[i] >= logOdds) cuts.push(i);
  return cuts;
}

// A queue of falling keys: a place makes those before it with a lower key useless.
class Falling {
  constructor(size) {
    this.keys = new Float64Array(size);
    this.places = new Int32Array(size);
    this.head = this.tail = 0;
  }
  get empty() { return this.head === this.tail; }
  get key() { return this.keys[this.head]; }
  get place() { return this.places[this.head]; }
  push(key, place) {
    if (key === -Infinity) return;
    while (this.tail > this.head && this.keys[this.tail - 1] <= key) this.tail--;
    this.keys[this.tail] = key;
    this.places[this.tail++] = place;
  }
}

// The chain of cuts with the highest sum of gains less weight * sum over blocks of |length/target - 1|; null if no
// chain keeps the bounds. lengths: [n + 1], gains: [n].
function bestChain(lengths, gains, target, minimum, maximum, weight) {
  const end = gains.length + 1, slope = weight / target;
  const at = new Float64Array(end + 1), value = new Float64Array(end + 1).fill(-Infinity);
  const parent = new Int32Array(end + 1), near = new Falling(end + 1), far = new Falling(end + 1);
  at.set(lengths, 1);
  value[0] = 0;
  let entered = 0, moved = 0;
  for (let j = 1; j <= end; j++) {
    const here = at[j];
    for (; entered < j && at[entered] <= here - minimum; entered++) near.push(value[entered] - slope * at[entered], entered);
    for (; moved < entered && at[moved] < here - target; moved++) far.push(value[moved] + slope * at[moved], moved);
    while (!near.empty && near.place < moved) near.head++;
    while (!far.empty && at[far.place] < here - maximum) far.head++;
    const short = near.empty ? -Infinity : near.key + slope * (here - target);
    const long = far.empty ? -Infinity : far.key - slope * (here - target);
    if (Math.max(short, long) > -Infinity) {
      const i = (short >= long ? near : far).place;
      parent[j] = i;
      value[j] = value[i] - slope * Math.abs(here - at[i] - target) + (j < end ? gains[j - 1] : 0);
    }
  }
  if (value[end] === -Infinity) return null;
  const chain = [];
  for (let j = parent[end]; j; j = parent[j]) chain.push(j - 1);
  return chain.reverse();
}

// Bounds of a target: a quarter and twice, the minimum lowered where no number of blocks fits the text.
function boundsOf(target, total) {
  const maximum = 2 * target, minimum = Math.min(Math.max(1, Math.floor(target / 4)), maximum);
  const blocks = Math.ceil(total / maximum);
  return [blocks * minimum <= total ? minimum : Math.floor(total / blocks), maximum];
}

// Candidates alone if they can keep the bounds, else the forced places too, at their cost; at last without a minimum.
function targetCuts(text, target, weight) {
  const { gains, lengths } = text, total = lengths[lengths.length - 1];
  if (!gains.length || !total) return [];
  const [minimum, maximum] = boundsOf(target, total);
  const only = [];
  gains.forEach((gain, i) => { if (gain > FORCED) only.push(i); });
  const chain = bestChain([...only.map(i => lengths[i]), total], only.map(i => gains[i]), target, minimum, maximum, weight);
  if (chain) return chain.map(i => only[i]);
  let longest = 0, before = 0;
  for (const length of lengths) { longest = Math.max(longest, length - before); before = length; }
  return bestChain(lengths, gains, target, minimum, maximum, weight)
    || bestChain(lengths, gains, target, 0, maximum, weight)
    || bestChain(lengths, gains, target, 0, Math.max(maximum, longest), weight);
}

// What is shown.

const ROWS = 80;         // rows of a chunk: what is out of sight is not laid out
const COLOURS = 4;
const LARGEST = 8192;    // tokens; the slider's right end
const LINE_END = /[\n\r\v\f\u0085\u2028\u2029]$/;

function shown(text) {
  return text.replace(/\r\n/g, '\n').replace(/\r/g, '\u240d\n').replace(/[\0-\x08\x0b\x0c\x0e-\x1f]/g,
    c => String.fromCharCode(0x2400 + c.charCodeAt(0))).replace(/\x7f/g, '\u2421').replace(/[\ud800-\udfff]/gu, '\ufffd');
}

function probability(gain) {
  return gain > FORCED ? 1 / (1 + Math.exp(-gain)) : 0;
}

function percent(p) {
  return p >= 0.995 ? '1.0' : p < 0.005 ? '' : p.toFixed(2).replace(/^0/, '');
}

// Rows of a text: [first piece, one behind the last], each up to a line's end.
function rowsOf(pieces) {
  const rows = [];
  let first = 0;
  pieces.forEach((piece, i) => {
    if (LINE_END.test(piece) || i === pieces.length - 1) { rows.push([first, i + 1]); first = i + 1; }
  });
  return rows;
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

// A part: the pieces of a row that belong to one block, with the probability in front of it at the margin.
function makePart(text, first, stop) {
  const part = element('div', 'part'), odds = element('div', 'odds'), body = element('pre');
  const gain = first ? text.gains[first - 1] : FORCED;
  if (gain > FORCED) {
    const p = probability(gain), bar = element('i');
    bar.style.setProperty('--p', p.toFixed(3));
    odds.append(element('span', '', percent(p)), bar);
    odds.title = 'probability of a cut here: ' + p.toPrecision(3);
  } else if (first) {
    odds.append(element('span', '', 'forced'));
    odds.title = 'no candidate: cut only to keep the bounds';
  }
  let run = '';
  for (let i = first; i < stop; i++) {
    const p = i > first ? probability(text.gains[i - 1]) : 0;
    if (p >= 0.01) {
      body.append(run);
      run = '';
      const tick = element('i', 'tick');
      tick.style.setProperty('--p', p.toFixed(3));
      tick.title = 'probability of a cut here: ' + p.toPrecision(3);
      body.append(tick);
    }
    run += shown(text.pieces[i]);
  }
  body.append(run);
  part.append(odds, body, element('div', 'size'));
  return part;
}

class Sheet {
  constructor(text, root) {
    this.text = text;
    this.rows = rowsOf(text.pieces).map(([first, stop]) => ({ first, stop, inside: null, element: element('div', 'row') }));
    root.replaceChildren();
    for (let i = 0; i < this.rows.length; i += ROWS) {
      const chunk = element('div', 'chunk');
      chunk.append(...this.rows.slice(i, i + ROWS).map(row => row.element));
      root.append(chunk);
    }
  }

  // Colours the blocks; only rows that are cut at other places inside are made anew.
  show(cuts) {
    const { lengths } = this.text;
    let block = 0, next = 0;
    for (const row of this.rows) {
      const inside = [];
      let opens = row.first === 0;
      if (next < cuts.length && cuts[next] + 1 === row.first) { next++; block++; opens = true; }
      const firstBlock = block;
      while (next < cuts.length && cuts[next] + 1 < row.stop) { inside.push(cuts[next] + 1); next++; block++; }
      if (row.inside !== inside.join()) {
        const edges = [row.first, ...inside, row.stop];
        row.element.replaceChildren(...edges.slice(1).map((stop, i) => makePart(this.text, edges[i], stop)));
        row.inside = inside.join();
      }
      Array.from(row.element.children).forEach((part, i) => {
        const b = firstBlock + i, first = i > 0 || opens;
        const name = 'part' + (first ? ' first' : '');
        if (part.className !== name) part.className = name;
        part.children[1].className = 't' + b % COLOURS;
        const size = first ? `${b + 1} \u00b7 ${(this.lengthAt(cuts, b) - this.lengthAt(cuts, b - 1)).toLocaleString('en')}` : '';
        if (part.children[2].textContent !== size) part.children[2].textContent = size;
      });
    }
    return [...cuts.map((c, b) => lengths[c] - this.lengthAt(cuts, b - 1)),
      lengths[lengths.length - 1] - this.lengthAt(cuts, cuts.length - 1)];
  }

  // Tokens up to the end of block b.
  lengthAt(cuts, b) {
    const { lengths } = this.text;
    return b < 0 ? 0 : lengths[b < cuts.length ? cuts[b] : lengths.length - 1];
  }
}

function summary(cuts, sizes, gains) {
  const sorted = Float64Array.from(sizes).sort(), number = x => Math.round(x).toLocaleString('en');
  const total = sorted.reduce((a, b) => a + b, 0), forced = cuts.filter(c => gains[c] <= FORCED).length;
  return { blocks: number(sizes.length), tokens: number(total), mean: number(total / sizes.length),
    median: number(sorted[sorted.length >> 1]), shortest: number(sorted[0]), longest: number(sorted[sorted.length - 1]),
    ...(forced ? { forced: number(forced) } : {}) };
}

function start() {
  const data = JSON.parse(document.getElementById('data').textContent);
  const find = id => document.getElementById(id), form = document.forms[0], select = document.querySelector('select');
  const span = Math.log2(LARGEST / data.smallest);
  const target = () => Math.round(data.smallest * 2 ** (find('target').value * span));
  find('threshold').value = Math.max(-10, Math.min(10, data.logOdds));
  find('target').value = Math.log2(Math.max(data.smallest, Math.min(LARGEST, data.target)) / data.smallest) / span;
  find('wish').textContent = data.wish;
  let sheet, asked = 0;

  const update = () => {
    asked = 0;
    const { text } = sheet, mode = form.elements.mode.value, odds = +find('threshold').value, [low, high] = boundsOf(target(), Infinity);
    find('threshold-shown').textContent = 'p \u2265 ' + (1 / (1 + Math.exp(-odds))).toPrecision(3);
    find('target-shown').textContent = `${target().toLocaleString('en')} tokens, from ${low} to ${high.toLocaleString('en')}`;
    const cuts = mode === 'threshold' ? thresholdCuts(text.gains, odds)
      : mode === 'target' ? targetCuts(text, target(), data.weight) : text.cuts;
    const sizes = text.pieces.join('') ? sheet.show(cuts) : [];
    find('facts').replaceChildren(...Object.entries(sizes.length ? summary(cuts, sizes, text.gains) : { blocks: '0' }).map(
      ([name, value]) => { const item = element('div'); item.append(element('dt', '', name), element('dd', '', value)); return item; }));
  };
  const ask = () => { asked = asked || requestAnimationFrame(update); };
  const open = i => {
    sheet = new Sheet(data.texts[i], find('sheet'));
    document.querySelector('h1').textContent = shown(data.texts[i].id);
    update();
  };
  for (const name of ['threshold', 'target']) find(name).addEventListener('input', () => { form.elements.mode.value = name; ask(); });
  form.addEventListener('change', ask);
  select.addEventListener('change', () => { open(select.selectedIndex); scrollTo(0, 0); });
  select.append(...data.texts.map(text => element('option', '', shown(text.id))));
  select.hidden = data.texts.length < 2;
  if (data.texts.length) open(0);
}

if (typeof document !== 'undefined') start();
