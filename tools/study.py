"""The study of one real model: every row of configs/study.py trained and evaluated, one after the other.

  python -m tools.study --model FOLDER --data DIR --workdir STUDY --plan               the hours that it takes
  python -m tools.study --model FOLDER --data DIR --workdir STUDY --only untrained     what needs no training
  python -m tools.study --model FOLDER --data DIR --workdir STUDY --minutes 300        five hours of all of it
  python -m tools.study --model FOLDER --data DIR --workdir STUDY --segmentations      ways to cut, untrained
  python -m tools.study --model FOLDER --data DIR --workdir STUDY --segmentations --student STUDY/students/parts/seed=0
  python -m tools.study --model FOLDER --data DIR --workdir STUDY --segmentations --student overlap_64

DIR is a folder with seg/{split}_{category}.jsonl.gz, documents that somebody cut into blocks (blockattn.segmentation.
semanticseg). Students are trained on excerpts of training documents of some categories; all rows are asked the same excerpts
of test documents, half of them of categories that nothing is trained on. The last quarter of an excerpt is the last block,
what is measured: KL to the teacher and cross-entropy, in block mode and in full attention. `KL closed` is the share of the
KL between full attention and the bare block mask that a row makes good, with its interval from resampled documents.
Questions of blockattn.evals.ruler, and over the passages of DIR/qa/test_*.jsonl.gz where they are there, are asked where the
teacher itself answers them better than by guessing.

--segmentations: the context of the same excerpts cut by the segmenter, at its gold boundaries and by splitters, each text in
as many blocks by all of them, so that the mean length is the same. What is measured is the same last block.

Everything is kept at once: STUDY has train.jsonl and held_out.jsonl, students/GROUP/POINT (as launch.sweep names
them) with a result.json each, evaluation/ROW with figures by document, results.json, table.md, and tradeoff.svg, KL against
the share of the context that is computed again for every prompt. Started again, it goes on where it was stopped, within a
training too.
"""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from blockattn import disk, mesh, metrics, tree
from blockattn.data import encode
from blockattn.errors import UserError
from blockattn.evals import answers, gap, rivals, ruler
from blockattn.models import flops
from blockattn.segmentation import api
from blockattn.train import command, job, workdir as workdir_lib
from configs import study as rows_of
from launch import sweep
from tools import arguments, charts, compare, evaluate, excerpts, ruler as ruler_files
from tools.bench import measuring

BARE = 'bare'   # the row that `closed` is measured from: the block mask alone
KNOWN, NEW = 'known', 'new'   # parts of the held-out documents
DOCUMENTS = 'documents'   # the evaluation of a row that is no question
FIRST, RIVALS = 'untrained', 'rivals'   # groups that need no training: the one that others are compared with, and the last
_RIVALS = 'epic:8,epic:32,cacheblend:0.15,star,ape:0.9:0.9:1'
QUESTIONS = (ruler.Shape('needles', 512, 4), ruler.Shape('needles', 1024, 8), ruler.Shape('variables', 512, 4, hops=1),
             ruler.Shape('words', 512, 4, words=1))
PASSAGES = 'nq_open', 'hotpot_distractor', '2wiki_distractor', 'tatqa'   # of DIR/qa, where they are there
_GFLOPS = 100.0   # that two cores do
_AGAIN = 'recomputed.json'   # beside a row's documents: the share of the context that it computes again for every prompt
_MAY_MOVE = 'model.source', 'data.files'   # keys of a training that are paths, which the study itself gives


# The study.

