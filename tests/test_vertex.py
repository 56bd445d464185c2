"The cloud: jobs over the real library and the real protocol, against a fake Vertex AI; and its machines, as processes that know of one another."
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path

import pytest

from fakes import FakeGCS
from forks import warm
from kills import config_file, toy_data
from saxgpt.training.dist import PeerError, ProcessError, joined, launch, total

env = {k: v for k, v in os.environ.items() if k not in ('CLUSTER_SPEC', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')}
env |= dict(OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1', GOOGLE_CLOUD_PROJECT='', PYTHONPATH=str(Path(__file__).parent))
client = env | warm('saxgpt.vertex', 'google.cloud.aiplatform_v1', 'gcsfs')
training = 'saxgpt.train', 'gcsfs', 'pytest', 'torch._dynamo', 'torch.distributed.launcher.api', 'torch.distributed.run'
machine = env | warm(*training, family=True)


# a fake Vertex AI

class FakeVertex:
    """A fake of Vertex AI's job service on loopback: gRPC, real messages, none of the machines.
    A job goes through `states`, one with each question; `faults` (method, status, text, whether it is done all the same) come first."""
    def __init__(self, states=('PENDING', 'RUNNING', 'SUCCEEDED'), error='', faults=()):
        grpc = pytest.importorskip('grpc')
        v1 = pytest.importorskip('google.cloud.aiplatform_v1')
        self.grpc, self.v1, self.states, self.error, self.faults = grpc, v1, list(states), error, list(faults)
        self.jobs, self.asked = {}, []
        def method(fn, asks, answers):
            def call(request, context):
                self.asked.append((fn.__name__, dict(context.invocation_metadata()).get('x-goog-request-params', '')))
                fault = next((f for f in self.faults if f[0] == fn.__name__), None)
                if fault:
                    self.faults.remove(fault)
                    if fault[3:]: fn(request, context)
                    context.abort(getattr(grpc.StatusCode, fault[1]), fault[2])
                return fn(request, context)
            return grpc.unary_unary_rpc_method_handler(call, request_deserializer=asks.deserialize, response_serializer=answers.serialize)
        service = dict(CreateCustomJob=method(self.create, v1.CreateCustomJobRequest, v1.CustomJob), GetCustomJob=method(self.get, v1.GetCustomJobRequest, v1.CustomJob),
                       ListCustomJobs=method(self.list, v1.ListCustomJobsRequest, v1.ListCustomJobsResponse))
        self.server = grpc.server(futures.ThreadPoolExecutor(2))
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler('google.cloud.aiplatform.v1.JobService', service),))
        self.host = f'127.0.0.1:{self.server.add_insecure_port("127.0.0.1:0")}'
        self.server.start()

    def create(self, request, context):
        job = request.custom_job
        m = re.fullmatch('projects/([^/]+)/locations/([^/]+)', request.parent)
        pools = job.job_spec.worker_pool_specs
        wrong = next((text for bad, text in (
            (not m, 'parent'), (not job.display_name, 'display_name'), (not pools, 'worker_pool_specs'), (pools and pools[0].replica_count != 1, 'the first pool is one machine'),
            (any(not p.container_spec.image_uri for p in pools), 'image_uri'), (any(not p.machine_spec.machine_type for p in pools), 'machine_type'),
            (any(bool(p.machine_spec.accelerator_type) != bool(p.machine_spec.accelerator_count) for p in pools), 'accelerator_count'),
            (not job.job_spec.base_output_directory.output_uri_prefix.startswith('gs://'), 'output_uri_prefix')) if bad), None)
        if wrong: context.abort(self.grpc.StatusCode.INVALID_ARGUMENT, wrong)
        job.name, job.state = f'{request.parent}/customJobs/{len(self.jobs) + 1}', self.v1.JobState.JOB_STATE_QUEUED
        self.jobs[job.name] = job
        return job

    def get(self, request, context):
        if request.name not in self.jobs: context.abort(self.grpc.StatusCode.NOT_FOUND, f'{request.name} is not found.')
        job = self.jobs[request.name]
        job.state = getattr(self.v1.JobState, f'JOB_STATE_{self.states.pop(0) if len(self.states) > 1 else self.states[0]}')
        if job.state.name == 'JOB_STATE_FAILED': job.error.code, job.error.message = 3, self.error
        return job

    def list(self, request, context):
        name = re.fullmatch('display_name="(.*)"', request.filter)[1]
        return self.v1.ListCustomJobsResponse(custom_jobs=[j for j in self.jobs.values() if j.display_name == name])

    def __enter__(self): return self
    def __exit__(self, *exc): self.server.stop(None)


base = ['--project-id', 'my-project', '--region', 'europe-west4', '--bucket', 'my-bucket', '--config', 'xlarge', '--image-uri', 'gcr.io/my-project/saxgpt:1',
        '--machine-type', 'n1-standard-16', '--accelerator-type', 'NVIDIA_TESLA_V100', '--accelerator-count', '4', '--every', '0.05']
data = ['data.train_path=gs://my-bucket/train.safetensors', 'data.val_path=null']


def started(fake, *args, **more):
    "The command, with Ctrl-C at work even where a shell has switched it off. No `preexec_fn`: that forks, and the fake's gRPC, whose threads live here, would speak up in the fork"
    code = 'import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); runpy.run_module("saxgpt.vertex", run_name="__main__", alter_sys=True)'
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=client | dict(VERTEX_EMULATOR_HOST=fake.host if fake else '127.0.0.1:1') | more)


