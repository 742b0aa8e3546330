import copy
import dataclasses
import json
import re
import stat

import hf_cases
import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers
import yaml

from blockattn import blocks, checkpoint, loading, mesh, tree
from blockattn.hf import card, config, convert, files, names
from blockattn.models import classifier, lora, sizes, transformer
from blockattn.train import job
from tools import convert as cli

CFG = hf_cases.MODELS['llama_rope']

QWEN3_4B = {
    'architectures': ['Qwen3ForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0, 'bos_token_id': 151643,
    'eos_token_id': 151645, 'head_dim': 128, 'hidden_act': 'silu', 'hidden_size': 2560, 'initializer_range': 0.02,
    'intermediate_size': 9728, 'max_position_embeddings': 40960, 'max_window_layers': 36, 'model_type': 'qwen3',
    'num_attention_heads': 32, 'num_hidden_layers': 36, 'num_key_value_heads': 8, 'rms_norm_eps': 1e-06,
    'rope_scaling': None, 'rope_theta': 1000000, 'sliding_window': None, 'tie_word_embeddings': True,
    'torch_dtype': 'bfloat16', 'transformers_version': '4.51.0', 'use_cache': True, 'use_sliding_window': False,
    'vocab_size': 151936}
LLAMA31_8B = {
    'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0, 'bos_token_id': 128000,
    'eos_token_id': [128001, 128008, 128009], 'hidden_act': 'silu', 'hidden_size': 4096, 'initializer_range': 0.02,
    'intermediate_size': 14336, 'max_position_embeddings': 131072, 'mlp_bias': False, 'model_type': 'llama',
    'num_attention_heads': 32, 'num_hidden_layers': 32, 'num_key_value_heads': 8, 'pretraining_tp': 1,
    'rms_norm_eps': 1e-05, 'rope_theta': 500000.0, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
    'rope_scaling': {'factor': 8.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0,
                     'original_max_position_embeddings': 8192, 'rope_type': 'llama3'},
    'transformers_version': '4.42.3', 'use_cache': True, 'vocab_size': 128256}
QWEN25_05B = {
    'architectures': ['Qwen2ForCausalLM'], 'attention_dropout': 0.0, 'bos_token_id': 151643, 'eos_token_id': 151645,
    'hidden_act': 'silu', 'hidden_size': 896, 'initializer_range': 0.02, 'intermediate_size': 4864,
    'max_position_embeddings': 32768, 'max_window_layers': 21, 'model_type': 'qwen2', 'num_attention_heads': 14,
    'num_hidden_layers': 24, 'num_key_value_heads': 2, 'rms_norm_eps': 1e-06, 'rope_theta': 1000000.0,
    'sliding_window': 32768, 'tie_word_embeddings': True, 'torch_dtype': 'bfloat16', 'transformers_version': '4.43.1',
    'use_cache': True, 'use_sliding_window': False, 'vocab_size': 151936}
NO_IDS = dict.fromkeys(files.TOKEN_IDS)


@pytest.fixture
def source(tmp_path):
  return hf_cases.write_tokenizer(tmp_path / 'source', CFG.vocab)


@pytest.fixture
def exported(tmp_path, source):
  """A float32 export of CFG in several shards, and its parameters."""
  params = hf_cases.random_params(CFG, 'float32')
  save(params, CFG, tmp_path / 'model', source, max_shard_bytes=20_000)
  return tmp_path / 'model', params


def save(params, cfg, folder, source, **options):
  options = {'meta': {'kind': 'distill'}, 'card': '# A card\n', 'dtype': 'float32', **options}
  convert.save(params, cfg, folder, source=source, **options)


def assert_same_bits(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for (name, a), b in zip(tree.named_leaves(got), jax.tree.leaves(expected), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), name


# config.json


@pytest.mark.parametrize('raw, size', [(QWEN3_4B, 'qwen3_4b'), (LLAMA31_8B, 'llama31_8b'), (QWEN25_05B, 'qwen25_0_5b')])
def test_published_configs_are_the_named_sizes(raw, size):
  assert config.from_dict(raw) == sizes.get(size)


@pytest.mark.parametrize('cfg', hf_cases.MODELS.values(), ids=hf_cases.MODELS)
def test_config_round_trip_in_both_styles(cfg):
  raw = config.to_dict(cfg, 'bfloat16', NO_IDS)
  new_style = {k: v for k, v in raw.items() if k not in ('rope_theta', 'rope_scaling', 'torch_dtype')}
  old_style = {k: v for k, v in raw.items() if k not in ('rope_parameters', 'dtype')}
  assert config.from_dict(raw) == config.from_dict(new_style) == config.from_dict(old_style) == cfg


@pytest.mark.parametrize('key, value, supported', [
    ('model_type', 'mistral', 'qwen3, qwen2, llama'), ('hidden_act', 'gelu', 'silu'), ('use_sliding_window', True, 'full'),
    ('layer_types', ['full_attention', 'sliding_attention'], 'full_attention'), ('num_experts', 8, 'dense'),
    ('quantization_config', {'quant_method': 'fp8'}, 'dequantize'), ('partial_rotary_factor', 0.5, 'whole heads'),
    ('auto_map', {'AutoModel': 'mine.py'}, 'code'),
    ('rope_scaling', {'rope_type': 'yarn', 'factor': 4.0}, 'default and llama3'),
    ('rope_scaling', {'type': 'dynamic', 'factor': 4.0}, 'default and llama3'),
    ('rope_scaling', {'rope_type': 'default', 'mrope_section': [1, 2]}, 'mrope_section'),
    ('rope_parameters', {'full_attention': {'rope_theta': 1e6}}, 'flat'),
    ('rope_parameters', {'rope_type': 'default', 'rope_theta': 5e6}, 'contradict'),
    ('hidden_size', '2560', 'int'), ('attention_bias', 1, 'bool'),
])
def test_unsupported_config_is_refused_by_name(key, value, supported):
  with pytest.raises(ValueError) as error:
    config.from_dict(QWEN3_4B | {key: value}, 'some/config.json')
  assert 'some/config.json' in str(error.value) and supported in str(error.value)
  assert key in str(error.value) or supported == 'contradict'


@pytest.mark.parametrize('key', ['model_type', 'vocab_size', 'hidden_size', 'num_hidden_layers', 'head_dim',
                                 'num_key_value_heads', 'rms_norm_eps', 'rope_theta', 'max_position_embeddings'])
def test_missing_config_key_is_named(key):
  raw = {k: v for k, v in QWEN3_4B.items() if k != key}
  with pytest.raises(ValueError, match=f'config.json: key {key} is missing'):
    config.from_dict(raw)


@pytest.mark.parametrize('key', [*config.COUNTS, 'rms_norm_eps', 'rope_theta'])
def test_a_number_of_nothing_is_named(key):
  for value in (0, -1):
    with pytest.raises(ValueError, match=f'^some/config.json: {key}={value}.*; give a number (from 1|above 0)'):
      config.from_dict(QWEN3_4B | {key: value}, 'some/config.json')


@pytest.mark.parametrize('change, message', [
    ({'num_key_value_heads': 5}, '32 query heads cannot share 5 key/value heads evenly'),
    ({'head_dim': 7}, 'head_dim 7 is odd'), ({'rope_scaling': LLAMA31_8B['rope_scaling'] | {'factor': 0.0}}, 'factor=0.0'),
    ({'rms_norm_eps': float('nan')}, 'rms_norm_eps=nan; give a number above 0')])
def test_numbers_that_do_not_fit_are_said_with_the_file(change, message):
  with pytest.raises(ValueError, match=f'^some/config.json: .*{message}'):
    config.from_dict(QWEN3_4B | change, 'some/config.json')


def test_llama_may_leave_out_what_its_class_derives():
  raw = {k: v for k, v in LLAMA31_8B.items() if k not in ('num_key_value_heads', 'mlp_bias', 'tie_word_embeddings')}
  cfg = config.from_dict(raw)
  assert (cfg.kv_heads, cfg.head_dim, cfg.mlp_bias, cfg.tied) == (32, 128, False, False)


@pytest.mark.parametrize('drop, more', [
    (('rope_theta', 'rope_scaling'), {}), (('rope_theta',), {}), ((), {'hidden_act': 'swish'}),
    ((), {'rope_scaling': LLAMA31_8B['rope_scaling'] | {'original_max_position_embeddings': 8192.0}})])
def test_configs_of_old_are_read_as_transformers_does(drop, more):
  raw = {k: v for k, v in LLAMA31_8B.items() if k not in drop} | more
  cfg, theirs = config.from_dict(raw), transformers.LlamaConfig.from_dict(copy.deepcopy(raw))
  assert cfg.rope_theta == theirs.rope_parameters['rope_theta'] == (10000 if drop else 500000)
  assert config.from_dict(config.to_dict(cfg, 'float32', NO_IDS)) == cfg
  if 'rope_scaling' not in drop:
    assert cfg.rope_scaling == sizes.get('llama31_8b').rope_scaling and isinstance(cfg.rope_scaling.original_length, int)


@pytest.mark.parametrize('cfg, field', [
    (dataclasses.replace(hf_cases.MODELS['qwen3_tied'], mlp_bias=True), 'mlp_bias'),
    (dataclasses.replace(hf_cases.MODELS['qwen3_tied'], qk_norm=False), 'qk_norm'),
    (dataclasses.replace(hf_cases.MODELS['qwen2_tied'], attention_bias=False), 'attention_bias'),
    (dataclasses.replace(hf_cases.MODELS['qwen2_tied'], mlp_bias=True), 'mlp_bias'),
    (dataclasses.replace(CFG, width=25), 'width'),
])
def test_architecture_without_a_class_is_refused(cfg, field):
  with pytest.raises(ValueError, match=field):
    config.to_dict(cfg, 'float32', NO_IDS)


# Names.


def test_rows_of_a_query_matrix_are_heads():
  slot = names.slots(CFG)['model.layers.1.self_attn.q_proj.weight']
  q_DNH = np.arange(24 * 6 * 8).reshape(24, 6, 8)
  weight = slot.to_hf(q_DNH)
  assert weight.shape == (48, 24) and weight[5 * 8 + 3, 7] == q_DNH[7, 5, 3]
  np.testing.assert_array_equal(slot.from_hf(weight), q_DNH)


def test_columns_of_an_output_matrix_are_heads():
  slot = names.slots(CFG)['model.layers.0.self_attn.o_proj.weight']
  o_NHD = np.arange(6 * 8 * 24).reshape(6, 8, 24)
  weight = slot.to_hf(o_NHD)
  assert weight.shape == (24, 48) and weight[7, 5 * 8 + 3] == o_NHD[5, 3, 7]
  np.testing.assert_array_equal(slot.from_hf(weight), o_NHD)


# Folders.


@pytest.mark.parametrize('cfg', hf_cases.MODELS.values(), ids=hf_cases.MODELS)
def test_save_and_load_keep_every_bit(cfg, tmp_path, source):
  """Of float32; of bfloat16, with transformers between, see models/transformer_hf_test.py."""
  params = hf_cases.random_params(cfg, 'float32')
  save(params, cfg, tmp_path / 'model', source)
  read_cfg, read = convert.load(tmp_path / 'model', 'float32')
  assert read_cfg == cfg
  assert_same_bits(read, params)
  for dtype in ('float32', 'bfloat16'):   # the same, without ever having all of them
    assert convert.fingerprint(tmp_path / 'model', dtype) == tree.fingerprint(convert.load(tmp_path / 'model', dtype)[1])


def test_exported_folder_is_complete(exported):
  folder, _ = exported
  index = json.loads((folder / files.INDEX).read_text())
  shards = sorted(set(index['weight_map'].values()))
  assert len(shards) > 2 and shards[0] == f'model-00001-of-{len(shards):05d}.safetensors'
  stored = files.stored_tensors(folder)
  assert index['metadata']['total_size'] == sum(4 * int(np.prod(at.shape)) for at in stored.values())
  assert {path.name for path in folder.iterdir()} == {
      *shards, files.INDEX, 'config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json',
      'chat_template.jinja', 'README.md', 'blockattn.json', 'LICENSE'}
  assert len({stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}) == 1   # what the umask gives, see disk_test
  raw = json.loads((folder / 'config.json').read_text())
  assert raw['eos_token_id'] == 0 and raw['architectures'] == ['LlamaForCausalLM']
  assert config.read_meta(folder) == {'learned_sinks': 0, 'vocab': CFG.vocab, 'kind': 'distill'}
  with safetensors.safe_open(folder / shards[0], 'np') as shard:
    assert shard.metadata() == {'format': 'pt'}


@pytest.mark.parametrize('said, message', [
    ({'sink_ids': [1]}, "\"blocks\" lacks 'positions', 'max_blocks'"), ('all', '"blocks" is \'all\', not a JSON object'),
    ({'sink_ids': [1.5], 'positions': 'local', 'max_blocks': 1}, r"'sink_ids'\[0\] is 1.5, not a whole number"),
    ({'sink_ids': '12', 'positions': 'local', 'max_blocks': 1}, "'sink_ids' is '12', not a list"),
    ({'sink_ids': [], 'positions': 'local', 'max_blocks': 'x'}, "'max_blocks' is 'x', not a whole number"),
    ({'sink_ids': [], 'positions': 'local', 'max_blocks': -1}, 'max_blocks=-1'),
    ({'sink_ids': [], 'positions': 'global', 'max_blocks': 1}, "positions='global'; choose one of")])
def test_malformed_block_options_are_named(said, message):
  with pytest.raises(ValueError, match=f'here.json: .*{message}'):
    config.block_options({'blocks': said}, where='here.json')


def test_more_sinks_than_rows_are_refused(exported, tmp_path):
  folder, _ = exported
  (tmp_path / 'config.json').write_text((folder / 'config.json').read_text())
  (tmp_path / files.META).write_text(f'{{"learned_sinks": {CFG.vocab}}}')
  with pytest.raises(ValueError, match=f'{files.META}: learned_sinks is {CFG.vocab}, of {CFG.vocab} rows'):
    config.read(tmp_path)


def test_one_tensor_above_the_limit_gets_a_shard_alone():
  shards = files.plan_shards({'a': 5, 'b': 30, 'c': 5, 'd': 5}, max_bytes=10)
  assert list(shards.values()) == [['a'], ['b'], ['c', 'd']]
  assert files.plan_shards({'a': 5}, max_bytes=10) == {'model.safetensors': ['a']}


def test_a_failed_export_leaves_nothing(tmp_path, source):
  (source / 'generation_config.json').write_text('no json')
  cfg = dataclasses.replace(CFG, learned_sinks=1)
  with pytest.raises(ValueError, match=r'generation_config\.json is no valid JSON'):
    save(hf_cases.random_params(cfg, 'float32'), cfg, tmp_path / 'model', source)
  assert [path.name for path in tmp_path.iterdir()] == ['source']


def test_export_refuses_a_folder_in_use_unless_told(exported, source):
  folder, params = exported
  with pytest.raises(FileExistsError, match='overwrite'):
    save(params, CFG, folder, source)
  save(params, CFG, folder, source, overwrite=True)
  assert (folder / files.SINGLE).exists() and not (folder / files.INDEX).exists()
  assert sorted(path.name for path in folder.parent.iterdir()) == ['model', 'source']


def test_export_refuses_what_does_not_fit(tmp_path, source):
  params = hf_cases.random_params(CFG, 'float32')
  with pytest.raises(ValueError, match=r"\['sinks'\]"):
    save(params | {'sinks': params['embed']}, CFG, tmp_path / 'model', source)
  with pytest.raises(ValueError, match='final_norm has shape'):
    save(params | {'final_norm': np.zeros(3)}, CFG, tmp_path / 'model', source)
  with pytest.raises(ValueError, match='float16'):
    save(params, CFG, tmp_path / 'model', source, dtype='float16')
  with pytest.raises(FileNotFoundError, match='tokenizer'):
    save(params, CFG, tmp_path / 'model', tmp_path)


def rewrite(file, change):
  tensors = safetensors.numpy.load_file(file)
  change(tensors)
  safetensors.numpy.save_file(tensors, file, metadata={'format': 'pt'})


@pytest.mark.parametrize('change, message', [
    (lambda t: t.pop('model.norm.weight'), 'missing, first model.norm.weight'),
    (lambda t: t.update({'model.layers.9.input_layernorm.weight': np.ones(24, np.float32)}), 'model.layers.9'),
    (lambda t: t.update({'model.norm.weight': np.ones(23, np.float32)}), r'model.norm.weight has shape \(23,\)'),
    (lambda t: t.update({'model.norm.weight': np.ones(24, np.int8)}), 'model.norm.weight is I8'),
    (lambda t: t['model.layers.1.mlp.up_proj.weight'].__setitem__((3, 2), np.nan),
     'model.layers.1.mlp.up_proj.weight holds NaN or infinity, read as float32'),
    (lambda t: t['lm_head.weight'].__setitem__((0, 0), -np.inf), 'lm_head.weight holds NaN or infinity'),
])
def test_tensors_that_do_not_fit_are_named(tmp_path, source, change, message):
  save(hf_cases.random_params(CFG, 'float32'), CFG, tmp_path / 'model', source)
  rewrite(tmp_path / 'model' / files.SINGLE, change)
  with pytest.raises(ValueError, match=message) as error:
    convert.load(tmp_path / 'model', 'float32')
  assert str(tmp_path / 'model') in str(error.value)


def test_a_tensor_in_two_shards_is_refused(exported):
  folder, _ = exported
  first, second = sorted(folder.glob('model-*.safetensors'))[:2]
  tensors = safetensors.numpy.load_file(first)
  rewrite(second, lambda t: t.update(dict(list(tensors.items())[:1])))
  with pytest.raises(ValueError, match=f'{next(iter(tensors))} stands twice.*{first.name}.*{second.name}'):
    convert.load(folder, 'float32')


def test_an_index_that_lies_is_refused(exported):
  folder, _ = exported
  shards = sorted(folder.glob('model-*.safetensors'))
  stray = folder / 'model-00099.safetensors'
  stray.write_bytes(shards[0].read_bytes())
  with pytest.raises(ValueError, match='model-00099.safetensors is not named'):
    convert.load(folder, 'float32')
  stray.unlink()
  shards[1].write_bytes(shards[1].read_bytes()[:-8])
  with pytest.raises(ValueError, match=f'{shards[1].name} is no readable safetensors file'):
    convert.load(folder, 'float32')
  shards[1].unlink()
  with pytest.raises(FileNotFoundError, match=shards[1].name):
    convert.load(folder, 'float32')
  (folder / files.INDEX).unlink()
  with pytest.raises(ValueError, match='no model.safetensors.index.json'):
    convert.load(folder, 'float32')


def test_the_index_decides_and_old_buffers_do_not_count(exported):
  pytest.importorskip('torch')
  folder, params = exported
  raw = json.loads((folder / files.INDEX).read_text())
  for path in sorted(folder.glob('model-*.safetensors')):
    path.rename(folder / path.name.replace('model-', 'part-'))
  raw['weight_map'] = {key: file.replace('model-', 'part-') for key, file in raw['weight_map'].items()}
  key, file = 'model.layers.0.self_attn.rotary_emb.inv_freq', min(raw['weight_map'].values())
  rewrite(folder / file, lambda tensors: tensors.update({key: np.ones(4, np.float32)}))
  raw['weight_map'][key] = file
  (folder / files.INDEX).write_text(json.dumps(raw))
  assert_same_bits(convert.load(folder, 'float32')[1], params)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
  np.testing.assert_array_equal(theirs['model.norm.weight'].numpy(), params['final_norm'])
  raw['weight_map'][key] = '../source/part.safetensors'
  (folder / files.INDEX).write_text(json.dumps(raw))
  with pytest.raises(FileNotFoundError, match='../source/part.safetensors is missing'):
    convert.load(folder, 'float32')


@pytest.mark.parametrize('file, text, message', [
    ('model-Q4_K_M.gguf', '', r'holds only GGUF: .*tools.convert from_hf \S*/model-Q4_K_M.gguf WORK'),
    ('adapter_config.json', '{"base_model_name_or_path": "owner/base"}', 'adapter of PEFT.*owner/base.*merge_and_unload')])
def test_what_lies_there_in_place_of_a_model_is_named(tmp_path, file, text, message):
  (tmp_path / file).write_text(text)
  with pytest.raises(ValueError, match=message):
    convert.load(tmp_path, 'float32')


def test_pickled_weights_are_refused(exported):
  folder, _ = exported
  for path in [*folder.glob('*.safetensors'), folder / files.INDEX]:
    path.unlink()
  with pytest.raises(FileNotFoundError, match='holds no model.safetensors'):
    convert.load(folder, 'float32')
  (folder / 'pytorch_model.bin').write_bytes(b'')
  with pytest.raises(ValueError, match='pickled weights.*pytorch_model.bin'):
    convert.load(folder, 'float32')


def test_a_head_beside_tied_embeddings_must_be_the_embedding(tmp_path, source):
  cfg = hf_cases.MODELS['qwen3_tied']
  params = hf_cases.random_params(cfg, 'bfloat16')
  save(params, cfg, tmp_path / 'model', source, dtype='bfloat16')
  file = tmp_path / 'model' / files.SINGLE
  rewrite(file, lambda t: t.update({names.HEAD: t[names.EMBED].copy()}))
  assert_same_bits(convert.load(tmp_path / 'model', 'bfloat16')[1], params)
  rewrite(file, lambda t: t[names.HEAD].__setitem__((3, 4), 7.0))
  with pytest.raises(ValueError, match='lm_head.weight differs'):
    convert.load(tmp_path / 'model', 'bfloat16')


def test_parameters_go_to_their_places_on_a_mesh(exported):
  folder, params = exported
  place = mesh.Placement(mesh.make_mesh({'fsdp': 4, 'tensor': 2}))
  cfg, placed = convert.load(folder, 'float32', mesh=place.mesh, rules=place.rules)
  assert placed['layers']['gate'].sharding.spec == place.spec(('layers', 'embed', 'mlp'))
  assert_same_bits(placed, params)
  save(placed, cfg, folder, folder.parent / 'source', overwrite=True)
  assert_same_bits(convert.load(folder, 'float32')[1], params)


# Learned sinks.


@pytest.mark.parametrize('tied', [True, False])
def test_learned_sinks_become_tokens_and_come_back(tied, tmp_path):
  cfg = dataclasses.replace(CFG, learned_sinks=3, tied=tied)
  params = hf_cases.random_params(cfg, 'float32')
  source = hf_cases.write_tokenizer(tmp_path / 'source', CFG.vocab - 5)   # an embedding padded by five rows
  save(params, cfg, tmp_path / 'one', source)
  save(params, cfg, tmp_path / 'two', tmp_path / 'one')   # a second export takes the first's tokenizer
  for folder in (tmp_path / 'one', tmp_path / 'two'):
    read_cfg, read = convert.load(folder, 'float32')
    assert read_cfg == cfg
    assert_same_bits(read, params)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == CFG.vocab + 3
    assert tokenizer('word7<|sink_0|><|sink_2|>word1', add_special_tokens=False)['input_ids'] == [7, 48, 50, 1]
    generation = json.loads((folder / 'generation_config.json').read_text())
    assert {48, 49, 50} <= set(generation['suppress_tokens']) and generation['temperature'] == 0.7


def test_learned_sinks_need_a_tokenizer_that_fits(tmp_path):
  cfg = dataclasses.replace(CFG, learned_sinks=1)
  source = hf_cases.write_tokenizer(tmp_path / 'source', CFG.vocab + 1)
  with pytest.raises(ValueError, match='has 49 tokens, but the model only 48'):
    save(hf_cases.random_params(cfg, 'float32'), cfg, tmp_path / 'model', source)


@pytest.mark.slow
@pytest.mark.data
def test_real_tokenizer_is_copied_and_gets_sinks(data_dir, tmp_path):
  qwen3 = data_dir / 'tokenizers' / 'qwen3'
  cfg = dataclasses.replace(CFG, vocab=151936, width=6, layers=1, heads=2, kv_heads=1, head_dim=2, mlp=2, tied=True)
  save(hf_cases.random_params(cfg, 'bfloat16'), cfg, tmp_path / 'plain', qwen3, dtype='bfloat16')
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    assert (tmp_path / 'plain' / name).read_bytes() == (qwen3 / name).read_bytes()
  assert json.loads((tmp_path / 'plain' / 'config.json').read_text())['eos_token_id'] == 151645

  files.add_sink_tokens(tmp_path / 'plain', 151936, 4)
  before = tokenizers.Tokenizer.from_file(str(qwen3 / 'tokenizer.json'))
  after = tokenizers.Tokenizer.from_file(str(tmp_path / 'plain' / 'tokenizer.json'))
  text = 'Was sagt <|im_start|>user\nder Block? 12345 <|im_end|>'
  assert after.encode(text).ids == before.encode(text).ids
  assert after.encode('a<|sink_0|><|sink_3|>b').ids == [64, 151936, 151939, 65]


# Wrappers, some rows beside a model.


def wrappers_run(tmp_path, source, base_dtype, base='base'):
  """(work directory of a run that trained two learned sinks alone, beside weights read as `base_dtype`; the student's
  ModelConfig)."""
  cfg = dataclasses.replace(hf_cases.MODELS['qwen3_tied'], learned_sinks=2)
  plain = transformer.without_sinks(cfg)
  save(hf_cases.random_params(plain, 'float32'), plain, tmp_path / 'base', source)
  if base == 'work':
    assert cli.main(['from_hf', str(tmp_path / 'base'), str(tmp_path / 'work')]) == 0
  facts = convert.weights_facts(convert.load(tmp_path / 'base', base_dtype)[1])
  rows = {'sinks': np.random.default_rng(1).standard_normal((2, cfg.width)).astype(np.float32)}
  checkpoint.save_params(tmp_path / 'run/checkpoints', rows, job.model_meta(
      cfg, None, str(tmp_path / base), 'distill', lora.WRAPPERS, weights=facts))
  return tmp_path / 'run', cfg


@pytest.mark.slow
@pytest.mark.parametrize('base_dtype', ['float32', 'bfloat16'])
def test_exported_wrappers_are_the_model_of_their_run_and_can_be_converted(tmp_path, source, base_dtype):
  run, cfg = wrappers_run(tmp_path, source, base_dtype)
  assert cli.main(['to_hf', str(run), str(tmp_path / 'rows'), '--wrappers']) == 0
  expected = loading.find(run).read('float32')
  assert_same_bits(convert.load(tmp_path / 'rows', 'float32')[1], expected)
  assert cli.main(['from_hf', str(tmp_path / 'rows'), str(tmp_path / 'converted')]) == 0
  assert loading.find(tmp_path / 'converted').cfg == cfg
  assert_same_bits(loading.find(tmp_path / 'converted').read('float32'), expected)


def test_wrappers_beside_a_run_are_refused(tmp_path, source, capsys):
  run, _ = wrappers_run(tmp_path, source, 'float32', base='work')
  assert cli.main(['to_hf', str(run), str(tmp_path / 'rows'), '--wrappers']) == 2
  assert 'which wrappers cannot stand beside: export that one' in capsys.readouterr().err
  assert cli.main(['to_hf', str(run), str(tmp_path / 'rows'), '--wrappers', '--source', str(tmp_path / 'base')]) == 0
  assert_same_bits(convert.load(tmp_path / 'rows', 'float32')[1], loading.find(run).read('float32'))


# The command line.


def test_cli_round_trip_keeps_every_bit(tmp_path, source, capsys):
  cfg = hf_cases.MODELS['qwen3_tied']
  save(hf_cases.random_params(cfg, 'bfloat16'), cfg, tmp_path / 'a', source, dtype='bfloat16')
  assert cli.main(['from_hf', str(tmp_path / 'a'), str(tmp_path / 'work')]) == 0
  assert cli.main(['to_hf', str(tmp_path / 'work'), str(tmp_path / 'b'), '--step', '0']) == 0
  assert 'peak memory' in capsys.readouterr().out
  for name in (files.SINGLE, 'config.json', 'tokenizer.json', 'generation_config.json', 'chat_template.jinja'):
    assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
  assert config.read_meta(tmp_path / 'b')['kind'] == 'distill'


def test_weights_keep_their_dtype_unless_told(tmp_path, source, capsys):
  params = hf_cases.random_params(CFG, 'float32')
  save(params, CFG, tmp_path / 'a', source)
  half = {'model.norm.weight': params['final_norm'].astype(np.float16)}
  rewrite(tmp_path / 'a' / files.SINGLE, lambda tensors: tensors.update(half))
  params = convert.load(tmp_path / 'a', 'float32')[1]
  assert cli.main(['from_hf', str(tmp_path / 'a'), str(tmp_path / 'work')]) == 0   # float32 holds float16
  assert cli.main(['to_hf', str(tmp_path / 'work'), str(tmp_path / 'b')]) == 0
  assert 'rounded' not in capsys.readouterr().out
  assert_same_bits(convert.load(tmp_path / 'b', 'float32')[1], params)
  many = len(names.slots(CFG))
  assert cli.main(['from_hf', str(tmp_path / 'a'), str(tmp_path / 'half'), '--dtype', 'bfloat16']) == 0
  assert (f'1 of {many} tensors are rounded from F16 to BF16; {many - 1} of {many} tensors are rounded from F32 to BF16, '
          'as --dtype bfloat16 says') in capsys.readouterr().out
  assert cli.main(['to_hf', str(tmp_path / 'work'), str(tmp_path / 'c'), '--dtype', 'bfloat16']) == 0
  assert f'{many} of {many} tensors are rounded from F32 to BF16' in capsys.readouterr().out
  assert cli.main(['to_hf', str(tmp_path / 'half'), str(tmp_path / 'd')]) == 0 and 'rounded' not in capsys.readouterr().out
  assert (tmp_path / 'd' / files.SINGLE).read_bytes() == (tmp_path / 'c' / files.SINGLE).read_bytes()


def test_cli_refuses_a_tokenizer_of_another_model(tmp_path, exported, capsys):
  folder, _ = exported
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  tokenizer.add_tokens(['<new>'])
  tokenizer.save(str(folder / 'tokenizer.json'))
  assert cli.main(['from_hf', str(folder), str(tmp_path / 'work')]) == 2
  assert "tokenizer.json: token '<new>' has the id 48, and the model has 48 rows" in capsys.readouterr().err
  assert not (tmp_path / 'work').exists()


def test_an_export_says_every_token_that_ends_an_answer(tmp_path, source):
  params = hf_cases.random_params(CFG, 'float32')
  (source / 'generation_config.json').unlink()
  (source / 'config.json').write_text(json.dumps({'eos_token_id': [5, 6]}))
  save(params, CFG, tmp_path / 'model', source)
  assert json.loads((tmp_path / 'model' / 'generation_config.json').read_text())['eos_token_id'] == [0, 5, 6]
  assert transformers.GenerationConfig.from_pretrained(tmp_path / 'model').eos_token_id == [0, 5, 6]


def test_cli_says_what_is_wrong(tmp_path, capsys):
  assert cli.main(['from_hf', str(tmp_path / 'none'), str(tmp_path / 'work')]) == 2
  assert 'none' in capsys.readouterr().err
  assert cli.main(['to_hf', str(tmp_path / 'none'), str(tmp_path / 'out')]) == 2
  assert 'checkpoint' in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


# The card.

CARD = '---\nlicense: other\nlicense_name: llama3.1\nlanguage: [en, de]\nbase_model: org/base\ntags: [chat]\n---\n# Theirs\n'


def front(text):
  _, head, body = text.split('---\n', 2)
  return yaml.safe_load(head), body


@pytest.mark.parametrize('source, theirs, base, name', [
    ('Qwen/Qwen3-4B@main', '# no front matter', 'Qwen/Qwen3-4B', 'Qwen/Qwen3-4B'),
    ('Qwen/Qwen3-4B', CARD, 'Qwen/Qwen3-4B', 'Qwen/Qwen3-4B'), ('/home/me/model', CARD, 'org/base', 'model'),
    (None, CARD, 'org/base', None), ('', None, None, None), (None, '---\nlicense: [\n---\n', None, None),
    (None, '---\n- 1\n---\n', None, None)])
def test_a_card_says_what_the_model_began_as_and_under_which_licence(tmp_path, source, theirs, base, name):
  if theirs is not None:
    (tmp_path / 'README.md').write_text(theirs)
  head, body = front(card.text(CFG, {'source': source}, tmp_path))
  assert re.findall('- began as: (.*)\n', body) == ([name] if name else []) and '/home' not in body
  assert head.get('base_model') == base and head['library_name'] == 'transformers' and head['tags'] == ['block-attention']
  assert head['pipeline_tag'] == 'text-generation'
  inherited = {name: head.get(name) for name in ('license', 'license_name', 'language')}
  assert inherited == ({'license': 'other', 'license_name': 'llama3.1', 'language': ['en', 'de']} if theirs == CARD else
                       dict.fromkeys(inherited))


def test_an_export_has_a_card_with_blocks_training_and_usage_that_runs(tmp_path, source, capsys):
  torch = pytest.importorskip('torch')
  cfg = hf_cases.MODELS['qwen3_tied']
  meta = {'kind': 'distill', 'step': 7, 'blocks': config.blocks_meta(blocks.BlockOptions((3, 3), 'local', 4))}
  save(hf_cases.random_params(cfg, 'float32'), cfg, tmp_path / 'a', source, meta=meta, card=CARD)
  assert cli.main(['from_hf', str(tmp_path / 'a'), str(tmp_path / 'work'), '--dtype', 'float32']) == 0
  (tmp_path / 'work' / 'config.json').write_text('{"steps": 9, "optim": {"lr": 0.001}, "secret": "x"}')
  (tmp_path / 'work' / 'run.json').write_text('{"commit": "abc+"}')
  assert cli.main(['to_hf', str(tmp_path / 'work'), str(tmp_path / 'b'), '--dtype', 'float32']) == 0
  head, body = front((tmp_path / 'b' / 'README.md').read_text())
  assert (head['license'], head['base_model']) == ('other', 'org/base')
  for line in ('- trained by: distill', '- step: 7', '- sinks in front of every block: 2, token ids [3, 3]',
               '- positions: local', '- steps: 9', '- optim.lr: 0.001', '- commit of blockattn: abc+'):
    assert f'{line}\n' in body
  assert 'secret' not in body and 'tools.generate FOLDER' in body
  capsys.readouterr()
  with torch.no_grad():
    exec(re.search('```python\n(.*?)```', body, re.DOTALL)[1].replace('FOLDER', str(tmp_path / 'b')), {})
  assert capsys.readouterr().out.strip()


@pytest.mark.parametrize('form, lines', [
    ({}, ['- sinks in front of every block: 2, token ids [3, 3]']),
    ({'tail_ids': (48, 49)}, ['- tails, the last tokens of every block but the last one: 2, token ids [48, 49]',
                              'The last 2 token ids, from 48 on, are learned tails: they']),
    ({'sink_ids': (48,), 'tail_ids': (49,), 'links': True}, [
        '- links behind every block but the last, which read all before them: 1, token ids [49]',
        'are learned sinks and links: they']),
    ({'align': 16}, ['- more of the first sink: until a block but the last has a multiple of 16 tokens']),
    ({'hide_starts': True}, ['- sinks, or without any the first token, of a block but the first: read by itself alone']),
    ({'hide_starts': True, 'overlap': 8}, [
        '- last tokens of the block before that a block of the same text is read behind: 8, which no other block sees']),
    ({'seam': 4}, ['- first tokens of a block that are read again behind those before it: 4, or as a prompt asks'])])
def test_cards_say_what_stands_between_blocks(form, lines):
  options = blocks.BlockOptions(**{'sink_ids': (3, 3), 'positions': 'local', 'max_blocks': 4} | form)
  cfg = dataclasses.replace(hf_cases.MODELS['qwen3_tied'], learned_sinks=sum(i >= 48 for i in options.own_ids))
  meta = {'blocks': config.blocks_meta(options)}
  for body in (card.text(cfg, meta), card.adapter_text(cfg, meta, 'org/base')):
    assert all(line in body for line in lines) and ('tails' in body, 'links' in body) == (
        bool(options.tail_ids) and not options.links, options.links)
    assert ('multiple of' in body, 'are read again' in body) == (options.align > 1, options.seam > 0)


def test_a_segmenters_card_is_of_another_task():
  cfg = classifier.of_backbone(CFG, labels=2)
  head, body = front(card.text(cfg, {'kind': 'segment'}, facts={'f1': 0.8}))
  assert head['pipeline_tag'] == 'token-classification' and '- f1: 0.8\n' in body and 'tools.segment' in body
