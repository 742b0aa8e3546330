"""tools.judge from files to tables: with answers that are made up, and with a model of a few thousand random parameters."""

import dataclasses
import json

import data_cases
import hf_cases
import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

import blockattn
from blockattn import blocks
from blockattn.data import encode
from blockattn.evals import gap
from blockattn.hf import config as hf_config, convert, files
from blockattn.models import transformer
from tools import evaluate, judge

OPTIONS = blocks.BlockOptions(sink_ids=(5, 6), positions='local', max_blocks=8)
CONTEXT = ''.join(f'Passage {i}:\nThe answer is {i}.\n\n' for i in range(1, 6))


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """A random Llama without chat template that knows its block options."""
  folder = tmp_path_factory.mktemp('models') / 'student'
  tokenizer = data_cases.tiny_tokenizer(None)
  tokenizer.save_pretrained(folder.with_name('tokenizer'))
  cfg = transformer.ModelConfig('llama', vocab=len(tokenizer), width=16, layers=1, heads=2, kv_heads=1, head_dim=8,
                                mlp=16, max_positions=1024)
  convert.save(hf_cases.random_params(cfg, 'float32', 1), cfg, folder, source=folder.with_name('tokenizer'),
               meta={'blocks': hf_config.blocks_meta(OPTIONS)}, card='', dtype='float32')
  return str(folder)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """{benchmark: its data}."""
  folder = tmp_path_factory.mktemp('data')
  data_cases.write_lines(folder / 'hotpot.jsonl', [data_cases.passages_line(i) for i in range(4)] + [b'{'])
  line = {'input': 'what is it?', 'context': CONTEXT, 'answers': ['the answer'], 'length': 9, 'dataset': '',
          'language': 'en', 'all_classes': None}
  data_cases.write_lines(folder / 'hotpotqa.jsonl', [line | {'_id': f'h{i}'} for i in range(3)])
  data_cases.write_lines(folder / 'gov_report_e.jsonl', [line | {'_id': 'g', 'context': 'Long. ' * 30}])
  turns = [{'speaker': 'Ann', 'dia_id': 'D1:1', 'text': 'I ran. ' * 5}]
  sessions = {f'session_{n}': turns for n in range(1, 9)} | {f'session_{n}_date_time': f'{n} May' for n in range(1, 9)}
  asked = [{'question': f'{i}?', 'answer': 'ran', 'evidence': [], 'category': i % 4 + 1} for i in range(8)]
  (folder / 'locomo10.json').write_text(json.dumps([
      {'sample_id': 'c', 'conversation': {'speaker_a': 'Ann', 'speaker_b': 'Bo'} | sessions, 'qa': asked}]))
  return {'qa': str(folder / 'hotpot.jsonl'), 'longbench': str(folder), 'locomo': str(folder)}


class Made:
  """Takes the place of judge.answerer; keeps what is asked."""

  def __init__(self, full='nothing', block='the answer'):
    self.says, self.asked = {'full': full, 'block': block}, []

  def __call__(self, subject, tokenizer, *, batch, store):
    def answer(prompts, *, max_new, stop):
      assert len(prompts) <= batch
      self.asked += [(subject.mode, tokenizer.decode([t for tokens in p for t in tokens]), len(p), max_new, stop)
                     for p in prompts]
      return [self.says[subject.mode]] * len(prompts)
    return answer


def run(benchmark, model, data, out, *more, made=None):
  return judge.main([benchmark, model, '--data', data[benchmark], '--out', str(out), '--impl', 'reference', *more],
                    **({'make_answerer': made} if made else {}))


def summary(folder):
  return json.loads((folder / 'summary.json').read_text())


def test_qa_in_both_modes(model, data, tmp_path, capsys):
  made = Made()
  assert run('qa', model, data, tmp_path, '--mode', 'both', '--batch', '3', made=made) == 0
  printed = capsys.readouterr().out
  assert 'hotpot' in printed and 'bad JSON' in printed and 'block − full' in printed
  assert summary(tmp_path / 'full')['tasks']['hotpot']['f1']['mean'] == 0
  # "answer" of "answer i": 2 * 1 / (1 + 2) for each.
  assert summary(tmp_path / 'block')['tasks']['hotpot']['f1'] == pytest.approx({'mean': 2 / 3, 'low': 2 / 3, 'high': 2 / 3})
  assert '+0.0 [+0.0, +0.0]' in printed   # of exact match, which neither has
  modes = [asked[0] for asked in made.asked]
  assert modes == ['full'] * 4 + ['block'] * 4 and made.asked[0][1:] == made.asked[4][1:]
  assert made.asked[0][2:] == (4, 64, ('\n',)) and made.asked[0][1].endswith('Question: what is 0?\nAnswer:')
  # Again: nothing is left to ask. Other options than those that decide an answer may differ.
  again = Made()
  assert run('qa', model, data, tmp_path, '--mode', 'both', '--batch', '1', '--limit', '2', made=again) == 0
  assert not again.asked and summary(tmp_path / 'block')['n'] == 2


