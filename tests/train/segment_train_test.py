"""Rows drawn from documents with known cuts, and the segmenter's trainer on them."""

import dataclasses
import json
import re
import shutil

import data_cases
import jax
import numpy as np
import pytest
import tokenizers

from blockattn.hf import config as hf_config, convert
from blockattn.models import classifier, transformer
from blockattn.segmentation import labelled, markers, segmenter, variation
from blockattn.segmentation.semanticseg import schema
from blockattn.train import job, segment
from configs import common


def document(number, category='notes', blocks=4):
  """Blocks that begin with a title in capitals and have a few lines."""
  rng = np.random.default_rng(number)
  words = lambda: ' '.join(rng.choice(['the', 'question', 'answer', 'passage', 'about'], 4))
  texts = [f'TITLE {number} {i}\n\n' + ''.join(f'{words()}.\n' for _ in range(rng.integers(2, 5))) for i in range(blocks)]
  return schema.Document(f'd{number}', category, 'made up', 'CC0-1.0', tuple(texts))


DOCUMENTS = [document(i, ['notes', 'wiki'][i % 2], 3 + i % 3) for i in range(12)]


def reader(style='pooled', **options) -> markers.Reader:
  tokenizer = tokenizers.Tokenizer.from_str(data_cases.tiny_tokenizer().backend_tokenizer.to_str())
  tokenizer.add_special_tokens([markers.CUT_TOKEN, *markers.GAP_TOKENS])
  return markers.Reader(tokenizer, markers.ReadOptions(style=style, head=5, tail=2, **options))


def drawn(style='pooled', documents=DOCUMENTS, ahead=1, seed=0, **options) -> labelled.DrawnRows:
  chosen = labelled.DrawOptions(**{'length': 160 if style == 'text' else 96} | options)
  return labelled.DrawnRows(documents, reader(style, ahead=ahead), chosen, seed)


@pytest.mark.parametrize('style', markers.STYLES)
def test_rows_hold_labels_where_decisions_are_read(style):
  """As many cuts as the texts have titles but for the first of each part; all else that is labelled is none."""
  rows = drawn(style, variants=1, short=0.0, drop=0.0, skip=0.0, mosaic=0.0)
  row = rows[3]
  assert row['tokens'].shape[0] == row['labels'].shape[0] == rows.length and row['tokens'].dtype == np.int32
  assert set(np.unique(row['labels'])) == {-100, 0, 1}
  assert not np.any((row['labels'] >= 0) & (row['layout'].doc == 0))
  first = [int(np.argmax(row['layout'].doc == part)) for part in range(1, row['layout'].doc.max() + 1)]
  assert all(row['labels'][i] == -100 for i in first)
  if style == 'pooled':
    is_title = row['tokens'][:, 1] == reader().units(['TITLE 1 1\n']).ids[0, 1]
    known = row['labels'] >= 0
    assert np.array_equal(row['labels'][known] == 1, is_title[known])


def test_rows_that_are_too_short_for_the_longest_unit_are_refused():
  with pytest.raises(ValueError, match='config.data.length=25 is too short: .* = 7 tokens have to fit; give more than 25'):
    drawn('text', length=25)
  assert drawn('text', length=26)[0]['tokens'].shape == (26,)


def test_a_decision_that_waits_is_labelled_later():
  plain, waiting = (labelled.windows(DOCUMENTS[0], reader(ahead=ahead), 64)[0] for ahead in (1, 3))
  np.testing.assert_array_equal(plain['labels'][:30], waiting['labels'][2:32])


def test_a_row_depends_on_its_number_and_the_seed_alone():
  one, other = drawn(seed=5), drawn(seed=5)
  other[0]
  for i in (7, 2):
    jax.tree.map(np.testing.assert_array_equal, one[i], other[i])
  assert not np.array_equal(one[7]['tokens'], drawn(seed=6)[7]['tokens'])


def test_texts_that_follow_each_other_are_cut_between():
  """Documents of one block have no cuts of their own."""
  single = [dataclasses.replace(d, blocks=(d.text,)) for d in DOCUMENTS]
  apart, joined = (drawn(documents=single, variants=1, join=join, short=0.0, mosaic=0.0) for join in (0.0, 1.0))
  count = lambda rows: sum(int(np.sum(rows[i]['labels'] == 1)) for i in range(10))
  assert count(apart) == 0 and count(joined) > 10


def test_units_that_begin_a_block_are_never_left_out():
  coded = labelled.code(DOCUMENTS[0].blocks, reader())
  less = coded.take(np.flatnonzero(coded.labels != 0))
  assert less.labels.tolist() == [-100] + [1] * (len(DOCUMENTS[0].blocks) - 1) and len(less.units) == len(less.labels)
  count = lambda rows: sum(int(np.sum(row['labels'] == 1)) for row in rows)
  bare = dataclasses.replace(document(1, blocks=40))
  cuts, units = zip(*((count(rows), sum(int(np.sum(r['labels'] >= 0)) for r in rows)) for rows in (
      [drawn(documents=[bare], variants=1, short=0.0, join=0.0, length=400, skip=skip, mosaic=0.0)[i] for i in range(8)]
      for skip in (0.0, 0.9))), strict=True)
  assert cuts[1] / units[1] > 1.3 * cuts[0] / units[0]


