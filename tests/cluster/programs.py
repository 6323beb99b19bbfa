"""Programs that the tests start as ranks.

Those that open a gloo group leave by os._exit: torch 2.13 can abort an interpreter that is taken down after one.
"""

SLEEP = """
import os, signal, subprocess, sys, time
helper = subprocess.Popen(["sleep", "1000"], start_new_session="apart" in sys.argv)
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.write(10, b'{"event": "step", "step": 412}\\n')
print("ready", flush=True)
time.sleep(1000)
"""
DDP = """
import os, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1, bias=False))
step = 0
while step < int(sys.argv[1]):
    model(torch.full((1, 2), float(dist.get_rank()))).sum().backward()
    step += 1
    if step == 1:
        print("ready", flush=True)
    time.sleep(0.01)
total = torch.ones(1)
dist.all_reduce(total)
print("sum", int(total), "cwd", os.getcwd(), "store", os.environ["MASTER_ADDR"], flush=True)
dist.destroy_process_group()
os._exit(0)
"""
ACCELERATE = """
import os, torch
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
model, optimizer = torch.nn.Linear(2, 1), None
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = torch.utils.data.DataLoader(torch.arange(12.0).reshape(6, 2), batch_size=1)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
seen = 0
for batch in data:
    optimizer.zero_grad()
    accelerator.backward(model(batch).sum())
    optimizer.step()
    seen += 1
print("ranks", accelerator.num_processes, "seen", int(accelerator.reduce(torch.tensor(seen), "sum")), flush=True)
accelerator.end_training()
os._exit(0)
"""
HOG = """
import os, time
if os.environ["RANK"] == "1":
    os.write(10, b'{"event": "step", "step": 412}\\n')
    held = []
    while True:
        held.append(bytearray(os.urandom(1 << 20) * 8))
time.sleep(1000)
"""
LOADERS = """
import os, torch
class Where(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, index): return torch.tensor(sorted(os.sched_getaffinity(0)))
if __name__ == "__main__":
    seen = {tuple(row.tolist()) for row in torch.utils.data.DataLoader(Where(), batch_size=None, num_workers=2)}
    print("loaders", sorted(seen), "rank", sorted(os.sched_getaffinity(0)), flush=True)
"""
DEEPSPEED = """
import os, deepspeed, torch, torch.distributed as dist
deepspeed.init_distributed(dist_backend="gloo")
model = torch.nn.Linear(4, 1)
config = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
for _ in range(2):
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
print("ranks", dist.get_world_size(), "steps", engine.global_steps, flush=True)
dist.destroy_process_group()
os._exit(0)
"""
