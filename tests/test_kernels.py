"Machine code of the decoding kernels, kept from process to process."
import os
import subprocess
import sys

code = '''
import torch
from saxgpt.config import ModelConfig
from saxgpt.model.decoding import KERNELS_PAY, cpu_step
from saxgpt.model.transformer import SaxGPT
model = SaxGPT(ModelConfig(d_model=32, nhead=4, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=64)).eval()
codes = torch.ones(1, 4, dtype=torch.long)
with torch.inference_mode():
    memory = model.encode(codes[..., None].expand(-1, -1, 9))
    a, b = (model.init_cache(memory, KERNELS_PAY) for _ in range(2))
    step = cpu_step(model, a)
    print(type(step).__name__, (step(codes, 0) - model.decode_step(codes, 0, b)).abs().max().item() < 1e-5)
'''


def play(folder, processes=1):
    env = {**os.environ, 'NUMBA_CACHE_DIR': str(folder)}
    started = [subprocess.Popen([sys.executable, '-c', code], env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(processes)]
    for p in started:
        out, err = p.communicate()
        assert (p.returncode, out.split(), err) == (0, ['KernelStep', 'True'], '')


def test_kernels_are_kept_by_processes_at_once_and_mended(tmp_path):
    play(tmp_path, processes=2)
    files = {f: f.stat().st_mtime_ns for f in tmp_path.rglob('*.nb[ic]')}
    play(tmp_path)
    assert files and files == {f: f.stat().st_mtime_ns for f in tmp_path.rglob('*.nb[ic]')}
    for f in files: f.write_bytes(b'no machine code'*(f.suffix == '.nbi'))
    play(tmp_path)
    assert all(f.stat().st_size > 100 for f in files)