def vertex(fake, *args, **more):
    p = started(fake, *args, **more)
    out, err = p.communicate(timeout=600)
    return p.returncode, out, err


def one_line(err): return err.startswith('saxgpt: ') and err.strip().count('\n') == 0


def test_a_job_is_asked_for_and_followed_to_its_end():
    with FakeVertex(['PENDING', 'RUNNING', 'RUNNING', 'SUCCEEDED'], faults=[('get', 'UNAVAILABLE', 'the server restarts')]) as fake:
        status, out, err = vertex(fake, *base, '--spot', '--replicas', 3, '--labels', 'team=jazz', '--env', 'NCCL_DEBUG=INFO', '--service-account', 'sax@my-project.iam.gserviceaccount.com',
                                  *data, 'training.batch_size=2')
        assert status == 0 and one_line(err) and 'CUDA=cu126' in err, err         # a V100
        assert [l[9:] for l in out.splitlines() if re.match(r'\d\d:\d\d:\d\d ', l)] == ['no answer (ServiceUnavailable); asking on', 'PENDING', 'RUNNING', 'SUCCEEDED']
        assert 'europe-west4/training/1?project=my-project' in out and 'gs://my-bucket/models/xlarge/checkpoints' in out
        (name, job), = fake.jobs.items()
        assert name == 'projects/my-project/locations/europe-west4/customJobs/1' and fake.asked[0] == ('create', 'parent=projects/my-project/locations/europe-west4')
        spec = job.job_spec
        assert [p.replica_count for p in spec.worker_pool_specs] == [1, 2] and dict(job.labels) == {'team': 'jazz'}
        for pool in spec.worker_pool_specs:
            m, c = pool.machine_spec, pool.container_spec
            assert (m.machine_type, m.accelerator_type.name, m.accelerator_count) == ('n1-standard-16', 'NVIDIA_TESLA_V100', 4)
            assert c.image_uri == 'gcr.io/my-project/saxgpt:1' and list(c.command) == ['python', '-m', 'saxgpt.train'] and (c.env[0].name, c.env[0].value) == ('NCCL_DEBUG', 'INFO')
            assert c.args[:2] == ['--config', 'xlarge'] and 'training.batch_size=2' in c.args and 'training.output_dir="gs://my-bucket/models/xlarge"' in c.args
        s = spec.scheduling
        assert (s.strategy.name, s.restart_job_on_worker_restart, s.disable_retries) == ('SPOT', True, False)
        assert spec.service_account == 'sax@my-project.iam.gserviceaccount.com' and spec.base_output_directory.output_uri_prefix == 'gs://my-bucket/models/xlarge'