def test_a_high_temperature_takes_categories_alike():
  documents = DOCUMENTS[::2] * 9 + DOCUMENTS[1::2]
  documents = [dataclasses.replace(d, id=str(i)) for i, d in enumerate(documents)]
  even, given = (drawn(documents=documents, temperature=t).shares for t in (1e6, 1.0))
  assert even.round(3).tolist() == [0.5, 0.5] and given[0] > 0.85


def test_cuts_near_a_gold_one_are_left_out():
  strict, lenient = (drawn(variants=1, tolerance=t, short=0.0, skip=0.0, mosaic=0.0)[0]['labels'] for t in (0, 1))
  assert np.array_equal(strict == 1, lenient == 1) and np.sum(lenient == 0) < np.sum(strict == 0)


def test_windows_of_a_document_decide_once_on_every_candidate():
  long = document(1, blocks=30)
  for style, ahead in (('none', 1), ('pooled', 1), ('pooled', 4)):
    rows = labelled.windows(long, reader(style, ahead=ahead), 64)
    assert len(rows) > 1
    known = sum(int(np.sum(row['labels'] >= 0)) for row in rows)
    candidates = len(markers.candidates(long.text))
    assert candidates - len(rows) <= known <= candidates


def test_occasions_stand_in_front_of_every_block_and_nothing_else_changes():
  blocks = ('A: hello\n', 'B: well\n\n', 'A: so\n')
  seen = set()
  for seed in range(40):
    dated = variation.occasions(blocks, np.random.default_rng(seed))
    heads = [new.removesuffix(old) for new, old in zip(dated, blocks, strict=True)]
    assert all(new.endswith(old) for new, old in zip(dated, blocks, strict=True))
    assert len({bool(head) for head in heads}) == 1   # all, or none
    assert all(head.endswith('\n') and head.strip() for head in heads if head)
    seen.add(re.sub('[A-Za-z]+', 'a', re.sub('[0-9]+', '0', heads[1])))
  assert len(seen) >= 6


@pytest.mark.parametrize('style', variation.STYLES)
def test_headings_in_another_style_keep_the_blocks(style):
  blocks = ('# One\n\nText.\n', 'Two\n===\nmore text\n```\n# no heading\n```\n', '\\section{Three}\nx\n')
  changed = variation.headings(blocks, style)
  assert len(changed) == 3 and all(b.strip() and b.endswith('\n') for b in changed) and '# no heading' in changed[1]
  assert style in ('none', 'hash') or '# One' not in changed[0]
  assert all('Text.' in changed[0] for _ in '1') and ('Three' in changed[2]) == (style not in ('none', 'capitals'))


def test_marks_stand_between_blocks_and_blank_lines_nowhere_else():
  assert variation.mark(('a\n\nb\n\n', 'c\n \nd'), '\n\n') == ('a\nb\n\n', 'c\nd')


def test_a_line_for_each_sentence():
  assert variation.sentences(('One here. Two\nmore. "Three." Four 3.5 m.\n\n',)) == (
      'One here.\nTwo more.\n"Three."\nFour 3.5 m.\n',)


def test_a_mosaic_has_a_cut_every_few_units():
  single = [dataclasses.replace(d, blocks=(d.text,)) for d in (document(i, blocks=9) for i in range(6))]
  rows = [drawn(documents=single, variants=1, mosaic=1.0)[i] for i in range(6)]
  decided, cuts = (sum(int(np.sum(row['labels'] >= k)) for row in rows) for k in (0, 1))
  assert 3 <= decided / cuts <= 13


def test_wrapping_changes_white_space_only():
  block = 'A long line of words that go on, and on.\nAnother one follows it here.\n\n  code  here\n'
  for width in (0, 20):
    wrapped, = variation.wrap((block,), width)
    assert wrapped.split() == block.split() and wrapped != block and '  code  here\n' in wrapped


def test_every_variation_keeps_the_number_of_blocks():
  for i in range(40):
    varied = variation.vary(DOCUMENTS[1].blocks, 'wiki', np.random.default_rng(i), 1.0)
    assert len(varied) == len(DOCUMENTS[1].blocks) and all(block.strip() for block in varied)


def test_the_best_threshold():
  odds = np.array([3.0, 1.0, -1.0, -3.0, 2.0, 0.0])
  labels = np.array([1, 1, 0, 0, 1, 0])
  threshold, scores = segment.best_threshold(odds, labels, np.array(['a'] * 4 + ['b'] * 2))
  assert 0 <= threshold < 1 and scores == {'a': 1.0, 'b': 1.0}


