"""The whole CPU set, then the page: ``python benchmarks/micro/run.py``. Keep the machine free of other work while it runs."""

import torch

import growth
import latency
import report
import step

if __name__ == "__main__":
    threads = torch.get_num_threads()
    latency.main([])
    torch.set_num_threads(threads)
    growth.training()
    growth.factorize()
    step.main([])
    report.main()