def test_a_job_that_fails_says_why():
    why = 'The replica workerpool0-0 exited with a non-zero status of 1.\nTo find out more, see its log.'
    with FakeVertex(['RUNNING', 'FAILED'], error=why) as fake: status, out, err = vertex(fake, *base, '--no-restart', *data)
    assert status == 1 and 'failed: ' + why.replace('\n', ' ') in err and 'RUNNING' in out and 'Traceback' not in err
    job, = fake.jobs.values()
    assert (job.job_spec.scheduling.strategy.name, job.job_spec.scheduling.disable_retries, len(job.job_spec.worker_pool_specs)) == ('STANDARD', True, 1)


@pytest.mark.parametrize('code, text, says', [
    ('PERMISSION_DENIED', "Permission 'aiplatform.customJobs.create' denied on resource.\nmore", 'ask for the role Vertex AI User'),
    ('RESOURCE_EXHAUSTED', 'The following quota metrics exceed quota limits: custom_model_training_nvidia_v100_gpus', 'not enough quota'),
    ('INVALID_ARGUMENT', 'Machine type "n1-standard-16" does not support 4 accelerators.', 'Vertex AI refuses this'),
    ('UNAUTHENTICATED', 'Request had invalid authentication credentials.', 'gcloud auth application-default login')])
def test_a_refusal_is_one_line(code, text, says):
    with FakeVertex(faults=[('create', code, text)]) as fake: status, out, err = vertex(fake, *base, *data)
    assert status == 2 and one_line(err) and says in err and 'my-project in europe-west4' in err, err
    assert not fake.jobs


@pytest.mark.parametrize('done', [True, False], ids=['arrived', 'lost'])
def test_a_lost_answer_starts_one_job(done):
    with FakeVertex(faults=[('create', 'UNAVAILABLE', 'connection reset', *[True]*done)]) as fake: status, out, err = vertex(fake, *base, *data)
    assert status == 0 and len(fake.jobs) == 1 and 'asking again' in err
    assert [a for a, _ in fake.asked if a != 'get'] == ['create', 'list'] + ['create']*(not done)


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_follow_it():
    with FakeVertex(['RUNNING']) as fake:
        p = started(fake, *base, '--accelerator-type', 'NVIDIA_L4', *data)
        while p.poll() is None and 'get' not in [a for a, _ in fake.asked]: time.sleep(.02)
        time.sleep(.3)
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=600)
        assert p.returncode == 130 and one_line(err) and 'the job goes on' in err, err
        again = re.search(r'saxgpt.vertex (--job \S+);', err)[1].split()
        fake.states = ['RUNNING', 'SUCCEEDED']
        status, out, err = vertex(fake, *again, '--every', .05)
        assert (status, err, len(fake.jobs)) == (0, '', 1) and 'SUCCEEDED' in out
        status, out, err = vertex(fake, '--job', 99, '--project-id', 'my-project')
        assert status == 2 and one_line(err) and 'there is no such thing' in err


@pytest.mark.parametrize('args, says', [
    (['--region', 'us-central1-a'], 'the region is us-central1'), (['--accelerator-type', 'NVIDIA_TESLA_V1000'], 'did you mean NVIDIA_TESLA_V100'),
    (['--accelerator-count', '0'], 'at least 1'), (['--bucket', 'gs://Bad'], '--bucket'), (['--image-uri', ''], '--image-uri: missing'), (['--config', 'huge'], 'huge'),
    (['data.train_path=data/train.safetensors'], '--upload-data'), (['data.train_path=s3://b/t.safetensors'], 'gs://'), (['--job', 'x'], '--job')])
def test_a_mistake_is_one_line_and_nothing_is_sent(args, says):
    status, out, err = vertex(None, *base, *data, *args)
    assert status == 2 and one_line(err) and says in err, err


