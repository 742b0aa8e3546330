"""The segmenter model: shapes at full size, transformers' own logits, checkpoints there and back, scoring in windows."""

import json
import math

import hf_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import segment_cases

from blockattn import blocks, mesh as mesh_lib
from blockattn.hf import config as hf_config, convert, files
from blockattn.models import classifier, sizes, spec, transformer
from blockattn.segmentation import markers, model, segmenter

COMPUTE = transformer.Compute(impl='reference')
logits = jax.jit(model.apply, static_argnums=(3, 4))


def layout_of(tokens):
  return blocks.from_lengths([[[tokens.shape[1]]]] * len(tokens), tokens.shape[1])


def loaded(path, style, **options) -> segmenter.Segmenter:
  place = mesh_lib.Placement(mesh_lib.make_mesh({}, jax.devices()[:1]))
  return segmenter.Segmenter.load(segment_cases.folder_of(path, style, **options), place=place, batch_tokens=96)


@pytest.mark.parametrize('name', ['qwen3_tied', 'qwen3_bias', 'llama_rope', 'llama_bias'])
def test_logits_are_those_of_transformers(name, tmp_path):
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  cfg, params = segment_cases.model(name)
  hf_cases.write_tokenizer(tmp_path / 'tokenizer', cfg.vocab)
  convert.save(params, cfg, tmp_path / 'model', source=tmp_path / 'tokenizer', meta={}, card='', dtype='float32')
  theirs, report = transformers.AutoModelForTokenClassification.from_pretrained(
      tmp_path / 'model', dtype=torch.float32, attn_implementation='eager', output_loading_info=True)
  assert not any(report[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  tokens = np.random.default_rng(0).integers(0, cfg.vocab, (2, 12)).astype(np.int32)
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
  got = logits(params, tokens, layout_of(tokens), cfg, COMPUTE)
  assert got.shape == (2, 12, 2) and got.dtype == jnp.float32
  np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_checkpoint_of_transformers_is_read(tmp_path):
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  cfg, _ = segment_cases.model('qwen3_tied')
  raw = hf_config.to_dict(cfg, 'float32', dict.fromkeys(files.TOKEN_IDS))
  theirs = transformers.Qwen3ForTokenClassification(transformers.Qwen3Config(**raw))
  torch.nn.init.normal_(theirs.score.bias)
  theirs.save_pretrained(tmp_path)
  read_cfg, params = convert.load(tmp_path, 'float32')
  assert read_cfg == cfg
  tokens = np.arange(10, dtype=np.int32)[None]
  with torch.no_grad():
    expected = theirs.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
  np.testing.assert_allclose(logits(params, tokens, layout_of(tokens), cfg, COMPUTE), expected, atol=1e-4)


def test_a_pooled_model_is_transformers_own_behind_its_input(tmp_path):
  """Units are one position; transformers gives the same logits for the same input embeddings."""
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  cfg, params = segment_cases.model(unit_tokens=5)
  hf_cases.write_tokenizer(tmp_path / 'tokenizer', cfg.vocab)
  convert.save(params, cfg, tmp_path / 'model', source=tmp_path / 'tokenizer', meta={}, card='', dtype='float32')
  assert convert.load(tmp_path / 'model', 'float32')[0] == cfg
  tokens = np.random.default_rng(0).integers(0, cfg.vocab, (2, 9, 5)).astype(np.int32)
  inputs = np.einsum('btpd,pde->bte', params['embed'][tokens], params['units'])
  theirs = transformers.AutoModelForTokenClassification.from_pretrained(
      tmp_path / 'model', dtype=torch.float32, attn_implementation='eager')
  with torch.no_grad():
    expected = theirs(inputs_embeds=torch.tensor(inputs)).logits.numpy()
  np.testing.assert_allclose(logits(params, tokens, layout_of(tokens), cfg, COMPUTE), expected, atol=1e-4)


@pytest.mark.parametrize('size', ['qwen3_0_6b', 'qwen3_4b', 'llama31_8b'])
def test_shapes_at_full_size(size):
  cfg = model.architecture(sizes.get(size))
  params = spec.abstract(classifier.spec(cfg), 'bfloat16')
  assert 'head' not in params and params['score'].shape == (2, cfg.width)
  ints, flags = jax.ShapeDtypeStruct((1, 32768), jnp.int32), jax.ShapeDtypeStruct((1, 32768), bool)
  layout = blocks.BlockLayout(ints, ints, ints, flags, flags, flags)
  out = jax.eval_shape(lambda p, t, la: model.apply(p, t, la, cfg, transformer.Compute('bfloat16', 'xla')),
                       params, ints, layout)
  assert out.shape == (1, 32768, 2) and out.dtype == jnp.float32


def test_a_language_model_gets_a_head():
  backbone = hf_cases.MODELS['qwen3_bias']
  cfg = model.architecture(backbone)
  assert model.is_segmenter(cfg) and not model.is_segmenter(backbone)
  params = model.from_backbone(hf_cases.random_params(backbone, 'float32'), cfg, jax.random.key(0))
  expected = spec.abstract(classifier.spec(cfg), 'float32')
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, expected)


def test_the_loss_is_over_labelled_positions_and_weighs_cuts():
  logits = jnp.array([[[2.0, 0.0], [0.0, 1.0], [9.0, -9.0]]])
  sums = model.loss_sums(logits, jnp.array([[0, 1, -100]]), cut_weight=3.0)
  no, yes = np.log(1 + np.exp(-2.0)), np.log(1 + np.exp(-1.0))
  np.testing.assert_allclose([sums['loss'], sums['weight'], sums['ce'], sums['tokens'], sums['cuts'], sums['found']],
                             [no + 3 * yes, 4, no + yes, 2, 1, 1], rtol=1e-6)


def reference_odds(scorer, text, params, cfg):
  """Log-odds of a text that fits into one window, from one plain forward pass."""
  units = scorer.reader.units(markers.split(text, markers.candidates(text)))
  tokens, at = scorer.reader.read(units, 0, len(units))
  padded = np.zeros((1, 128, *tokens.shape[1:]), np.int32)   # one length, one program
  padded[0, :len(tokens)] = tokens
  layout = blocks.from_lengths([[[len(tokens)]]], 128)
  return model.log_odds(logits(params, padded, layout, cfg, COMPUTE))[0, at[1:]]


STYLES = pytest.mark.parametrize('style, options', [('text', {'length': 160}), ('token', {}), ('none', {}),
                                                    ('pooled', {'ahead': 3, 'length': 24})])


@STYLES
def test_scores_of_short_texts_are_those_of_one_forward_pass(style, options, tmp_path):
  """Texts that share a row do not see each other."""
  scorer = loaded(tmp_path, style, **options)
  cfg, params = convert.load(tmp_path / 'model', 'float32')
  texts = ['One. Two\nthree\n', '', 'x', 'A b.\n\nC d. E f', '走了。好。', 'no\n', '\n\n\n', 'a\0b\r\nc']
  for text, scored in zip(texts, scorer.score(texts), strict=True):
    assert scored.candidates.tolist() == markers.candidates(text).tolist()
    assert scored.log_odds.shape == scored.candidates.shape and scored.log_odds.dtype == np.float32
    assert scored.tokens.shape == (len(scored.candidates) + 1,) and np.all(np.diff(scored.tokens) > 0)
    if len(scored.candidates):
      np.testing.assert_allclose(scored.log_odds, reference_odds(scorer, text, params, cfg), atol=1e-4)


@STYLES
def test_a_long_text_is_read_in_windows(style, options, tmp_path):
  """Every candidate is decided on once, behind text of the window before; the first window's are those of it alone."""
  scorer = loaded(tmp_path, style, **options)
  text = ''.join(f'Line {i} of it. More {i}\n' + '\n' * (i % 4 == 0) for i in range(30))
  seen = []
  scored, = scorer.score([text], seen.append)
  assert np.all(np.isfinite(scored.log_odds)) and np.all(scored.log_odds != 0)
  assert seen == sorted(seen) and seen[-1] == len(text)
  units = scorer.reader.units(markers.split(text, markers.candidates(text)))
  windows = list(scorer._windows(0, units))
  assert len(windows) > 3 and windows[0].new == 1 and windows[-1].decided == len(units)
  for before, after in zip(windows, windows[1:], strict=False):
    assert after.new == before.decided and before.first < after.first < after.new and after.stop > before.stop
  np.testing.assert_allclose(scorer.score([text])[0].log_odds, scored.log_odds)


def test_rows_are_divided_over_devices(tmp_path):
  one = loaded(tmp_path, 'none')
  many = segmenter.Segmenter.load(tmp_path / 'model', place=mesh_lib.Placement(mesh_lib.make_mesh({'data': 2},
                                                                                                  jax.devices()[:2])))
  texts = ['One. Two\nthree\n' * n for n in (1, 9)]
  for ours, theirs in zip(one.score(texts), many.score(texts), strict=True):
    np.testing.assert_allclose(ours.log_odds, theirs.log_odds, atol=1e-4)


def test_embeddings_do_not_depend_on_the_texts_beside(tmp_path):
  scorer = loaded(tmp_path, 'pooled', ahead=2)
  alone, together = scorer.embed(['One two.\n']), scorer.embed(['Other\n', 'One two.\n', 'x'])
  assert together.shape == (3, 24) and together.dtype == np.float32
  np.testing.assert_allclose(alone[0], together[1], atol=1e-5)


def test_what_the_folder_says_is_followed(tmp_path):
  scorer = loaded(tmp_path, 'pooled', ahead=2)
  assert scorer.options.threshold == -0.5 and scorer.options.read.ahead == 2 and scorer.options.length == 48
  assert segmenter.Segmenter.load(tmp_path / 'model', length=64).options.length == 64


def test_folders_that_do_not_fit_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError):
    segmenter.Segmenter.load(tmp_path / 'none')
  folder = segment_cases.folder_of(tmp_path, 'none')
  meta = json.loads((folder / files.META).read_text())
  (folder / files.META).write_text(json.dumps(meta | {'segmenter': meta['segmenter'] | {'markers': 'pooled'}}))
  with pytest.raises(ValueError, match='do not belong together'):
    segmenter.Segmenter.load(folder)
  raw = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(raw | {'architectures': ['Qwen3ForCausalLM']}))
  with pytest.raises(ValueError, match='token-classification'):
    segmenter.Segmenter.load(folder)


