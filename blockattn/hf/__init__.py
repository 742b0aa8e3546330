"""Models in the Hugging Face format: reading and writing folders, and running an exported student with torch.

What runs a student with torch is loaded when it is first asked for, so that nothing else here needs torch:

  cached_generate(model, prompt, options, ...)   transformers' generate over blocks that were read one by one
  prefill_blocks(model, prompt, options, ...)    the DynamicCache that it continues
  cached_inputs(prompt, options)                 what is read on behind it
  block_inputs(prompts, options)                 what one masked forward pass takes
  block_attention(model, layout)                 context manager under which that pass is masked
  register_block_attention()                     makes the name 'block_sdpa' known to transformers
"""

TORCH = ('cached_generate', 'prefill_blocks', 'cached_inputs', 'block_inputs', 'block_attention', 'register_block_attention')


def __getattr__(name):
  if name not in TORCH:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  from blockattn.hf import generation  # needs torch, an optional library that is slow to import
  return getattr(generation, name)