def test_a_dry_run_needs_no_library_and_a_job_does():
    code = "import sys, runpy; sys.modules['google.cloud.aiplatform_v1'] = None; sys.argv = ['vertex', *sys.argv[1:]]; runpy.run_module('saxgpt.vertex', run_name='__main__')"
    runs = [subprocess.run([sys.executable, '-c', code, *base, *data, *more], env=env, capture_output=True, text=True) for more in (['--dry-run'], [])]
    assert runs[0].returncode == 0 and 'strategy: STANDARD' in runs[0].stdout and '&id' not in runs[0].stdout
    assert runs[1].returncode == 2 and one_line(runs[1].stderr) and "pip install 'saxgpt[vertex]'" in runs[1].stderr


# its machines

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def cluster_env(port, node, nodes=2):
    pools = dict(workerpool0=[f'127.0.0.1:{port}'], workerpool1=[f'127.0.0.{i + 2}:{port}' for i in range(nodes - 1)])
    task = dict(type='workerpool0' if node == 0 else 'workerpool1', index=max(0, node - 1))
    return dict(CLUSTER_SPEC=json.dumps(dict(cluster=pools, environment='cloud', task=task)), RANK=str(node), WORLD_SIZE=str(nodes))     # as Vertex AI has them


def take_away(pid):
    "Kill a machine: its launcher and the processes of that, which have sessions of their own, and none of them hears of it before."
    family = [pid]
    for p in family: family += [int(c) for t in Path(f'/proc/{p}/task').glob('*') for c in (t/'children').read_text().split()]
    for p in reversed(family): os.kill(p, signal.SIGKILL)


def on_machines(command, tmp_path, **more):
    "Run a container's command on two machines; gives what they said and how they ended."
    port, logs = free_port(), [tmp_path/f'machine{i}.log' for i in range(2)]
    machines = [subprocess.Popen(command, env=machine | cluster_env(port, i) | more, stdout=open(log, 'w'), stderr=subprocess.STDOUT, cwd=tmp_path, start_new_session=True) for i, log in enumerate(logs)]
    return machines, logs


def test_two_machines_train_one_model_and_one_is_taken_away(tmp_path):
    "All of it: the command uploads the data and asks for a job; the job's own command line runs as two machines, one bucket between them, and again as two new ones."
    pytest.importorskip('gcsfs')
    out = tmp_path/'run'
    toy_data(tmp_path/'data')
    config = config_file(tmp_path/'data', out, num_epochs=8)
    with FakeGCS('my-bucket') as gcs, FakeVertex() as fake:
        where = dict(STORAGE_EMULATOR_HOST=gcs.url)
        for again in (0, 1):
            status, said, err = vertex(fake, *base, *config, '--replicas', 2, '--upload-data', **where)
            assert status == 0, err
            assert said.count('uploading') == 2*(not again), said                  # known by their content the second time
        job = fake.jobs['projects/my-project/locations/europe-west4/customJobs/1']
        c = job.job_spec.worker_pool_specs[1].container_spec
        command = [sys.executable, *c.command[1:], *c.args]
        machines, logs = on_machines(command, tmp_path, SAXGPT_CACHE=str(tmp_path/'disk1'), **where)
        while 'models/run/checkpoints/last.json' not in gcs.keys('my-bucket') and all(m.poll() is None for m in machines): time.sleep(.02)
        take_away(machines[1].pid)
        assert machines[0].wait(600) == 1 and 'lost another process' in logs[0].read_text() and 'Traceback' not in logs[0].read_text(), logs[0].read_text()
        machines, logs = on_machines(command, tmp_path, SAXGPT_CACHE=str(tmp_path/'disk2'), **where)
        assert [m.wait(180) for m in machines] == [0, 0], [l.read_text() for l in logs]
        runs = [l for l in map(json.loads, gcs.data('my-bucket', 'models/run/metrics.jsonl').splitlines()) if l['split'] == 'run']
    assert {r['processes'] for r in runs if 'processes' in r} == {2} and not out.exists()
    assert [r['event'] for r in runs] == ['start', 'resume', 'finish'] and runs[1]['step'] > 0, runs


def dies(how):
    "Rank 1 dies while the others wait for it."
    with joined('cpu') as world:
        total(_one())
        if world.rank == 1:
            if how == 'raise': raise ValueError('rank 1 has had enough')
            if how == 'exit': os._exit(7)
            os.kill(os.getpid(), signal.SIGKILL)
        total(_one())