class Study:
  """What all rows share; what takes long is made when it is asked for first.

  Attributes:
    options: of the command line.
    workdir: all that is kept.
  """

  def __init__(self, options):
    self.options, self.workdir = options, pathlib.Path(options.workdir)
    self._claim()
    self.base = self.options_of({}, 0)
    job.use_cpu_cores(self.base)
    self.place = mesh.Placement(mesh.make_mesh({}, jax.local_devices()[:1]))
    self.compute = job.compute_of(self.base.compute, None, self.place.platform)

  def _claim(self):
    """Refuses a folder that holds a study of something else."""
    path, names = self.workdir / 'study.json', ('model', 'data', 'docs', 'tokens', 'texts', 'steps')
    said = {name: str(getattr(self.options, name)) for name in names}
    if not path.exists():
      self.workdir.mkdir(parents=True, exist_ok=True)
      metrics.write_json(path, said)
    for name, value in disk.read_json(path, {str: str}).items():
      if said[name] != value:
        raise UserError(f'{path}: --{name} was {value} there and is {said[name]}; name another --workdir, or the same again')

  def options_of(self, keys: Mapping, seed: int, *, baseline: bool = False):
    """The training of a row."""
    length = 9 * self.options.tokens // 8   # room for what an excerpt has more once it is in blocks, and for sinks
    config = rows_of.get_config(f'ctx={length},baseline={baseline}')
    config.model.source, config.data.files = str(self.options.model), (str(self.workdir / 'train.jsonl'),)
    config.steps = self.options.steps
    config.update_from_flattened_dict({key: command.without_dots(value) for key, value in keys.items()})
    config.optim.warmup, config.seed = min(config.optim.warmup, config.steps // 2), seed
    return job.options_of(config)

  @functools.cached_property
  def teacher(self) -> gap.Subject:
    cfg = job.model_config(self.base.model)
    bare = job.block_options(self.base, cfg, 0)[1].bare
    return gap.Subject(job.load_language_model(self.base, self.place, cfg), cfg, self.compute, 'full', bare)

  @functools.cached_property
  def tokenizer(self):
    return encode.load_tokenizer(self.options.model)

  @functools.cached_property
  def encoder(self):
    return encode.Encoder(self.tokenizer)

  @functools.cached_property
  def held_out(self) -> list[excerpts.Excerpt]:
    """Also writes what the students are trained on."""
    known, new = {KNOWN: rows_of.KNOWN}, {NEW: rows_of.NEW}
    held_out, train = (self.workdir / f'{name}.jsonl' for name in ('held_out', 'train'))
    draw = functools.partial(excerpts.draw, pathlib.Path(self.options.data), tokens=self.options.tokens,
                             tokenizer=self.tokenizer)
    if not train.exists():
      excerpts.write(train, ({'id': one.id, 'text': one.text} for one in draw('train', self.options.texts, parts=known)))
    if not held_out.exists():
      excerpts.write(held_out, map(dataclasses.asdict, draw('test', self.options.docs, parts=known | new)))
    return excerpts.read(held_out)

  @functools.cached_property
  def documents(self):
    """The held-out excerpts as the segmenter cuts them at the length of training."""
    target = min(rows_of.TARGET, self.options.tokens // 4)
    spans = api.segment_many([one.text[:one.read] for one in self.held_out], target_tokens=target, tokenizer=self.tokenizer)
    return excerpts.encoded(self.held_out, [[stop for _, stop in own[:-1]] for own in spans], self.encoder)

  def measured(self, folder: pathlib.Path, subjects: Mapping[str, gap.Subject], documents=None, **asked) -> list[dict]:
    """The rows of gap.measure, kept in a folder."""
    with metrics.counting(str(folder.relative_to(self.workdir)), stream=sys.stderr) as progress:
      return gap.measure(subjects, self.teacher, *(documents or self.documents), self.tokenizer, batch=self.options.batch,
                         out=folder, facts=evaluate.facts_of(subjects, self.tokenizer), progress=progress,
                         **{'max_new': 0} | asked)

  @functools.cached_property
  def questions(self) -> dict[str, tuple]:
    """{name: (documents, examples)} of the kinds that the teacher answers better than by guessing."""
    files, kept = [], {}
    for shape in QUESTIONS:
      path = ruler_files.write(self.workdir / 'questions', shape, self.options.questions, self.tokenizer)
      files.append((shape.name, path, 1 / shape.keys if shape.kind == 'needles' else 0.0))
    for name in PASSAGES:
      if (path := pathlib.Path(self.options.data) / 'qa' / f'test_{name}.jsonl.gz').is_file():
        files.append((name, path, 0.0))
    for name, path, chance in files:
      documents = evaluate.file_docs([str(path)], self.tokenizer, limit=self.options.questions)[:2]
      rows = self.asked('teacher', {gap.TEACHER: self.teacher}, name, documents)
      if gap.summarize(rows)[gap.TEACHER]['intervals']['substring']['low'] > chance:
        kept[name] = documents
    return kept

  def asked(self, row: str, subjects: Mapping[str, gap.Subject], name: str, documents) -> list[dict]:
    return self.measured(self.workdir / 'evaluation' / row / name, subjects, documents, max_new=16, stop='\n')

  def evaluated(self, row: str, subjects: Mapping[str, gap.Subject]) -> None:
    folder = self.workdir / 'evaluation' / row / DOCUMENTS
    self.measured(folder, subjects)
    metrics.write_json(folder / _AGAIN, {name: gap.recomputed(self.documents[0], one) for name, one in subjects.items()})

  def answered(self, row: str, subjects: Mapping[str, gap.Subject]) -> None:
    for name, documents in self.questions.items():
      self.asked(row, subjects, name, documents)


def untrained(study: Study, group: str) -> dict[str, gap.Subject]:
  """The model as it is in the forms of block mode of a group, in the first in full attention, too."""
  if group == RIVALS:
    return rivals.subjects(rivals.parse(_RIVALS), study.teacher, study.tokenizer)
  subjects = {gap.TEACHER: study.teacher} if group == FIRST else {}
  for name, keys in rows_of.UNTRAINED[group].items():
    options = study.options_of(keys, 0)
    _, form = job.block_options(options, study.teacher.cfg, job.sink_of(options.blocks, study.tokenizer))
    subjects[name] = dataclasses.replace(study.teacher, mode='block', options=form)
  return subjects


def trained(study: Study, group: str, row: str, seed: int) -> dict:
  """The result of a training, which is done if it has not been; its figures are in the study's folder."""
  keys = rows_of.POINTS[group][row]
  if group == 'baseline_time':
    keys = keys | {'steps': steps_in_time(study)}
  options = study.options_of(keys, seed, baseline=group.startswith('baseline'))
  folder = study.workdir / 'students' / group / sweep.point_name(keys | {'seed': seed})
  path = folder / 'result.json'
  if path.is_file():
    workdir_lib.check_config(folder, options, free=_MAY_MOVE)
    return disk.read_json(path, {'row': str, 'seed': int, 'steps': int, 'seconds': disk.NUMBER})
  _ = study.held_out   # writes the training documents
  with workdir_lib.only_run_in(folder):
    if not job.finished(options, folder):
      job.module_of(options).run(options, folder)
    block = gap.load(folder, 'block', study.compute)[0]
    subjects = {'block': block, 'full': dataclasses.replace(block, mode='full')}
    study.evaluated(name_of(row, seed), subjects)
    study.answered(name_of(row, seed), subjects)
    result = {'row': row, 'group': group, 'seed': seed, 'steps': options.steps, 'keys': keys,
              'tokens': options.steps * options.batch * options.data.length,
              'seconds': options.steps / metrics.measured_speed(folder), 'weights': evaluate.weights_key(block),
              'run': disk.read_json(folder / 'run.json')}
    metrics.write_json(path, result)
  return result


def name_of(row: str, seed: int) -> str:
  return f'{row}_seed_{seed}'


def steps_in_time(study: Study) -> int:
  """Of block fine-tuning, as many as take as long as the distillation; two, whose speed can be measured, at least."""
  ours, theirs = (trained(study, group, row, 0) for group, row in (('parts', 'distilled'), ('baseline', 'finetuned')))
  return max(2, round(theirs['steps'] * ours['seconds'] / theirs['seconds']))


# Tables.

def pooled(seeds: Sequence[dict]) -> dict:
  """The figures of several students on one document as those of one: sums over all."""
  sums = {}
  for one in seeds:
    for low, *values in one['by_distance']:
      sums[low] = [a + b for a, b in zip(sums.get(low, [0, 0, 0]), values, strict=True)]
  return {'scores': {}, 'by_distance': [[low, *values] for low, values in sorted(sums.items())]}


def read_rows(path: pathlib.Path) -> list[dict]:
  """The whole lines of an evaluation, by document; none where there is no file."""
  lines = disk.read_text(path).split('\n')[:-1] if path.exists() else ()
  return sorted(map(json.loads, lines), key=lambda row: row['document'])


def joined(study: Study, found: Mapping[str, list[str]]) -> list[dict]:
  """A row per held-out document with all models by name: those of no training, and of each row in `found`, {row: names of
  its evaluations}, 'ROW' and 'ROW full', its students' figures pooled."""
  read = lambda name: read_rows(study.workdir / 'evaluation' / name / DOCUMENTS / gap.DOCUMENTS)
  models = [row['models'] for row in read(FIRST)]
  for group in (*rows_of.UNTRAINED, RIVALS):
    if group != FIRST and len(more := read(group)) == len(models):   # else it is not done
      models = [own | row['models'] for own, row in zip(models, more, strict=True)]
  for name, evaluations in found.items():
    seeds = [read(one) for one in evaluations]
    for i, own in enumerate(models):
      models[i] = own | {f'{name}{suffix}': pooled([rows[i]['models'][mode] for rows in seeds])
                         for mode, suffix in (('block', ''), ('full', ' full'))}
  return [{'models': own} for own in models]


def computed_again(study: Study, found: Mapping[str, list[str]]) -> dict[str, float]:
  """The share of the context that each row of `joined` computes again for every prompt, where its evaluation says so."""
  path = lambda name: study.workdir / 'evaluation' / name / DOCUMENTS / _AGAIN
  read = lambda name: disk.read_json(path(name)) if path(name).exists() else {}
  shares = {}
  for group in (*rows_of.UNTRAINED, RIVALS):
    shares |= read(group)
  return shares | {name: said['block'] for name, evaluations in found.items() if (said := read(evaluations[0]))}


def figures(sampled: Mapping[str, Mapping[str, np.ndarray]], name: str, against: str) -> dict:
  """KL, CE with intervals, the share of the KL closed, and by how much the KL is above that of another row, of what
  gap.sampled gives."""
  share = gap.share_in(sampled, gap.TEACHER, BARE, name)
  found = {m: answers.interval(sampled[name][m]) for m in ('kl', 'ce')} | {f'closed_{m}': x for m, x in share.items()}
  found['ce_rise'] = answers.interval(sampled[name]['ce'] / sampled[gap.TEACHER]['ce'] - 1)
  if against in sampled and against != name:
    found['kl_less'] = answers.interval(sampled[name]['kl'] - sampled[against]['kl'])
  return found


def summarized(study: Study, results: Sequence[Mapping]) -> dict:
  """{row: {'seeds', 'steps', 'seconds', 'recomputed', part: figures, 'full': figures of full attention on all documents}};
  `recomputed` is None where an evaluation does not say it."""
  by_row = {}
  for result in results:
    by_row.setdefault(result['row'], []).append(result)
  found = {name: [name_of(name, one['seed']) for one in own] for name, own in by_row.items()}
  rows, again = joined(study, found), computed_again(study, found)
  part = {which: [row for row, one in zip(rows, study.held_out, strict=True) if one.part == which] for which in (KNOWN, NEW)}
  sampled, summary = {which: gap.sampled(some) for which, some in (*part.items(), ('all', rows))}, {}
  for name in rows[0]['models']:
    if name.endswith(' full'):
      continue
    own = by_row.get(name, ())
    summary[name] = {'seeds': len(own), 'steps': own[0]['steps'] if own else 0,
                     'seconds': float(np.mean([one['seconds'] for one in own])) if own else 0.0,
                     'recomputed': again.get(name),
                     **{which: figures(sampled[which], name, 'distilled') for which in part}}
    if own:
      summary[name]['full'] = figures(sampled['all'], f'{name} full', gap.TEACHER)
  return summary


def shown(value: Mapping | None, form: str = '{:.4f}') -> str:
  """'mean [low, high]'."""
  return '' if value is None else '{} [{}, {}]'.format(*(form.format(value[key]) for key in ('mean', 'low', 'high')))


def percent(value: Mapping | None) -> str:
  return '' if value is None else f'{compare.percent(value)} %'


def table(summary: Mapping) -> str:
  """Markdown: a row per row."""
  head = [f'{what}, {part}' for part in (KNOWN, NEW) for what in ('KL', 'KL closed', 'CE', 'KL less `distilled`')]
  lines = [measuring.head('row', 'seeds', 'steps', 's', 'computed again', *head, 'KL, full attention', 'CE, full attention')]
  for name, own in summary.items():
    cells = ['' if own['recomputed'] is None else f'{own["recomputed"]:.1%}']
    for part in (KNOWN, NEW):
      one = own.get(part, {})
      cells += [shown(one.get('kl')), percent(one.get('closed_kl')), shown(one.get('ce')),
                shown(one.get('kl_less'), '{:+.4f}')]
    full = own.get('full', {})
    lines.append(measuring.row(name, own['seeds'] or '', own['steps'] or '', f'{own["seconds"]:.0f}' if own['seeds'] else '',
                               *cells, shown(full.get('kl')), percent(full.get('ce_rise'))))
  return '\n'.join(lines)


def questions_table(study: Study) -> str:
  """Markdown: a row per kind of question and model that was asked as many as the teacher: how many answers hold what was
  asked for, F1, and of the right answer CE and KL."""
  lines = [measuring.head('questions', 'asked', 'model', 'answer holds it', 'F1', 'CE', 'KL')]
  by_kind, folder = lambda path: (path.parent.name, path.parents[1].name), study.workdir / 'evaluation'
  asked = {path.parent.name: len(read_rows(path)) for path in folder.glob(f'teacher/*/{gap.DOCUMENTS}')}
  for path in sorted(folder.glob(f'*/*/{gap.DOCUMENTS}'), key=by_kind):
    kind, row = by_kind(path)
    rows = read_rows(path)
    if not rows or len(rows) != asked.get(kind):
      continue
    for name, own in gap.summarize(rows).items():
      means = own['intervals']
      lines.append(measuring.row(kind, len(rows), f'{row} {name}' if name in ('block', 'full') else name,
                                 percent(means['substring']), percent(means['f1']), shown(means['ce']), shown(means['kl'])))
  return '\n'.join(lines)


def keep(study: Study) -> str:
  """Writes results.json, table.md and tradeoff.svg of what there is so far, also of earlier starts."""
  order = [row for rows in rows_of.POINTS.values() for row in rows]
  found = map(disk.read_json, (study.workdir / 'students').glob('*/*/result.json'))
  known = [one for one in found if one['row'] in order]   # a folder may hold rows of an earlier config
  results = sorted(known, key=lambda one: (order.index(one['row']), one['seed']))
  summary = summarized(study, results)
  metrics.write_json(study.workdir / 'results.json', {
      'command': sys.argv, 'commit': workdir_lib.git_commit(), 'machine': measuring.machine(), 'rows': summary,
      'trainings': results, 'documents': len(study.held_out)})
  kl = lambda name: summary[name][NEW]['kl']['mean']
  # Those far above would press all others flat.
  points = {name: (own['recomputed'], kl(name)) for name, own in summary.items()
            if name != gap.TEACHER and own['recomputed'] is not None and kl(name) <= 2 * kl(BARE)}
  charts.write(study.workdir / 'tradeoff.svg', charts.tradeoff(points, charts.AGAIN, 'KL to the teacher, new kinds, nats'))
  text = f'{table(summary)}\n\n{questions_table(study)}'
  disk.write_text(study.workdir / 'table.md', text + '\n')
  return text


# Does it matter where the cuts are?

def segmentations(study: Study) -> str:
  """Each way to cut at each granularity, by what a reader of blocks loses; writes segmentations.json, .md and .svg."""
  who, reader = reader_of(study, study.options.student)
  texts = [one.text[:one.read] for one in study.held_out]
  ways = excerpts.ways_to_cut(study.tokenizer, texts)
  summary = {}
  for fine in study.options.granularities:
    chosen = [(one, count_of(one, fine, len(ends))) for one, ends in zip(
        study.held_out, encode.token_ends(study.tokenizer)(texts), strict=True)]
    chosen = [(one, count) for one, count in chosen if count]
    rows = []
    for way in (way for way in ways if way != excerpts.GOLD or fine == excerpts.GOLD):
      cuts = [one.gold if way == excerpts.GOLD else ways[way](one.text[:one.read], count) for one, count in chosen]
      documents = excerpts.encoded([one for one, _ in chosen], cuts, study.encoder)
      folder = study.workdir / 'evaluation' / 'segmentations' / who / fine / way.replace(' ', '_')
      found = study.measured(folder, {who: reader}, documents)
      context = [size for doc in documents[0] for size in doc.lengths[:-1]]
      rows = [a | {'models': a['models'] | {way: b['models'][who]}} for a, b in zip(
          rows or [{'models': {}}] * len(found), found, strict=True)]
      summary.setdefault(fine, {})[way] = {'documents': len(found), 'tokens': float(np.mean(context))}
      sampled = gap.sampled(rows)
      for one, own in summary[fine].items():
        own |= {m: answers.interval(sampled[one][m]) for m in ('kl', 'ce')}
        own['kl_more'] = answers.interval(sampled[one]['kl'] - sampled['segmenter']['kl'])
      write_segmentations(study, who, summary)
  return segmentation_table(summary)


def reader_of(study: Study, name: str) -> tuple[str, gap.Subject]:
  """(a name, who reads in block mode): a row that needs no training, or a student's folder."""
  for group, rows in rows_of.UNTRAINED.items():
    if name in rows:
      return name, untrained(study, group)[name]
  if not pathlib.Path(name).is_dir():
    raise UserError(f'--student {name}: no such folder, and no row; '
                    f'{tree.did_you_mean(name, [row for rows in rows_of.UNTRAINED.values() for row in rows])}')
  return pathlib.Path(name).name, gap.load(name, 'block', study.compute)[0]


def count_of(one: excerpts.Excerpt, fine: str, tokens: int) -> int:
  """How many cuts a context of so many tokens gets."""
  return len(one.gold) if fine == excerpts.GOLD else max(0, round(tokens / int(fine)) - 1)


def write_segmentations(study: Study, who: str, summary: Mapping) -> None:
  path = study.workdir / f'segmentations_{who}'
  metrics.write_json(path.with_suffix('.json'), {'command': sys.argv, 'commit': workdir_lib.git_commit(), 'student': who,
                                                 'machine': measuring.machine(), 'granularities': summary})
  disk.write_text(path.with_suffix('.md'), segmentation_table(summary) + '\n')
  sizes = [own for fine, own in summary.items() if fine != excerpts.GOLD]
  lines = {way: sorted((round(own[way]['tokens']), own[way]['kl']['mean']) for own in sizes if way in own)
           for way in next(iter(summary.values()))}
  if sizes:
    title = f'KL to the teacher, {who}'
    charts.write(path.with_suffix('.svg'), charts.logarithmic(lines, title, 'tokens of a block', 'nats'))


def segmentation_table(summary: Mapping) -> str:
  lines = [measuring.head('blocks', 'cut by', 'documents', 'tokens of a block', 'KL', 'KL more than segmenter', 'CE')]
  for fine, ways in summary.items():
    for way, own in ways.items():
      lines.append(measuring.row(fine, way, own['documents'], f'{own["tokens"]:.0f}', shown(own['kl']),
                                 '' if way == 'segmenter' else shown(own['kl_more'], '{:+.4f}'), shown(own['ce'])))
  return '\n'.join(lines)


# The command.

def wanted(only: Sequence[str], seeds: int) -> list[tuple[str, str, int]]:
  """(group, row, seed) of the trainings that names of rows and groups ask for, all without one; first seeds first, and no
  more than so many."""
  every = [(group, row, seed) for group, rows in rows_of.POINTS.items() for row in rows
           for seed in range(min(seeds, rows_of.SEEDS.get(group, 1)))]
  known = {name for group, row, _ in every for name in (group, row)} | {*rows_of.UNTRAINED, RIVALS}
  unknown = [name for name in only if name not in known]
  if unknown:
    groups, rows = [*rows_of.UNTRAINED, RIVALS, *rows_of.POINTS], [row for rows in rows_of.POINTS.values() for row in rows]
    raise UserError(f'--only {",".join(unknown)}: choose from groups {", ".join(groups)}, and rows {", ".join(rows)}')
  return sorted((one for one in every if not only or {*one[:2]} & {*only}), key=lambda one: one[2])


def plan(study: Study, points: Sequence[tuple[str, str, int]]) -> str:
  """What the trainings need at --gflops, by group; evaluating comes on top, some minutes each."""
  target = min(rows_of.TARGET, study.options.tokens // 4)
  cut = flops.one_document([target] * (study.base.data.length // target))
  hours, cfg = {}, job.model_config(study.base.model)
  for group, row, seed in points:
    # `finetuned_time` is as long as `distilled`.
    options = study.options_of(rows_of.POINTS[group][row], seed, baseline=group == 'baseline')
    made = job.module_of(options).build(options, study.place, cfg, platform=study.place.platform)
    needed = options.steps * options.batch * made.flops(cut).total(made.loss_tokens(cut))
    hours[group] = hours.get(group, 0.0) + needed / study.options.gflops / 3.6e12
  lines = [measuring.head('group', 'trainings', 'hours')]
  for group, spent in hours.items():
    lines.append(measuring.row(group, sum(one[0] == group for one in points), f'{spent:.1f}'))
  return '\n'.join([*lines, measuring.row('all', len(points), f'{sum(hours.values()):.1f}')])


def run(options) -> None:
  points = wanted(options.only, options.seeds)
  if options.steps < 2:
    raise UserError(f'--steps {options.steps}: 2 at least, from the second on the speed of a training is measured')
  command.quiet_libraries()
  study = Study(options)
  if options.plan:
    print(plan(study, points))
    return
  if options.minutes:
    # As a cluster does it: a training saves and ends, an evaluation has kept what it has.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stop = threading.Timer(60 * options.minutes, os.kill, (os.getpid(), signal.SIGTERM))
    stop.daemon = True
    stop.start()
  if options.segmentations:
    print(segmentations(study))
    return
  for group in (*rows_of.UNTRAINED, RIVALS):
    if group == FIRST or not options.only or group in options.only:
      study.evaluated(group, untrained(study, group))
      keep(study)
  study.answered(FIRST, {name: one for name, one in untrained(study, FIRST).items() if one is not study.teacher})
  for group, row, seed in points:
    trained(study, group, row, seed)
    keep(study)
  print(keep(study))


def parsed(argv: Sequence[str] | None):
  parser = arguments.Parser(prog='python -m tools.study', description=__doc__)
  parser.add_argument('--model', required=True, metavar='FOLDER', help='in the Hugging Face format: of tools.smollm2')
  parser.add_argument('--data', required=True, metavar='DIR', help='folder with seg/')
  parser.add_argument('--workdir', metavar='DIR', default='runs/study')
  parser.add_argument('--only', metavar='NAMES', default=(), type=lambda text: text.split(','),
                      help='rows or groups of configs/study.py, with commas (default: all)')
  parser.add_argument('--minutes', type=arguments.amount, default=0.0, help='stop after so many; 0: when all is done')
  parser.add_argument('--plan', action='store_true', help='say what it takes, and do nothing')
  parser.add_argument('--segmentations', action='store_true', help='ways to cut instead of rows')
  parser.add_argument('--student', metavar='NAME', default=BARE, help='segmentations: who reads, the folder of a trained '
                      'student, or the model as it is in a row that needs no training, such as overlap_64 (default: bare)')
  parser.add_argument('--granularities', metavar='TOKENS', default=f'{excerpts.GOLD},256,128,64',
                      type=lambda text: text.split(','), help='segmentations: mean tokens of a block, or '
                      f'{excerpts.GOLD}, as many blocks as the text has')
  arguments.add_numbers(parser, docs=(32, 'held-out documents'), tokens=(1024, 'of an excerpt'),
                        texts=(2048, 'excerpts to train on, at most'), steps=(rows_of.get_config().steps, 'of a training'),
                        seeds=(max(rows_of.SEEDS.values()), 'of a row, at most'),
                        questions=(24, 'of each kind'), batch=(4, 'documents at a time'),
                        gflops=(_GFLOPS, '10^9 operations a second of this machine, for the plan'))
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
  options = parsed(argv)
  return arguments.run('study', lambda: run(options),
                       stopped=f'what is done stands in {options.workdir}, start the same command again to go on')


if __name__ == '__main__':
  sys.exit(main())
