"""The launch scripts: read by shellcheck and by JobSet's own schema, run with stand-ins for the commands of a cluster, and
once under a real Slurm where its packages are installed (Debian: slurmctld slurmd slurm-client munge)."""

import contextlib
import gzip
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest
import run_cases
import yaml

from blockattn.train import loop
from launch import processes

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted((ROOT / 'launch').glob('*.sh')), ROOT / 'launch' / 'slurm.sbatch', ROOT / '.ci' / 'run']
folder = run_cases.folder
needs_bash = pytest.mark.skipif(shutil.which('bash') is None, reason='needs bash')


def executable(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(path.stat().st_mode | stat.S_IXUSR)
  return path


@needs_bash
def test_scripts_are_read_without_complaint():
  assert len(SCRIPTS) == 5
  for script in SCRIPTS:
    subprocess.run(['bash', '-n', str(script)], check=True)
  if shutil.which('shellcheck'):
    result = subprocess.run(['shellcheck', *map(str, SCRIPTS)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# launch/processes.py

def start_processes(tmp_path, body, *args, **env):
  (tmp_path / 'script.py').write_text('import os, signal, sys, time\nme = os.environ["BLOCKATTN_PROCESS"]\n' + body)
  return subprocess.Popen([sys.executable, '-m', 'launch.processes', *args, str(tmp_path / 'script.py'), 'a', '--b=c'],
                          cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_processes_know_their_place_and_their_lines_are_told_apart(tmp_path):
  process = start_processes(tmp_path, 'names = "BLOCKATTN_COORDINATOR BLOCKATTN_PROCESSES BLOCKATTN_PROCESS".split()\n'
                            'print(*(os.environ[name] for name in [*names, "JAX_NUM_CPU_DEVICES"]), *sys.argv[1:])\n'
                            'print("no newline", end="", file=sys.stderr)',
                            '--processes=3', '--devices', '2')
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0
  lines = sorted(out.splitlines())
  places = [re.fullmatch(rf'\[{i}\] (127.0.0.1:\d+) 3 {i} 2 a --b=c', lines[2 * i])[1] for i in range(3)]
  assert len(set(places)) == 1 and lines[1::2] == [f'[{i}] no newline' for i in range(3)]


def test_when_one_fails_the_others_are_ended_and_its_code_is_kept(tmp_path):
  body = ('if me == "1":\n  sys.exit(17)\n'
          'if me == "2":\n  signal.signal(signal.SIGTERM, signal.SIG_IGN)\n'   # has to be killed
          'time.sleep(100)')
  (tmp_path / 'script.py').write_text('import os, signal, sys, time\nme = os.environ["BLOCKATTN_PROCESS"]\n' + body)
  started = list(processes.start_all([str(tmp_path / 'script.py')], 3, 1, os.environ))
  start = time.monotonic()
  assert processes.wait_for_all(started, patience_s=1.0) == 17
  assert [p.returncode for p in started] == [-signal.SIGTERM, 17, -signal.SIGKILL] and time.monotonic() - start < 30


@pytest.mark.parametrize('sign', [signal.SIGTERM, signal.SIGINT])
def test_signals_are_handed_on(tmp_path, sign):
  body = (f'def stop(*_):\n  sys.exit(75)\nsignal.signal({int(sign)}, stop)\nprint("ready")\n'
          'for _ in range(600):\n  time.sleep(0.1)')
  process = start_processes(tmp_path, body, '--processes=2')
  assert {process.stdout.readline(), process.stdout.readline()} == {'[0] ready\n', '[1] ready\n'}
  process.send_signal(sign)
  process.communicate(timeout=60)
  assert process.returncode == 75


def test_a_signal_between_two_starts_stops_what_has_started(tmp_path, monkeypatch):
  script = tmp_path / 'script.py'
  script.write_text('import time\ntime.sleep(100)')
  start_all, started = processes.start_all, []

  def interrupted(*args):
    for process in start_all(*args):
      started.append(process)
      os.kill(os.getpid(), signal.SIGTERM)   # when it runs, and before main knows of it
      yield process

  monkeypatch.setattr(processes, 'start_all', interrupted)
  old = {sign: signal.getsignal(sign) for sign in (signal.SIGTERM, signal.SIGINT)}
  try:
    assert processes.main(['--processes=3', str(script)]) == 128 + signal.SIGTERM
  finally:
    for sign, handler in old.items():
      signal.signal(sign, handler)
  assert [process.returncode for process in started] == [-signal.SIGTERM]   # and the others are not started


def test_only_trainers_are_told_of_multihost():
  command = ['-m', 'blockattn.train.distill', '--workdir=x']
  assert processes.as_one_of_several(command) == [*command, '--multihost=auto']
  for same in ([*command, '--multihost=a:1,2,0'], ['-m', 'tools.show', '--workdir=x'], ['x.py']):
    assert processes.as_one_of_several(same) == same


@pytest.mark.parametrize('args, message', [([], 'nothing to run'), (['--processes', '0', 'x.py'], 'numbers from 1'),
                                           (['--processes'], 'expected one argument')])
def test_wrong_arguments_of_processes(args, message, capsys):
  with pytest.raises(SystemExit, match='2'):
    processes.main(args)
  assert message in capsys.readouterr().err


# launch/jobset.yaml

def schema_errors(value, schema, where='JobSet'):
  """What a Kubernetes API server would refuse, with strict validation of fields; only the keywords that this schema has."""
  if schema.get('x-kubernetes-int-or-string'):
    return [] if isinstance(value, (int, str)) else [f'{where}: neither a number nor a text']
  kinds = {'object': dict, 'array': list, 'string': str, 'boolean': bool, 'integer': int}
  kind = kinds[schema['type']]
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    return [f'{where}: {value!r} is no {schema["type"]}']
  errors = []
  if kind is dict:
    known, other = schema.get('properties', {}), schema.get('additionalProperties')
    errors += [f'{where}: lacks {name}' for name in schema.get('required', ()) if name not in value]
    for name, inner in value.items():
      if name in known and (where, name) != ('JobSet', 'metadata'):   # of metadata the schema says only that it is an object
        errors += schema_errors(inner, known[name], f'{where}.{name}')
      elif name not in known:
        errors += schema_errors(inner, other, f'{where}.{name}') if other else [f'{where}: no field {name}']
  elif kind is list:
    errors += [e for i, inner in enumerate(value) for e in schema_errors(inner, schema['items'], f'{where}[{i}]')]
  if 'enum' in schema and value not in schema['enum']:
    errors.append(f'{where}: {value!r} is none of {schema["enum"]}')
  if 'pattern' in schema and not re.search(schema['pattern'], value):
    errors.append(f'{where}: {value!r} does not match {schema["pattern"]}')
  if 'minimum' in schema and value < schema['minimum']:
    errors.append(f'{where}: {value} is below {schema["minimum"]}')
  for bound, wrong in (('maxLength', lambda n, limit: n > limit), ('minLength', lambda n, limit: n < limit),
                       ('maxItems', lambda n, limit: n > limit)):
    if bound in schema and wrong(len(value), schema[bound]):
      errors.append(f'{where}: {len(value)} long, {bound} is {schema[bound]}')
  return errors


def jobset_documents():
  return [d for d in yaml.safe_load_all((ROOT / 'launch' / 'jobset.yaml').read_text()) if d]


def jobset_schema():
  kept = json.loads(gzip.decompress((ROOT / 'tests/support/jobset_schema.json.gz').read_bytes()))
  assert kept['licence'].startswith('Apache-2.0') and 'kubernetes-sigs/jobset' in kept['source'] and kept['changes']
  return kept['schema']


def test_the_jobset_follows_the_published_schema():
  one = jobset_documents()[-1]
  assert one['kind'] == 'JobSet' and schema_errors(one, jobset_schema()) == []


def test_a_typo_in_the_jobset_would_be_seen():
  schema = jobset_schema()
  broken = lambda: jobset_documents()[-1]
  job = lambda d: d['spec']['replicatedJobs'][0]['template']['spec']
  container = lambda d: job(d)['template']['spec']['containers'][0]
  for change, message in (
      (lambda d: container(d).update(argz=[]), 'containers[0]: no field argz'),
      (lambda d: container(d).update(args='-m x'), "containers[0].args: '-m x' is no array"),
      (lambda d: container(d).pop('name'), 'containers[0]: lacks name'),
      (lambda d: job(d).update(parallelism='8'), "spec.parallelism: '8' is no integer"),
      (lambda d: d['spec']['failurePolicy'].update(maxRestart=1), 'failurePolicy: no field maxRestart'),
      (lambda d: d['spec']['failurePolicy']['rules'][0].update(action='Stop'), "action: 'Stop' is none of"),
      (lambda d: d['spec'].update(replicatedJobs={}), 'replicatedJobs: {} is no array')):
    one = broken()
    change(one)
    errors = schema_errors(one, schema)
    assert len(errors) == 1 and message in errors[0], errors


def test_the_parts_of_the_jobset_fit_each_other():
  account, role, binding, one = jobset_documents()
  job = one['spec']['replicatedJobs'][0]['template']['spec']
  pod = job['template']['spec']
  assert [d['kind'] for d in (account, role, binding)] == ['ServiceAccount', 'Role', 'RoleBinding']
  assert binding['roleRef'] == {'apiGroup': 'rbac.authorization.k8s.io', 'kind': 'Role', 'name': role['metadata']['name']}
  assert binding['subjects'] == [{'kind': 'ServiceAccount', 'name': account['metadata']['name']}]
  assert pod['serviceAccountName'] == account['metadata']['name']
  # What jax reads: its pod (by its address), services, and its job.
  granted = {(resource, verb) for rule in role['rules'] for resource in rule['resources'] for verb in rule['verbs']}
  assert {('pods', 'list'), ('services', 'list'), ('jobs', 'get')} <= granted
  assert job['parallelism'] == job['completions'] and job['completionMode'] == 'Indexed' and job['backoffLimit'] == 0
  [container] = pod['containers']
  [codes] = [rule['onExitCodes'] for rule in job['podFailurePolicy']['rules']]
  assert codes == {'containerName': container['name'], 'operator': 'In', 'values': [1, 2, loop.EXIT_PREEMPTED]}
  assert pod['restartPolicy'] == 'Never'   # a pod failure policy asks for it
  assert container['args'][-1] == '--multihost=auto' and container['args'][:2] == ['-m', 'blockattn.train.distill']
  assert {m['name'] for m in container['volumeMounts']} == {v['name'] for v in pod['volumes']}


@pytest.mark.parametrize('reason, code, action', [
    ('PodFailurePolicy', 75, 'RestartJobSetAndIgnoreMaxRestarts'), ('PodFailurePolicy', 1, 'FailJobSet'),
    ('PodFailurePolicy', 2, 'FailJobSet'), ('BackoffLimitExceeded', 76, None)])   # None: a restart that counts
def test_what_a_jobset_does_about_an_end(reason, code, action):
  """JobSet takes the first rule whose reasons and patterns have the job's; the message is Kubernetes' own."""
  message = f'Container train for pod default/x75 failed with exit code {code} matching FailJob rule at index 0'
  message = message if reason == 'PodFailurePolicy' else 'Job has reached the specified backoff limit'
  rules = jobset_documents()[-1]['spec']['failurePolicy']['rules']
  fits = [rule['action'] for rule in rules if reason in rule['onJobFailureReasons'] and
          any(re.search(pattern, message) for pattern in rule.get('onJobFailureMessagePatterns', ['']))]
  assert next(iter(fits), None) == action


# launch/tpu_vm.sh

@pytest.fixture
def gcloud(tmp_path):
  """A gcloud that is this machine as two hosts of a TPU VM: scp copies to their homes, ssh runs there."""
  bin, hosts = tmp_path / 'bin', [tmp_path / 'host 0', tmp_path / 'host1']
  for host in hosts:
    (host / 'blockattn' / 'launch').mkdir(parents=True)
    executable(host / 'blockattn' / 'launch' / 'local.sh', '''#!/bin/bash
echo "$HOME: extras $BLOCKATTN_EXTRAS, $X;$Y;$KEY;$Z: $*"
trap "exit 75" TERM
[ "$1" = -c ] && exit
for i in $(seq 300); do sleep 0.1; done
''')
  executable(bin / 'gcloud', f'''#!{sys.executable}
import os, shutil, subprocess, sys
args = sys.argv[1:]
assert args[:3] == ['compute', 'tpus', 'tpu-vm'] and '--zone=zone' in args and '--worker=all' in args, args
for host in {[str(h) for h in hosts]!r}:
  if args[3] == 'ssh':
    assert args[4] == 'name'
    command = args[-1].removeprefix('--command=')
    open({str(tmp_path / 'commands')!r}, 'a').write(command)
    code = subprocess.run(['bash', '-c', command], env=os.environ | {{'HOME': host}}, cwd=host).returncode
  else:
    code = shutil.copy(args[4], os.path.join(host, args[5].removeprefix('name:'))) is None
  if code:
    sys.exit(code)
''')

  def call(*args, **env):
    return subprocess.run([shutil.which('bash'), str(ROOT / 'launch' / 'tpu_vm.sh'), *args], capture_output=True, text=True,
                          env=os.environ | {'PATH': f'{bin}:{os.environ["PATH"]}'} | env, timeout=60)
  return call, hosts


@needs_bash
def test_a_run_on_a_tpu_vm(gcloud):
  call, hosts = gcloud
  assert 'no run' in call('status', 'name', 'zone').stdout
  command = ('-m', 'blockattn.train.distill', '--config=a b', '--workdir=it\'s "x"')
  # Of several flags none is lost, quoted or not; nothing in it is run; and no list of processes shows it.
  started = call('run', 'name', 'zone', *command, TPU_ENV='Y="two words" KEY=$(id)\nX=--one=a --two=b Z=\'--c --d\' --e')
  assert started.returncode == 0 and not any((host / 'run.env').exists() for host in hosts), started.stderr
  assert call('status', 'name', 'zone').stdout.count(': runs') == 2
  again = call('run', 'name', 'zone', *command)
  assert again.returncode != 0 and 'a run is under way' in again.stderr
  for host in hosts:
    assert (host / 'run.log').read_text() == (
        f'{host}: extras tpu, --one=a --two=b;two words;$(id);--c --d --e: {" ".join(command)} --multihost=auto\n')
  assert 'two words' not in (hosts[0].parent / 'commands').read_text()
  assert call('stop', 'name', 'zone').returncode == 0
  deadline = time.monotonic() + 20
  while (status := call('status', 'name', 'zone').stdout).count('ended with code 75') != 2:
    assert time.monotonic() < deadline, status
    time.sleep(0.1)


@pytest.mark.slow
@needs_bash
@pytest.mark.skipif(not (ROOT / '.git').exists() or shutil.which('git') is None, reason='needs a git checkout')
def test_the_hosts_of_a_tpu_vm_get_the_commit(gcloud):
  call, hosts = gcloud
  for host in hosts:
    (host / 'blockattn' / '.venv').mkdir()
  # Only what is done with git: the checkout's own local.sh would install.
  done = call('setup', 'name', 'zone', PYTHON='/nowhere/python')
  assert done.returncode != 0 and 'PYTHON=/nowhere/python' in done.stderr
  head = subprocess.run(['git', '-C', str(ROOT), 'rev-parse', 'HEAD'], capture_output=True, text=True).stdout
  there = hosts[0] / 'blockattn'
  assert subprocess.run(['git', '-C', str(there), 'rev-parse', 'HEAD'], capture_output=True, text=True).stdout == head
  assert (there / '.venv').is_dir() and (there / 'launch' / 'local.sh').exists()


@needs_bash
@pytest.mark.parametrize('args, code, message', [
    ((), 2, 'usage:'), (('help',), 0, 'usage: launch/tpu_vm.sh'), (('start', 'name', 'zone'), 1, 'no command start'),
    (('run', 'name'), 1, 'needs NAME and ZONE'), (('run', 'name', 'zone'), 1, 'nothing to run'),
    (('run', 'name', 'zone', '-c', 'env: --a B=1'), 1, 'TPU_ENV begins with --a'),
    (('run', 'name', 'zone', '-c', "env: A='b"), 1, 'TPU_ENV: a quote has no end')])
def test_wrong_arguments_of_tpu_vm(gcloud, args, code, message):
  result = gcloud[0](*args, TPU_ENV=args[-1].removeprefix('env: ') if args[-1:] and 'env: ' in args[-1] else '')
  assert result.returncode == code and message in result.stdout + result.stderr


# launch/slurm.sbatch

@pytest.fixture
def sbatch(tmp_path):
  """Runs the script as Slurm would, with an srun that ends with a code and a scontrol that ends the script."""
  bin, python = tmp_path / 'bin', executable(tmp_path / 'python', '#!/bin/sh\n')
  executable(bin / 'srun', '#!/bin/sh\necho "srun $*" >> "$CALLS"\nexit $CODE\n')
  executable(bin / 'squeue', '#!/bin/sh\necho $STATE\n')
  executable(bin / 'scontrol', '#!/bin/sh\necho "scontrol $*" >> "$CALLS"\nkill -TERM $PPID\n')

  def call(*args, **env):
    calls = tmp_path / 'calls'
    calls.write_text('')
    env = {'PATH': f'{bin}:{os.environ["PATH"]}', 'CALLS': str(calls), 'CODE': '0', 'STATE': 'RUNNING', 'SLURM_JOB_ID': '7',
           'SLURM_JOB_NODELIST': 'n[1-2]', 'SLURM_SUBMIT_DIR': str(ROOT), 'BLOCKATTN_PYTHON': str(python)} | env
    result = subprocess.run([shutil.which('bash'), str(ROOT / 'launch' / 'slurm.sbatch'), *args], env=env, text=True,
                            capture_output=True, timeout=30, cwd=tmp_path)
    return result.returncode, calls.read_text(), result.stderr, str(python)
  return call


@needs_bash
def test_a_job_that_ends_well(sbatch):
  code, calls, _, python = sbatch('-m', 'blockattn.train.distill', '--workdir=a b')
  assert code == 0 and calls == f'srun --kill-on-bad-exit=0 --label {python} -m blockattn.train.distill --workdir=a b ' \
                                '--multihost=auto\n'
  assert '--multihost=a:1,2,0\n' in sbatch('-m', 'x', '--multihost=a:1,2,0')[1]


@needs_bash
@pytest.mark.parametrize('env, requeued, code, message', [
    ({'CODE': '75'}, True, -signal.SIGTERM, 'saved; back into the queue'),
    ({'CODE': '75', 'SLURM_RESTART_COUNT': '99'}, True, -signal.SIGTERM, 'saved; back into the queue'),
    ({'CODE': '75', 'STATE': 'CANCELLED'}, False, 75, 'the job is CANCELLED'),
    ({'CODE': '76'}, True, -signal.SIGTERM, 'lost (code 76), restart 1 of 10'),
    ({'CODE': '76', 'SLURM_RESTART_COUNT': '99'}, True, -signal.SIGTERM, 'restart 1 of 10'),   # 99 were saved
    ({'CODE': '134', 'MAX_RESTARTS': '0'}, False, 134, 'lost (code 134) 1 times'),
    ({'CODE': '1'}, False, 1, 'failed with code 1'),
    ({'SLURM_GPUS_ON_NODE': '8', 'SLURM_NTASKS_PER_NODE': '1'}, False, 2, '--ntasks-per-node=8'),
    ({'SLURM_SUBMIT_DIR': '/'}, False, 2, 'no checkout'),
    ({'BLOCKATTN_PYTHON': '/nowhere'}, False, 2, 'no Python at /nowhere')])
def test_how_a_job_ends(sbatch, env, requeued, code, message):
  ended, calls, said, _ = sbatch('-m', 'x', **env)
  assert ended == code and message in said
  assert ('scontrol requeue 7' in calls) == requeued


@needs_bash
@pytest.mark.parametrize('given', [['--workdir=runs/a b'], ['--workdir', 'runs/a b']])
def test_losses_of_a_job_are_counted_over_its_starts(sbatch, tmp_path, given):
  losses = tmp_path / 'runs' / 'a b' / 'losses-of-job-5_3'
  task = {'SLURM_JOB_ID': '5', 'SLURM_ARRAY_JOB_ID': '5', 'SLURM_ARRAY_TASK_ID': '3', 'MAX_RESTARTS': '2'}
  said = []
  for code in ('76', '75', '137', '75', '76'):
    ended, calls, words, _ = sbatch('-m', 'x', *given, CODE=code, **task)
    said.append(words.splitlines()[-1])
    assert ('scontrol requeue 5_3\n' in calls) == (ended == -signal.SIGTERM)   # the task, not the array of its name
  assert 'restart 1 of 2' in said[0] and 'saved' in said[1] and 'restart 2 of 2' in said[2] and 'saved' in said[3]
  assert ended == 76 and '(code 76) 3 times' in said[4]
  assert [line.split(', ')[1] for line in losses.read_text().splitlines()] == ['code 76', 'code 137', 'code 76']


SLURM = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'scancel', 'scontrol', 'squeue')


def resolves(host):
  try:
    return bool(socket.gethostbyname(host))
  except OSError:
    return False


@pytest.fixture
def slurm(tmp_path):
  """A Slurm cluster of this machine alone, as the one node; its commands find it through SLURM_CONF."""
  host = socket.gethostname().split('.')[0]
  if not all(map(shutil.which, SLURM)) or os.geteuid() != 0 or not resolves(host):
    pytest.skip('needs Slurm (Debian: slurmctld slurmd slurm-client munge), root, and a host name that resolves')
  place = pathlib.Path('/tmp') / f'slurm-{os.getpid()}'   # munge wants all folders above its socket open to all
  place.mkdir(mode=0o755)
  for name in ('state', 'spool'):
    (place / name).mkdir()
  (place / 'munge.key').write_bytes(os.urandom(128))
  (place / 'munge.key').chmod(0o600)
  conf = place / 'slurm.conf'
  conf.write_text(f'''
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={processes.free_port()}
SlurmdPort={processes.free_port()}
AuthType=auth/munge
AuthInfo=socket={place}/munge.sock
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES State=UP
''')
  env = {k: v for k, v in os.environ.items() if not k.startswith(('SLURM', 'BLOCKATTN_'))} | {'SLURM_CONF': str(conf)}
  munge = [f'--{key}={place}/munge.{end}' for key, end in (('socket', 'sock'), ('key-file', 'key'), ('pid-file', 'pid'),
                                                           ('log-file', 'log'), ('seed-file', 'seed'))]
  daemons = []
  start = lambda *command: daemons.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL,
                                                           stderr=subprocess.DEVNULL))
  try:
    start('munged', '--foreground', *munge)
    wait_until((place / 'munge.sock').exists)
    start('slurmctld', '-D', '-i', '-f', str(conf))
    start('slurmd', '-D', '-f', str(conf))
    wait_until(lambda: 'idle' in subprocess.run(['sinfo', '--noheader', '--format=%t'], env=env, capture_output=True,
                                                text=True).stdout)
    yield lambda *command: subprocess.run(command, env=env | {'PYTHONPATH': str(ROOT)}, cwd=ROOT, check=True, text=True,
                                          capture_output=True).stdout
  finally:
    for daemon in reversed(daemons):
      daemon.terminate()
    for daemon in daemons:
      daemon.wait(60)
    shutil.rmtree(place)


def wait_until(condition, seconds=240.0, what=lambda: ''):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, what()
    time.sleep(0.2)


def test_a_job_is_terminated_and_put_back_and_goes_on_under_slurm(slurm, folder):
  workdir, log = folder / 'slurm', folder / 'slurm.log'
  job = slurm('sbatch', '--parsable', '--ntasks-per-node=2', f'--output={log}',
              f'--export=ALL,BLOCKATTN_PYTHON={sys.executable},JAX_PLATFORMS=cpu,JAX_NUM_CPU_DEVICES=1,'
              f'JAX_DISABLE_MOST_OPTIMIZATIONS=1,JAX_COMPILATION_CACHE_DIR={folder}/compiled,'
              'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0', str(ROOT / 'launch' / 'slurm.sbatch'),
              '-m', 'blockattn.train.distill', f'--config={folder}/config.py', f'--workdir={workdir}',
              '--config.steps=1000000', '--config.save_every=1000000').strip()
  said = lambda: log.read_text() if log.exists() else ''
  last = lambda: run_cases.losses(workdir)[0][-1:] if (workdir / 'metrics.jsonl').exists() else []
  state = lambda: slurm('squeue', '--noheader', f'--jobs={job}', '--states=all', '--format=%T').strip()

  def start_now():   # Slurm would wait for two minutes; asked more often, it puts the job off again and again
    time.sleep(5)
    if state() == 'PENDING':
      with contextlib.suppress(subprocess.CalledProcessError):   # it has started meanwhile
        slurm('scontrol', 'update', f'JobId={job}', 'StartTime=now')

  try:
    wait_until(lambda: last() and last()[0] >= 3, what=said)
    slurm('scancel', '--signal=TERM', job)   # what Slurm does before the time is up, see --signal in the script
    wait_until(lambda: state() == 'PENDING', what=said)
    saved = run_cases.newest(workdir)
    assert saved >= 4 and f'0: SIGTERM: saved step {saved} in' in said() and 'back into the queue' in said()
    wait_until(lambda: start_now() or last() and last()[0] > saved, what=said)
    assert f'start 2 of job {job}' in said() and f'0: restoring step {saved}:' in said()
    assert '2 processes' not in said() and run_cases.losses(workdir)[0] == list(range(1, last()[0] + 1))
    slurm('scancel', job)   # by its user: saved once more, and not put back
    wait_until(lambda: state() == 'CANCELLED', what=lambda: state() + said())
    assert 'restart' not in said().split('start 2 of job')[1]
  finally:
    if state() != 'CANCELLED':
      slurm('scancel', job)
