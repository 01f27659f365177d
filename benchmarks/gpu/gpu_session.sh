#!/usr/bin/env bash
# What fifteen minutes of a GPU should tell of this repository, in the order of its worth; README.md says how to prepare
# them. Run in the repository's root. Each step has a time limit and a log, and what is done is under $OUT even if a
# later step is cut off.
#
#   bash benchmarks/gpu/gpu_session.sh
#   STEPS="env build smoke" LIMIT=170 bash benchmarks/gpu/gpu_session.sh   # some steps, in so many seconds
#   DRY=1 bash benchmarks/gpu/gpu_session.sh                               # tiny shapes on a CPU, to see that it all runs
set -u
HERE=benchmarks/gpu
KIT=${KIT:-$PWD/build/gpu}                # what was prepared, if anything
OUT=${OUT:-$PWD/outputs/gpu/$(date +%Y%m%d-%H%M%S)}
PY=${PY:-python3}
[[ $PY == */* && $PY != /* ]] && PY=$PWD/$PY
DRY=${DRY:-}
LIMIT=${LIMIT:-${DRY:+3}570}              # seconds for all of it
STEPS=${STEPS:-"env build smoke roof steps tests e2e blocks bench ncu sanitize"}
DEVICE=cuda TINY=
[ -n "$DRY" ] && DEVICE=cpu TINY=--tiny
LOGS=$OUT/logs WORK=$(mktemp -d)
CACHE=${CACHE:-$PWD/outputs/gpu/cache}    # what the first part has compiled is there for the second
trap 'rm -rf "$WORK"' EXIT
mkdir -p "$LOGS" "$WORK/bin" "$WORK/build" "$CACHE/triton"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export TORCHINDUCTOR_CACHE_DIR=$CACHE/inductor TRITON_CACHE_DIR=$CACHE/triton
export PYTHONPATH=$PWD:$WORK/site${PYTHONPATH:+:$PYTHONPATH}

say() { echo "$*" | tee -a "$OUT/summary.txt"; }
chosen() { case " $STEPS " in *" $1 "*) true ;; *) false ;; esac; }

# step NAME SECONDS COMMAND...: its output into a log, its verdict into the summary. NAME.MORE belongs to step NAME.
step() {
  local name=$1 box=$2 start=$SECONDS rc; shift 2
  chosen "${name%%.*}" || return 0
  [ -n "$DRY" ] && box=$((8 * box))       # a busy CPU
  [ "$box" -gt $((LIMIT - SECONDS)) ] && box=$((LIMIT - SECONDS))
  if [ "$box" -lt 10 ]; then say "$name: not run, no time left"; return 0; fi
  timeout -k 5 "$box" "$@" >"$LOGS/$name.log" 2>&1; rc=$?
  say "$(printf '%-16s rc=%-3s %4ss of %4ss, until %4ss: ' "$name" $rc $((SECONDS - start)) "$box" $SECONDS)$(tail -n 1 "$LOGS/$name.log" | cut -c1-120)"
  # One file, where few can be taken along.
  tar -C "$OUT" --exclude=all.tar.gz -czf "$OUT/all.tar.gz" .
}

# Without a repository the rows of results get their commit from the kit: they ask `git describe` and `git diff`.
if ! git describe --always >/dev/null 2>&1; then
  printf '#!/bin/sh\ncase "$*" in *describe*) echo "%s";; esac\n' "$(cat "$KIT/COMMIT" 2>/dev/null || echo unknown)" >"$WORK/bin/git"
  chmod +x "$WORK/bin/git"
  PATH=$WORK/bin:$PATH
fi
say "commit $(git describe --always)"
if ls "$KIT"/*.whl >/dev/null 2>&1; then
  $PY -m pip install -q --no-index --no-deps --no-compile --target "$WORK/site" "$KIT"/*.whl >"$LOGS/pip.log" 2>&1 || say "pip: $(tail -n 1 "$LOGS/pip.log")"
fi
# Triton's cache of kernels compiled before, by the same release for the same GPU; of others it takes no notice.
[ -f "$KIT/triton.tar.xz" ] && tar -C "$TRITON_CACHE_DIR" -xJf "$KIT/triton.tar.xz"

# nvcc on the PATH may be a script that calls the toolkit's, beside which PyTorch would look for the libraries.
top=$(nvcc --dryrun -c x.cu 2>&1 | sed -n 's/^#\$ TOP=//p' | head -1)
[ -n "$top" ] && export CUDA_HOME=$(cd "$top" && pwd)

# The extension: a prepared one or the one that is here, unless it cannot be loaded or has no CUDA. Whether it can be
# built here is tried in the background, on cores that are idle.
build() {
  cp -r setup.py pyproject.toml README.md LICENSE NOTICE csrc ralu_kernels "$WORK/build" && cd "$WORK/build" && rm -f ralu_kernels/*.so &&
    RALU_NATIVE=1 RALU_CUDA=$([ -n "$DRY" ]; echo $?) timeout ${DRY:+1}150 $PY setup.py build_ext --inplace >"$LOGS/build.log" 2>&1
  echo "rc=$? after $SECONDS s" >>"$LOGS/build.log"
}
BUILDING=
chosen build && { build & BUILDING=$!; }
built() { [ -n "$BUILDING" ] && wait "$BUILDING" && say "build            $(tail -n 1 "$LOGS/build.log")"; BUILDING=; }
loads() { $PY -c "import torch, ralu_kernels.ralu_kernels_C as c; raise SystemExit(not (c.cuda or '$DRY'))" >>"$LOGS/load.log" 2>&1; }

step env 40 bash -c '
  nvidia-smi; nvidia-smi -q -d CLOCK | head -40; nproc; lscpu | grep -E "Model name|MHz"; c++ --version | head -1
  for tool in nvcc ncu compute-sanitizer git ninja; do echo "$tool: $(command -v $tool || echo absent)"; done
  "$0" -c "
import os, sysconfig, torch, triton, transformers, diffusers
from torch.utils.cpp_extension import CUDA_HOME
print(\"Python.h\", os.path.exists(sysconfig.get_path(\"include\") + \"/Python.h\"), \"CUDA_HOME\", CUDA_HOME)
print(*(f\"{x.__name__} {x.__version__}\" for x in (torch, triton, transformers, diffusers)),
      torch.cuda.get_device_name() if torch.cuda.is_available() else \"no GPU\")"' "$PY"

[ -f "$KIT/ralu_kernels_C.abi3.so" ] && cp "$KIT/ralu_kernels_C.abi3.so" ralu_kernels/
if ! loads; then
  built
  cp "$WORK"/build/ralu_kernels/*.so ralu_kernels/ 2>/dev/null
  loads || say "no extension with CUDA C++ is to be had: it stays untested"
fi

step smoke 120 $PY $HERE/smoke.py --device $DEVICE
step roof 75 $PY $HERE/probe.py roof host kernels --device $DEVICE $TINY --csv "$OUT/kernels.csv"
step steps 80 $PY $HERE/probe.py step --device $DEVICE $TINY --csv "$OUT/steps.csv"
PYTEST="$PY -m pytest -q -p no:cacheprovider -o addopts=--strict-markers"
if [ -z "$DRY" ]; then  # the suite's GPU half; caches of compiled kernels are shared by the processes
  step tests 120 $PYTEST -n 8 -m "(triton or native or gpu) and not exhaustive" --continue-on-collection-errors --maxfail=30 --durations=8 \
    tests/test_{upsample,tokens,random,edges,adaln,qkv,blocks}.py
  step tests.attention 45 $PYTEST -n 4 tests/test_attention.py
  step e2e 120 $PY benchmarks/e2e.py --models flux-dev --batch 1 --repeats 2 --output "$OUT/e2e.csv" \
    --methods stock-50 flux-5x flux-7x --fused no yes
  step blocks 100 $PY benchmarks/blocks.py --tokens 4096 1024 --budget 0.5 --minutes 1 --output "$OUT/blocks.csv"
  step bench 60 $PY benchmarks/bench.py --budget 0.05 --minutes 0.6 --output "$OUT/bench.csv" \
    --providers eager reference native triton fill sdpa varlen
  NCU=$(command -v ncu || ls /opt/nvidia/nsight-compute/*/ncu 2>/dev/null | tail -1)
  METRICS=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
  for share in dram__throughput.avg.pct_of_peak_sustained_elapsed {smsp__issue,sm__warps}_active.avg.pct_of_peak_sustained_active \
    sm__inst_executed_pipe_{alu,fma,xu}.avg.pct_of_peak_sustained_active \
    smsp__average_warps_issue_stalled_{no_instruction,long_scoreboard}_per_issue_active.ratio; do METRICS+=,$share; done
  step ncu 60 "${NCU:-ncu}" --clock-control none --metrics $METRICS --csv \
    -k regex:"^(_?(upsample|plan)|_(adaln|concat|pack|unpack)|classify|link|resolve|flag)_" $PY $HERE/once.py
  step sanitize 60 compute-sanitizer --tool memcheck --error-exitcode 9 $PY $HERE/once.py --small
  step sanitize.race 45 compute-sanitizer --tool racecheck --error-exitcode 9 $PY $HERE/once.py --small --native
else
  step tests 60 $PYTEST -m native tests/test_upsample.py
  step e2e 120 $PY benchmarks/e2e.py --device cpu --models mini-flux --methods stock-3 flux-7x --pixels 64 --batch 1 --repeats 1 \
    --output "$OUT/e2e.csv"
  step blocks 100 $PY benchmarks/blocks.py --dry --output "$OUT/blocks.csv"
  step bench 60 $PY benchmarks/bench.py --device cpu --pixels 256 --batch 1 --dtypes float32 --budget 0 --threads 1 \
    --minutes 5 --ops upsample_renoise upsample_selected --providers eager native --output "$OUT/bench.csv"
  step sanitize 60 $PY $HERE/once.py --device cpu --small
fi
built

echo "---- all numbers"
for part in smoke roof steps blocks e2e; do grep -hE '^(FAIL|roof|kernels|host|step|flux-dev|mini-flux) ' "$LOGS/$part.log" 2>/dev/null; done
echo "---- $((LIMIT - SECONDS)) s left; everything is in $OUT"
cat "$OUT/summary.txt"
! grep -qE 'rc=[1-9]|not run' "$OUT/summary.txt"
