"""Installs the `blockattn` package; `tools/`, `configs/` and `launch/` are run from a checkout."""

import setuptools

JAX = '>=0.10,<0.13'
TORCH = ['torch==2.13.0']   # runs exported students in transformers; what converted checkpoints are compared with
EVAL = ['jieba>=0.42.1', 'nltk>=3.10']   # words of Chinese answers, stems of English ones
TEST = [
    *TORCH,
    'rouge==1.0.1',   # whose scores ours have to equal
    'pytest>=8',
    'pytest-xdist>=3.6',
    'hypothesis>=6.100',
]
# Other people's splitters and measures: what the segmenter is compared with, and what it is plugged into.
TEXT = [
    'langchain-text-splitters>=1.1',
    'llama-index-core>=0.14',
    'chonkie>=1.7',
    'semchunk>=4.1',
    'nltk>=3.10',
    'segeval>=2.0.11',
]
REPORT = ['matplotlib>=3.9']   # curves and masks of a run's page
SEMANTICSEG = [
    'tensorflow-datasets>=4.9.10',
    'importlib_resources',   # which it does not ask for
    'datasketch>=2.0',
    'tree-sitter>=0.25',
    'tree-sitter-language-pack<1',   # later ones fetch their grammars when they are first used
]

setuptools.setup(
    name='blockattn',
    version='0.1.0',
    description='Block attention for long prompts in JAX: block distillation, segmentation, reuse of cached blocks',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=setuptools.find_packages(include=['blockattn', 'blockattn.*']),
    package_data={'blockattn': ['assets/**']},
    install_requires=[
        f'jax{JAX}',
        'flax>=0.12.8',
        'optax',
        'orbax-checkpoint>=0.12.3,<0.13',
        'grain>=0.2.18',
        'array-record',
        'transformers>=5.17,<6',
        'tokenizers',
        'jinja2',   # chat templates; transformers does not ask for it
        'safetensors',
        'ml-collections>=1.1',
        'ml_dtypes',
        'httpx',            # what transformers downloads with
        'markdown-it-py',   # what rich reads Markdown with
        'numpy',
        'regex',            # what transformers reads tokenizers with
        'rich',
        'tensorboardX',
    ],
    extras_require={
        'tpu': [f'jax[tpu]{JAX}'],
        'gpu': [f'jax[cuda13]{JAX}'],
        # Compilers for TPU and GPU kernels on a machine without either; the plugin has to be of jax's own version.
        'kernels-ci': [
            f'jax[tpu]{JAX}',
            'jax-cuda13-plugin==0.10.2; python_version < "3.12"',
            'jax-cuda13-plugin==0.11.2; python_version >= "3.12"',
            'jax==0.11.2; python_version >= "3.12"',
            'nvidia-cuda-nvcc>=13,<14', 'nvidia-nvvm>=13,<14', 'nvidia-cuda-runtime>=13,<14', 'nvidia-nvjitlink>=13,<14',
        ],
        'torch': TORCH,
        'eval': EVAL,
        'text': TEXT,
        'semanticseg': SEMANTICSEG,
        'beam': ['apache-beam>=2.77'],   # for corpora that one process is too slow for; heavy, and it pins protobuf
        'report': REPORT,
        'log': ['wandb'],
        'cloud': ['kubernetes'],   # JAX asks it who belongs to a JobSet of GPU nodes
        'test': TEST,
        'dev': TEST + EVAL + TEXT + SEMANTICSEG + REPORT + ['ruff>=0.9', 'pyright>=1.1.400'],
    },
)
