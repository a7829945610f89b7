"""What `compress` without training costs, in processor seconds and peak memory: ``python benchmarks/micro/calibration.py CASE...``.

Cases: ``crepe``, the shape of an audio network (six convolutions with 64 taps, of which the second is 16 x 8192), 48 examples;
``resnet8``, 512 images; ``resnet18`` at 224, 64 random images. Each runs in a process of its own; peak memory is that of the whole process,
torch included. With ``--source FOLDER`` it measures another checkout's ``src``, and writes its commit.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from harness import ROOT, write

WORK = """
import json, resource, sys, time
import torch
from torch import nn
from torch.nn import functional as F
torch.set_num_threads(1)
torch.manual_seed(0)
import spectrim as sp
from spectrim import zoo


class Audio(nn.Module):
    def __init__(self):
        super().__init__()
        widths = [1, 128, 16, 16, 16, 32, 64]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, (512 if i == 0 else 64, 1), (4 if i == 0 else 1, 1)) for i, (a, b) in enumerate(zip(widths, widths[1:]))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.classifier = nn.Linear(256, 360)

    def forward(self, x):
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = F.pad(x, (0, 0, 254, 254) if i == 0 else (0, 0, 31, 32))
            x = F.max_pool2d(norm(torch.relu(conv(x))), (2, 1), (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).reshape(len(x), -1))


case, scheme = sys.argv[1], "auto"
if case == "crepe":
    model, examples = Audio().eval(), 48
    data = [(torch.randn(16, 1, 1024, 1), torch.randint(360, (16,))) for _ in range(3)]
elif case == "resnet18":
    from networks import resnet18
    model, examples = resnet18().eval(), 64
    data = [(torch.randn(16, 3, 224, 224), torch.randint(1000, (16,))) for _ in range(4)]
else:
    model, examples, scheme = zoo.mlperftiny_resnet8(pretrained=True).eval(), 512, "spatial"
    batches = iter(zoo.cifar10(batch_size=128, normalize="raw", augment=False).train)
    data = [next(batches) for _ in range(4)]
start = time.process_time()
sp.compress(model, data, nn.CrossEntropyLoss(), sp.Budget(macs=0.5), scheme=scheme, examples=examples, progress=False)
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", default=["crepe", "resnet8", "resnet18"])
    parser.add_argument("--source", type=Path, default=ROOT)
    given = parser.parse_args()
    rows = {}
    paths = f"{given.source / 'src'}{os.pathsep}{ROOT / 'benchmarks' / 'micro'}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "JAXTYPING_DISABLE": "1"}
    for case in given.cases:
        done = subprocess.run([sys.executable, "-c", WORK, case], env=environment, capture_output=True, text=True, check=True)
        rows[case] = json.loads(done.stdout.splitlines()[-1])
        print(case, rows[case], flush=True)
    measured = subprocess.run(
        ["git", "-C", str(given.source), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    name = "calibration" if given.source == ROOT else f"calibration-{measured[:7]}"
    write(name, {"kind": "calibration", "measured": measured, "load": os.getloadavg()[0], "rows": rows})


if __name__ == "__main__":
    main()
