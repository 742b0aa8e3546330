"""LoRA students as adapters: what peft makes of the folder is the merged model."""

import dataclasses
import json

import hf_cases
import jax
import numpy as np
import pytest
import safetensors.numpy

from blockattn import blocks, checkpoint
from blockattn.hf import adapter, config, convert, files
from blockattn.models import lora, transformer
from blockattn.train import job
from tools import convert as cli

OPTIONS = lora.LoraOptions(rank=3, alpha=6.0, targets=('q', 'v', 'o', 'down'))
BLOCKS = blocks.BlockOptions((3, 3), 'local', 4)


def trained(cfg, options=OPTIONS):
  rng = np.random.default_rng(3)
  return jax.tree.map(lambda s: (0.2 * rng.standard_normal(s.shape)).astype(np.float32), lora.spec(cfg, options))


def run_of(tmp_path, cfg, options=OPTIONS):
  """(folder of a random base model, its parameters, work directory of a LoRA student of it)."""
  params = hf_cases.random_params(transformer.without_sinks(cfg), 'float32')
  source = hf_cases.write_tokenizer(tmp_path / 'tokenizer', cfg.vocab)
  convert.save(params, transformer.without_sinks(cfg), tmp_path / 'base', source=source, meta={}, card='', dtype='float32')
  checkpoint.save_params(tmp_path / 'run/checkpoints', trained(cfg, options) if options.rank else params, job.model_meta(
      cfg, BLOCKS, str(tmp_path / 'base'), 'distill', options, weights=convert.weights_facts(params)))
  return tmp_path / 'base', params, tmp_path / 'run'


def test_an_adapter_says_what_it_adds_and_how_blocks_are_read(tmp_path):
  cfg = hf_cases.MODELS['qwen3_tied']
  base, _, run = run_of(tmp_path, cfg)
  for more in ([], ['--overwrite', '--dtype', 'bfloat16']):
    assert cli.main(['to_peft', str(run), str(tmp_path / 'out'), *more]) == 0
  said = json.loads((tmp_path / 'out' / files.ADAPTER).read_text())
  assert (said['r'], said['lora_alpha'], said['base_model_name_or_path']) == (3, 6, str(base))
  assert said['target_modules'] == ['q_proj', 'v_proj', 'o_proj', 'down_proj']
  tensors = safetensors.numpy.load_file(tmp_path / 'out' / adapter.WEIGHTS)
  assert len(tensors) == 2 * 4 * cfg.layers
  up = tensors['base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight']
  assert up.shape == (24, 3) and up.dtype == 'bfloat16'
  assert config.block_options(config.read_meta(tmp_path / 'out')) == BLOCKS
  card = (tmp_path / 'out' / files.CARD).read_text()
  assert 'library_name: peft' in card and 'AutoPeftModelForCausalLM' in card and str(tmp_path) not in card


@pytest.mark.parametrize('cfg, options, message', [
    (hf_cases.MODELS['llama_rope'], lora.NONE, 'this run trained every parameter, and has no adapter'),
    (dataclasses.replace(hf_cases.MODELS['llama_rope'], learned_sinks=2), OPTIONS,
     'this student has 2 learned sinks, embeddings that the model it adds to has not: export it merged')])
def test_what_is_no_adapter_is_refused(tmp_path, cfg, options, message, capsys):
  run = run_of(tmp_path, cfg, options)[2]
  assert cli.main(['to_peft', str(run), str(tmp_path / 'out')]) == 2
  assert message in capsys.readouterr().err and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', ['qwen3_tied', 'qwen2_tied', 'llama_rope'])
def test_peft_gives_the_logits_of_the_merged_model(name, tmp_path):
  torch, peft = pytest.importorskip('torch'), pytest.importorskip('peft')
  cfg, options = hf_cases.MODELS[name], lora.LoraOptions(rank=3, alpha=6.0)
  _, params, run = run_of(tmp_path, cfg, options)
  assert cli.main(['to_peft', str(run), str(tmp_path / 'out')]) == 0
  model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / 'out', dtype=torch.float32).eval()
  tokens = np.random.default_rng(0).integers(cfg.vocab, size=(2, 11), dtype=np.int32)
  with torch.no_grad():
    theirs = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
  merged, layout = lora.merge(params, trained(cfg, options), options), blocks.from_lengths([[(11,)]] * 2, 11)
  compute = transformer.Compute(impl='reference')
  ours = jax.jit(lambda: transformer.logits(merged, transformer.apply(merged, tokens, layout, cfg, compute), cfg))()
  assert np.abs(theirs).max() > 1
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