def test_longbench(model, data, tmp_path, capsys):
  made = Made()
  arguments = ['--tasks', 'hotpotqa', 'gov_report_e', '--segmenter', 'none']
  assert run('longbench', model, data, tmp_path, *arguments, '--limit', '2', made=made) == 0
  asked = {prompt[:20]: rest for _, prompt, *rest in made.asked}
  assert asked == {'Answer the question ': [7, 32, ()], 'You are given a repo': [3, 512, ()]} and len(made.asked) == 3
  tasks = summary(tmp_path / 'block')['tasks']
  assert tasks['hotpotqa']['score']['mean'] == 1 and tasks['hotpotqa']['blocks'] == 7
  assert summary(tmp_path / 'block')['parts']['gov_report_e']['0-4k']['n'] == 1
  printed = capsys.readouterr().out
  assert '100.0 [100.0, 100.0]' in printed and '0-4k' in printed
  # With --max-length the middle goes: another prompt, so not the same run.
  assert run('longbench', model, data, tmp_path, *arguments, '--max-length', '200', made=made) == 2
  assert 'another prompt' in capsys.readouterr().err
  assert run('longbench', model, data, tmp_path / 'short', *arguments, '--max-length', '200', made=made) == 0
  assert summary(tmp_path / 'short' / 'block')['tasks']['hotpotqa']['tokens'] == pytest.approx(200, abs=3)


def test_longbench_cuts_with_the_segmenter(model, data, tmp_path, monkeypatch):
  asked = []
  def segment_many(texts, *, model, target_tokens, tokenizer):
    asked.append((len(texts), model, target_tokens, len(tokenizer)))
    return [[(0, 6), (6, 12), (12, len(t))] for t in texts]
  monkeypatch.setattr(blockattn, 'segment_many', segment_many)
  made = Made()
  for name, model_asked in (('tiny', None), ('folder', 'folder')):
    assert run('longbench', model, data, tmp_path / name, '--tasks', 'hotpotqa', 'gov_report_e', '--segmenter', name,
               '--target-tokens', '64', made=made) == 0
    assert asked.pop() == (1, model_asked, 64, len(encode.load_tokenizer(str(model))))
    assert not asked   # hotpotqa has passages
  assert [blocks for _, prompt, blocks, *_ in made.asked if prompt.startswith('You')] == [5, 5]


def test_locomo(model, data, tmp_path, capsys):
  made = Made(block='ran')
  assert run('locomo', model, data, tmp_path, '--max-length', '300', '--limit', '1', made=made) == 0
  assert summary(tmp_path / 'block')['tasks']['multi-hop']['score']['mean'] == 1
  assert '4 of 4 prompts lack the last sessions' in capsys.readouterr().out
  assert all(1 < blocks < 9 and max_new == 50 for _, _, blocks, max_new, _ in made.asked)
  assert all(row['tokens'] <= 300 for row in map(json.loads, (tmp_path / 'block' / 'predictions.jsonl').open()))


def test_what_is_too_long_is_left_out(model, data, tmp_path, capsys):
  assert run('qa', model, data, tmp_path, '--max-length', '10', made=Made()) == 2
  assert 'of 4 items 4 are too long' in capsys.readouterr().err
  assert run('qa', model, data, tmp_path, '--max-new', '1000', made=Made()) == 2   # the model has 1,024 positions
  assert 'of 4 items 4 are too long' in capsys.readouterr().err


@pytest.mark.parametrize('benchmark, more, code, message', [
    ('qa', ['--strict'], 2, 'hotpot.jsonl:5: bad JSON'),
    ('qa', ['--tasks', 'hotpt'], 2, 'no task hotpt'),
    ('qa', ['--chat'], 2, 'chat template'),
    ('longbench', ['--tasks', 'hotpot'], 2, "no task 'hotpot'"),
    ('longbench', ['--tasks', 'trec'], 2, 'no trec.jsonl'),
    ('locomo', ['--tasks', 'temporal', 'x'], 2, 'no category x'),
    ('locomo', ['--impl', 'imp'], 2, 'imp')])