def test_windows_too_short_for_two_units_are_refused(tmp_path):
  folder = segment_cases.folder_of(tmp_path, 'none')
  with pytest.raises(ValueError, match='room for two units'):
    segmenter.Segmenter.load(folder, length=16)


@pytest.mark.parametrize('said, message', [
    ({'threshold': 'x'}, ": 'threshold' is 'x', not a number"), ({'threshold': None}, ": 'threshold' is None, not a number"),
    ({'threshold': math.nan}, ': threshold=nan'), ({'cohesion': 'yes'}, ": 'cohesion' is 'yes', not true or false"),
    ({'separators': '('}, r": separators='\(' is no regular expression: missing \), unterminated subpattern"),
    ({'separators': 3}, ": 'separators' is 3, not a text"), ({'length': 9.5}, ": 'length' is 9.5, not a whole number"),
    ({'overlap': math.nan}, ': overlap=nan'), ({'markers': 'odd'}, ": markers='odd'; choose one of"),
    ({'head': 0}, ': head=0; give a number from 1'),
    ({'outline': {'since': []}}, ": 'outline' lacks 'average', 'chosen', 'until'"), ('x', " is 'x', not a JSON object"),
    ({'outline': {'average': [['x']], 'chosen': [], 'since': [], 'until': []}}, r": 'outline': 'average'\[0\]\[0\] is 'x'")])
def test_what_a_folder_says_is_checked(tmp_path, said, message):
  section = {'markers': 'text', 'length': 8192} | said if isinstance(said, dict) else said
  (tmp_path / files.META).write_text(json.dumps({'segmenter': section}))
  with pytest.raises(ValueError, match=f'^{tmp_path / files.META}: segmenter{message}') as raised:
    segmenter.options_of(tmp_path)
  assert '\n' not in str(raised.value)
