"""The family of the method, as keys that differ from plain distillation: `python -m launch.sweep --points variants` of
configs/distill.py, the trainings of tools.variants and the steps of `tools.bench step --variants`. What each is, and whose,
stands in docs/method.md."""

VARIANTS = {
    'plain': {},
    'weighted': {'distill.weights.form': 'relu'},
    'ce_weighted': {'distill.weights.form': 'relu', 'distill.weights.on': 'ce', 'distill.ce_weight': 0.5},
    'document_softmax': {'distill.weights.form': 'exp', 'distill.weights.mean': 'document'},
    'reverse': {'distill.divergence': 'reverse'},
    'jsd': {'distill.divergence': 'jsd'},
    'matching': {'distill.match_weight': 1.0},
    'on_policy': {'distill.on_policy.share': 0.5, 'distill.on_policy.every': 2},
    'dropout': {'distill.drop_rate': 0.2},
    'granularity': {'data.join_blocks': 4},
    'read_starts': {'blocks.hide_starts': False},
    'overlap': {'blocks.overlap': 8},
    'seam': {'blocks.seam': 8},
    'tails': {'blocks.tails': 4},
    'links': {'blocks.tails': 4, 'blocks.tail_kind': 'link'},
    'wrappers': {'blocks.sinks': 1, 'blocks.sink_kind': 'learned', 'blocks.tails': 4, 'blocks.tail_kind': 'link',
                 'model.train_only': 'wrappers'},
    'align': {'blocks.sinks': 1, 'blocks.align': 16},
    'local': {'blocks.positions': 'local'},
    'shared_prefix': {'blocks.positions': 'local', 'data.shared_first': True},
}

# Starts and sinks: hidden (the first of these the default), and read, learned ones too.
SINKS = [{'blocks.sinks': sinks, 'blocks.hide_starts': hidden} for hidden in (True, False) for sinks in (0, 1, 4)] + [
    {'blocks.sinks': 4, 'blocks.hide_starts': False, 'blocks.sink_kind': 'learned'}]