def test_what_is_wrong_is_said(model, data, tmp_path, benchmark, more, code, message, capsys):
  assert run(benchmark, model, data, tmp_path, *more, made=Made()) == code
  assert message in capsys.readouterr().err and not list(tmp_path.rglob('summary.json'))


def test_parquet_is_judged_too(model, tmp_path):
  file = tmp_path / 'hotpot.parquet'
  parquet.write_table(pyarrow.Table.from_pylist([data_cases.passages_line(i) for i in range(4)]), file)
  assert run('qa', model, {'qa': str(file)}, tmp_path / 'out', made=Made()) == 0
  assert set(json.loads((tmp_path / 'out/block/summary.json').read_text())['tasks']) == {'hotpot'}


def test_a_stopped_run_says_how_to_go_on(model, data, tmp_path, capsys):
  def stops(subject, tokenizer, *, batch, store):
    def answer(prompts, *, max_new, stop):
      raise KeyboardInterrupt
    return answer
  assert run('qa', model, data, tmp_path, made=stops) == 130
  assert 'start the same command again' in capsys.readouterr().err
  assert run('qa', model, data, tmp_path, made=Made()) == 0


def test_another_model_is_another_run(model, data, tmp_path, capsys):
  assert run('qa', model, data, tmp_path, made=Made()) == 0
  assert run('qa', model, data, tmp_path, '--dtype', 'bfloat16', made=Made()) == 2
  assert "dtype was 'float32' and is 'bfloat16'" in capsys.readouterr().err


def test_stop_ids(tmp_path, monkeypatch):
  """Of the tokenizer, and of the first file that says some; of a run that began with a hub name as well."""
  calls = []
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda repo, **kw: calls.append((repo, kw)) or tmp_path)
  for generation, model, expected in (
      ({}, {}, (2,)), ({'eos_token_id': 1}, {'eos_token_id': 3}, (2, 1)), ({'eos_token_id': [2, 0]}, {}, (2, 0)),
      ({'temperature': 1}, {'eos_token_id': [3, 0]}, (2, 3, 0)), (None, {'eos_token_id': [3, 2]}, (2, 3))):
    (tmp_path / 'generation_config.json').unlink(missing_ok=True)
    if generation is not None:
      (tmp_path / 'generation_config.json').write_text(json.dumps(generation))
    (tmp_path / 'config.json').write_text(json.dumps(model))
    assert files.stop_ids(str(tmp_path), 2) == files.stop_ids('owner/model', 2) == expected
  assert {(repo, *how['allow_patterns']) for repo, how in calls} == {('owner/model', *files.STOPS)}
  assert files.stop_ids('', 2) == (2,) and files.stop_ids('', None) == ()
  for text, message in (('{"eos', 'is no valid JSON'), ('[]', 'is a list, not a JSON object'),
                        ('{"eos_token_id": "x"}', "eos_token_id.0. is 'x', not a whole number")):
    (tmp_path / 'generation_config.json').write_text(text)
    with pytest.raises(ValueError, match=f'^{tmp_path}/generation_config.json.*{message}'):
      files.stop_ids(str(tmp_path), 2)


def test_answers_are_those_of_the_masked_forward_pass(model, data, tmp_path, monkeypatch):
  """In both modes, and where the device's room has to grow."""
  monkeypatch.setattr(judge, '_DEVICE_TOKENS', 64)
  compute = transformer.Compute(dtype='float32', impl='reference')
  subject, tokenizer = gap.load(model, 'block', compute)
  docs, examples, _ = evaluate.file_docs([data['qa']], tokenizer, limit=3)
  prompts = []
  for doc in docs:
    ends = [sum(doc.lengths[:i + 1]) for i in range(len(doc.lengths) - 1)] + [doc.answer[0]]
    prompts.append([doc.tokens[a:b].tolist() for a, b in zip([0, *ends], ends)])
  said = {}
  for mode in gap.MODES:
    judged = dataclasses.replace(subject, mode=mode)
    answer = judge.answerer(judged, tokenizer, batch=4)
    said[mode] = answer(prompts, max_new=4, stop=())
    expected = gap.measure({mode: judged}, None, docs, examples, tokenizer, batch=4, max_new=4)
    assert said[mode] == [row['models'][mode]['prediction'] for row in expected]
  assert said['full'] != said['block'] and all(said['full'])