def _one():
    import torch
    return torch.ones(1)


def dies_once(flag):
    with joined('cpu') as world:
        total(_one())
        if world.rank == 1 and not os.path.exists(flag):
            open(flag, 'w').close()
            os.kill(os.getpid(), signal.SIGKILL)
        return world.rank, total(_one()).item()


@pytest.mark.parametrize('how, says', [('kill', 'ended by SIGKILL'), ('raise', 'rank 1 has had enough'), ('exit', 'ended with status 7')])
def test_one_dead_process_ends_all_with_its_own_error(monkeypatch, how, says):
    for k, v in warm(*training).items(): monkeypatch.setenv(k, v)
    began = time.monotonic()
    with pytest.raises(ProcessError) as e: launch(dies, (how,), 3)
    assert str(e.value).startswith(f'process 1: {says}') and e.value.rank == 1, e.value
    assert time.monotonic() - began < 30


@pytest.mark.parametrize('how, says', [('kill', 'Signal 9 (SIGKILL)'), ('raise', 'ValueError: rank 1 has had enough')])
def test_torchrun_names_the_dead_process(how, says):
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m', 'test_vertex', 'dies', how], env=machine, capture_output=True, text=True, timeout=90)
    assert r.returncode == 1
    cause = r.stderr.split('Root Cause')[1]
    assert 'rank      : 1 ' in cause and says in cause and 'PeerError' not in r.stderr, r.stderr


@pytest.mark.parametrize('more', [['--standalone'], ['--master-port=0', '--nnodes=1']], ids=['c10d', 'static'])
def test_torchrun_starts_all_again(tmp_path, more):
    "Torch 2.11 lets the new processes find the addresses of the dead; `rendezvous_id` does not."
    if more[0] != '--standalone': more[0] = f'--master-port={free_port()}'
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', *more, '--max-restarts=1', '--nproc_per_node=2', '-m', 'test_vertex', 'dies_once', str(tmp_path/'flag')],
                       env=machine, capture_output=True, text=True, timeout=90)
    assert r.returncode == 0 and '(0, 2.0)' in r.stdout and '(1, 2.0)' in r.stdout, r.stderr


@pytest.mark.parametrize('fn, arg, says', [
    ('dies', 'raise', ['process 0: lost another process', 'process 1: rank 1 has had enough']), ('dies', 'kill', ['process 0: lost another process', 'process 1: ended by SIGKILL']),
    ('dies_once', 'flag', ['(0, 2.0)', '(1, 2.0)'])], ids=['raise', 'kill', 'again'])
def test_one_dead_machine(tmp_path, fn, arg, says):
    machines, logs = on_machines([sys.executable, '-m', 'test_vertex', 'machine', fn, arg], tmp_path)
    for m in machines: m.wait(600)
    for log, text in zip(logs, says): assert text in log.read_text(), log.read_text()


def test_a_machine_that_never_comes(tmp_path):
    "The other one says so, and does not wait for ever."
    for node in (0, 1):
        r = subprocess.run([sys.executable, '-m', 'test_vertex', 'machine', 'dies_once', str(tmp_path/'flag')], env=machine | cluster_env(free_port(), node) | dict(SAXGPT_WAIT_S='3'),
                           capture_output=True, text=True, timeout=60)
        assert f'PeerError machine {node} of 2' in r.stdout and 'not all came within 3 s' in r.stdout, r.stdout + r.stderr


if __name__ == '__main__':                              # what the processes above are
    import test_vertex                                  # a function of __main__ could not be found by the processes
    from saxgpt.training.dist import cluster
    here = dict(dies=test_vertex.dies, dies_once=test_vertex.dies_once)
    if sys.argv[1] != 'machine': print(here[sys.argv[1]](sys.argv[2]))
    else:
        try: print(launch(here[sys.argv[2]], (sys.argv[3],), 1, *cluster(), max_restarts=sys.argv[2] == 'dies_once'))
        except (ProcessError, PeerError) as e: print(type(e).__name__, e)
