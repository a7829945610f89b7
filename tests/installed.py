"""What `make release` runs on the wheel, installed into a folder: the package that is imported is that one, and whole."""

import sys
import tempfile
from pathlib import Path

import torch

import spectrim as sp

assert Path(sp.__file__).is_relative_to(Path("installed").resolve()), sp.__file__
model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
data = [(torch.randn(16, 32), torch.randint(4, (16,)))]
made = sp.compress(model, data, torch.nn.CrossEntropyLoss(), 0.7, cut="plain", progress=False)
with tempfile.TemporaryDirectory() as folder:
    page = sp.write_report(sp.plan(model, data[0][0], budgets=[0.7]), Path(folder) / "plan.html")
    assert "knapsack" in page.read_text(encoding="utf-8")
assert not any(name.startswith("tests") for name in sys.modules)
print(f"spectrim {sp.__version__} works from its wheel: {made.verdict.size}")