def config_of(folder, steps):
  """A run that takes seconds: documents, tokenizer and outputs in `folder`."""
  schema.write(folder / 'train_notes.jsonl', DOCUMENTS)
  schema.write(folder / 'validation_notes.jsonl', [document(i) for i in range(50, 53)])
  tokenizer = data_cases.tiny_tokenizer()
  tokenizer.save_pretrained(folder / 'tokenizer')
  config = common.base('segment')
  config.steps, config.batch, config.log_every, config.save_every = steps, 8, 5, 10
  config.model.fields = dict(family='qwen3', vocab=304, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16,
                             qk_norm=True, tied=True)
  config.optim.lr, config.optim.warmup = 3e-2, 2
  config.data.tokenizer, config.data.length = str(folder / 'tokenizer'), 48
  config.data.files = (str(folder / 'train_notes.jsonl'),)
  config.segment.read.style, config.segment.read.head, config.segment.read.tail = 'pooled', 5, 2
  config.segment.eval_files, config.segment.eval_every = (str(folder / 'validation_notes.jsonl'),), 10
  config.segment.export_dtype, config.peak_tflops = 'float32', 1.0
  return config


def lines(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.mark.slow
def test_training_learns_keeps_the_best_and_resumes(tmp_path, standard_promotion, capsys):
  """Eight devices; an interrupted run ends where an uninterrupted one does."""
  config = config_of(tmp_path, steps=20)
  cfg, params = segment.run(segment.read(config), tmp_path / 'whole')
  assert cfg.labels == 2 and cfg.unit_tokens == 9
  losses = [line['loss'] for line in lines(tmp_path / 'whole') if 'loss' in line]
  measured = [line for line in lines(tmp_path / 'whole') if 'val_f1' in line]
  assert all(line['mfu'] > 0 for line in lines(tmp_path / 'whole') if 'steps_per_s' in line)   # as where a peak is known
  assert losses[-1] < losses[0] / 2 and [line['step'] for line in measured] == [10, 20]
  assert max(line['val_f1'] for line in measured) > 0.9
  best = hf_config.read_meta(tmp_path / 'whole' / 'best')['segmenter']
  assert best['step'] in (10, 20) and best['f1'] == max(line['val_f1'] for line in measured)
  told = [line for line in capsys.readouterr().out.splitlines() if ': held out mean_f1 ' in line]
  assert [line.partition(':')[0] for line in told] == ['step 10', 'step 20'] and '(best), val_f1 ' in told[0]

  scorer = segmenter.Segmenter.load(tmp_path / 'whole' / 'best')
  held_out = document(99)
  scored, = scorer.score([held_out.text])
  assert scored.candidates[scored.log_odds > scorer.options.threshold].tolist() == list(held_out.cuts)

  shutil.copytree(tmp_path / 'whole', tmp_path / 'part', ignore=shutil.ignore_patterns('20'))   # as if killed at step 19
  _, resumed = segment.run(segment.read(config), tmp_path / 'part')
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), params, resumed)


def test_a_segmenter_starts_to_read_cohesion_as_it_was(tmp_path):
  config = config_of(tmp_path, steps=3)
  options, plain = segment.read(config), reader()
  place = job.make_placement(options)
  before, params = segment.load_model(options, place, job.model_config(options.model))
  convert.save(params, before, tmp_path / 'model', source=tmp_path / 'tokenizer', meta={}, card='', dtype='float32')
  config.model.source = str(tmp_path / 'model')
  config.segment.read.cohesion = True
  with_it = reader(cohesion=True)
  again = segment.read(config)
  cfg, params = segment.load_model(again, place, job.model_config(again.model))
  P = plain.options.unit_tokens
  assert (before.unit_tokens, cfg.unit_tokens) == (P, P + len(markers.COHESION)) and not np.any(params['units'][P:])
  units = with_it.units(['One two.\n', 'Three two.\n', 'Four.\n'])
  hidden = lambda cfg, params, read: classifier.embed(params, read.read(units, 0, 3)[0][None], cfg, transformer.Compute())
  of_before = params | {'units': params['units'][:P]}
  np.testing.assert_allclose(hidden(cfg, params, with_it), hidden(before, of_before, plain), atol=1e-6)


def test_mistakes_in_the_config_are_named(tmp_path):
  config = config_of(tmp_path, steps=3)
  config.segment.cut_weight = 0.0
  with pytest.raises(ValueError, match='cut_weight'):
    segment.read(config)
  with pytest.raises(ValueError, match='no keys config.segment'):
    segment.read(common.base('distill'))
  config.segment.cut_weight = 1.0
  config.data.files = ()
  with pytest.raises(ValueError, match='config.data.files is empty'):
    segment.read_documents(segment.read(config))
