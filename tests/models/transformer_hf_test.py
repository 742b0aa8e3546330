"""Our transformer against transformers' own Qwen3 and Llama: the same checkpoint, the same logits."""

import dataclasses
import functools

import hf_cases
import jax
import numpy as np
import pytest

from blockattn import blocks
from blockattn.hf import config, convert, files, names
from blockattn.models import sizes, transformer

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

ALL = pytest.mark.parametrize('cfg', hf_cases.MODELS.values(), ids=hf_cases.MODELS)
TOLERANCE = 1e-4   # float32 on both sides, logits between 1 and 20
COMPUTE = transformer.Compute(impl='reference')


@functools.partial(jax.jit, static_argnums=3)
def ours(params, tokens, layout, cfg):
  return transformer.logits(params, transformer.apply(params, tokens, layout, cfg, COMPUTE), cfg)


def hf_config(cfg, dtype='float32'):
  raw = config.to_dict(cfg, dtype, dict.fromkeys(files.TOKEN_IDS))
  return transformers.AutoConfig.for_model(raw['model_type'], **{k: v for k, v in raw.items() if k != 'model_type'})


def random_model(cfg, dtype=torch.float32):
  """transformers' model with every parameter random."""
  model = transformers.AutoModelForCausalLM.from_config(hf_config(cfg), attn_implementation='eager').to(dtype).eval()
  torch.manual_seed(0)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      parameter.normal_(mean=1.0 if 'norm' in name else 0.0, std=0.3)
  return model


def read_back(folder, dtype=torch.float32):
  """The folder as transformers reads it; what it does not find it would only warn about."""
  model, report = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=dtype, attn_implementation='eager', output_loading_info=True)
  assert not any(report[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  return model.eval()


def theirs(model, tokens, layout):
  """Their logits under our mask, which eager attention takes as an additive float; it would add a bool one, too."""
  seen = torch.tensor(np.asarray(blocks.may_attend(layout)))[:, None]
  mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
  with torch.no_grad():
    return model(torch.tensor(np.asarray(tokens), dtype=torch.long), attention_mask=mask, use_cache=False,
                 position_ids=torch.tensor(np.asarray(layout.position), dtype=torch.long)).logits.numpy()


def packed(vocab, positions, sinks=()):
  """Two rows: a document of three blocks and one of two, packed; a document of two blocks and padding."""
  layout = blocks.from_lengths([[(9, 7, 5), (6, 4)], [(12, 10)]], 32, positions=positions)
  tokens = np.random.default_rng(1).integers(vocab, size=layout.doc.shape, dtype=np.int32)
  if sinks:
    tokens, layout, _ = blocks.insert(tokens, layout, blocks.BlockOptions(sinks, positions, 1), 38)
  return tokens, layout


def assert_same_logits(got, expected, layout, vocab):
  valid = np.asarray(layout.doc) != 0
  assert np.abs(expected[valid]).max() > 1, 'logits too small for the comparison to mean anything'
  np.testing.assert_allclose(np.asarray(got)[valid], expected[valid][:, :vocab], atol=TOLERANCE, rtol=0)


@ALL
def test_logits_are_those_of_transformers(cfg, tmp_path):
  model = random_model(cfg)
  model.save_pretrained(tmp_path)
  read_cfg, params = convert.load(tmp_path, 'float32')
  # transformers' own file leaves nothing to guess.
  assert read_cfg == cfg

  for positions in blocks.POSITION_SCHEMES:
    tokens, layout = packed(cfg.vocab, positions, sinks=(5, 6))
    assert_same_logits(ours(params, tokens, layout, cfg), theirs(model, tokens, layout), layout, cfg.vocab)

  tokens = np.random.default_rng(2).integers(cfg.vocab, size=tokens.shape, dtype=np.int32)
  layout = blocks.from_lengths([[(38,)], [(38,)]], 38)
  with torch.no_grad():
    plain = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()   # no mask, no positions: what users call
  assert_same_logits(ours(params, tokens, layout, cfg), plain, layout, cfg.vocab)


@ALL
def test_bfloat16_round_trip_keeps_every_bit(cfg, tmp_path):
  model = random_model(cfg, torch.bfloat16)
  model.save_pretrained(tmp_path / 'theirs')
  source = hf_cases.write_tokenizer(tmp_path / 'source', cfg.vocab)
  _, params = convert.load(tmp_path / 'theirs', 'bfloat16')
  convert.save(params, cfg, tmp_path / 'ours', source=source, meta={}, card='', dtype='bfloat16', max_shard_bytes=9_000)
  assert (tmp_path / 'ours' / files.INDEX).exists()

  again = read_back(tmp_path / 'ours', torch.bfloat16)
  assert again.config.dtype == torch.bfloat16
  assert again.config.rope_parameters == model.config.rope_parameters
  assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == cfg.tied
  expected = model.state_dict()
  assert again.state_dict().keys() == expected.keys()
  for name, tensor in again.state_dict().items():
    assert torch.equal(tensor.view(torch.int16), expected[name].view(torch.int16)), name

  again.save_pretrained(tmp_path / 'third')
  _, last = convert.load(tmp_path / 'third', 'bfloat16')
  assert all(map(np.array_equal, jax.tree.leaves(last), jax.tree.leaves(params)))


@pytest.mark.parametrize('name', ['qwen3_tied', 'llama_rope'])
def test_learned_sinks_are_vocabulary_to_transformers(name, tmp_path):
  cfg = dataclasses.replace(hf_cases.MODELS[name], learned_sinks=2)
  params = hf_cases.random_params(cfg, 'float32')
  source = hf_cases.write_tokenizer(tmp_path / 'source', cfg.vocab)
  convert.save(params, cfg, tmp_path / 'model', source=source, meta={}, card='', dtype='float32')
  model = read_back(tmp_path / 'model')
  assert model.config.vocab_size == cfg.vocab + 2

  tokens, layout = packed(cfg.vocab, 'sequential', sinks=(cfg.vocab, cfg.vocab + 1))
  expected = theirs(model, tokens, layout)
  assert_same_logits(ours(params, tokens, layout, cfg), expected, layout, cfg.vocab)
  if not cfg.tied:
    assert not np.any(expected[..., cfg.vocab:])
  prompt = torch.tensor([[1, 2, 3]])
  generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=True)
  assert generated.max() < cfg.vocab


@pytest.mark.parametrize('size', sizes.SIZES)
def test_named_sizes_have_the_tensors_of_transformers(size):
  cfg = sizes.get(size)
  with torch.device('meta'):
    model = transformers.AutoModelForCausalLM.from_config(hf_config(cfg, 'bfloat16'))
  expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
  if cfg.tied:
    del expected[names.HEAD]   # the same tensor under a second name, which safetensors does not store
  assert {key: slot.hf_shape for key, slot in names.slots(cfg).items()} == expected
