"""Every kernel once, for profilers and sanitizers.

    python benchmarks/gpu/once.py [--small] [--native] [--device cpu]

--small   what a sanitizer can do in a minute, odd sizes among it; else sizes that fill the chip, after matrix products
          that bring its clocks up
--native  CUDA C++ alone, without Triton
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import OPERATIONS, TRANSITIONS
from block_cases import OPERATIONS as BLOCK_OPERATIONS
from cases import Shape

import ralu_kernels

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--small", action="store_true")
parser.add_argument("--native", action="store_true")
parser.add_argument("--device", default="cuda")
args = parser.parse_args()
device, ran = torch.device(args.device), set()
with torch.no_grad():
    if not args.small:
        a = torch.randn(8192, 8192, device=device).bfloat16()
        for _ in range(10):
            a @ a
    for name, operation in OPERATIONS.items():
        if device.type not in operation.devices or name == "varlen_attention":  # whose kernels are not ours
            continue
        pixels, batch = (256, 3) if args.small else (1024, 1) if name in BLOCK_OPERATIONS else (2048, 16)
        for dtype in (torch.bfloat16, torch.float32) if name in TRANSITIONS else (torch.bfloat16,):
            case = operation.case(Shape("flux-dev", pixels, batch, dtype, device))
            for backend in case.backends:
                if backend == "native" or not args.native:
                    case.ours(backend)
                    ran.add(f"{name} {backend}")
                    if name == "upsample_renoise" and args.small:
                        odd = torch.randn(3, 3, 5, 7, device=device).to(dtype)
                        ralu_kernels.upsample_renoise(odd, 0.8, 0.4, 0.02, 1, backend=backend)
                    if name == "plan_tokens" and args.small:
                        scores = torch.rand(3, 35, device=device)
                        ralu_kernels.plan_tokens(scores, (5, 7), threshold=0.5, backend=backend)
if device.type == "cuda":
    torch.cuda.synchronize()
print("ONCE done:", ", ".join(sorted(ran)))
raise SystemExit(not ran)
