#!/usr/bin/env bash
# All that only a GPU can show, in one command and under 9 minutes: build, gpu tests, compute-sanitizer, benchmark.
#
#   benchmarks/gpu_check.sh --out DIR [--quick] [--dry-run]
#
# Needs no network: the system's python3 (PYTHON names another) with torch, pytest, NumPy; nvcc of torch's CUDA major.
# Writes into DIR: log.txt, summary.json, junit.xml, bench.json (bench.json.partial where it was cut off).
# --dry-run stops before the first CUDA call: finds or makes the build, collects the gpu tests, runs the scripts on the
# CPU or imports them. Without a GPU that is all that happens. A step that fails does not stop the next ones.
# Exit code: 0 all well, 1 a step failed, 2 wrong usage, 3 no GPU.
set -uo pipefail

usage() {
  echo "usage: benchmarks/gpu_check.sh --out DIR [--quick] [--dry-run]$1" >&2
  exit 2
}

out='' quick='' dry=''
while [ $# -gt 0 ]; do
  case $1 in
    --out) [ $# -ge 2 ] || usage ": --out needs a folder"; out=$2; shift ;;
    --quick) quick=--quick ;;
    --dry-run) dry=yes ;;
    *) usage ": unknown option $1" ;;
  esac
  shift
done
[ -n "$out" ] || usage ": --out is missing"
mkdir -p "$out" 2>/dev/null || usage ": cannot make the folder $out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2

python=${PYTHON:-python3}
total=510   # seconds for everything; 30 more are left to the killing of what hangs
reserve=0   # seconds that later steps are promised
log=$out/log.txt
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
steps=$scratch/steps.tsv
: >"$log"
: >"$steps"
rm -f "$out"/{summary.json,junit.xml,bench.json,bench.json.partial}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
MAX_JOBS=${MAX_JOBS:-$(nproc)}
export MAX_JOBS

skip() { # step, reason
  printf '%s\t-1\t0\t0\n' "$1" >>"$steps"
  printf '== %s: skipped, %s\n' "$1" "$2" | tee -a "$log"
}

step() { # name, most seconds, command...
  local name=$1 limit=$2 began=$SECONDS rc
  shift 2
  local left=$((total - SECONDS - reserve))
  if [ "$left" -lt "$limit" ]; then limit=$left; fi
  if [ "$limit" -lt 5 ]; then
    skip "$name" "no time left"
    return 0
  fi
  printf '== %s (at most %d s)\n' "$name" "$limit" | tee -a "$log"
  printf '$ %s\n' "$*" >>"$log"
  timeout -k 5 "$limit" "$@" >"$scratch/output" 2>&1 </dev/null
  rc=$?
  # A megabyte from each end of what a step says: the log stays small whatever happens.
  if [ "$(wc -c <"$scratch/output")" -le 2000000 ]; then
    cat "$scratch/output" >>"$log"
  else
    { head -c 1000000 "$scratch/output"; printf '\n[...]\n'; tail -c 1000000 "$scratch/output"; } >>"$log"
  fi
  printf '%s\t%d\t%d\t%d\n' "$name" "$rc" $((SECONDS - began)) "$limit" >>"$steps"
  if [ "$rc" -ne 0 ]; then
    printf '   exit code %d; its last lines:\n' "$rc"
    tail -n 15 "$scratch/output" | cut -c 1-200 | sed 's/^/   | /'
  fi
  return "$rc"
}

finish() { # exit code to use where no step failed
  local rc
  echo
  "$python" benchmarks/gpu_summary.py "$out" "$steps" "gpu=$gpu" "seconds=$SECONDS" "quick=${quick:+yes}" \
    "dry_run=${dry:+yes}" | tee -a "$log"
  rc=${PIPESTATUS[0]}
  if [ "$rc" -eq 0 ]; then rc=$1; fi
  exit "$rc"
}

# Asking for the number of devices through the driver's tool is no CUDA call of ours.
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
case $capability in [0-9]*.[0-9]*) export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} ;; esac

# Only files with such tests: others may need packages that a bare machine has not.
gpu_tests=$(grep -l 'mark\.gpu' tests/test_*.py)

built() { "$python" -c 'import bsgap_kernels, bsgap_kernels._core' >"$scratch/built" 2>&1; }
build() { step build 170 "$python" setup.py build_ext --inplace; }

if [ -n "$dry" ] || [ -z "$gpu" ]; then
  if built; then skip build "found one that loads"; else build; fi
  step "collect gpu tests" 90 "$python" -m pytest -q --collect-only -m gpu -p no:cacheprovider $gpu_tests
  step "sanitizer script, cpu" 90 "$python" benchmarks/gpu_sanitize.py --device cpu --small
  step "import benchmark" 60 "$python" -c 'import bsgap_kernels.bench.cuda.run'
  step "roofline" 60 "$python" -m bsgap_kernels.bench.roofline_report --model resnet56 --batch 8192 --device h200
  if [ -z "$gpu" ]; then
    dry=yes
    echo "gpu_check: no GPU here (nvidia-smi names none), so this was a dry run: nothing was measured." | tee -a "$log"
    finish 3
  fi
  echo "gpu_check: dry run on $gpu, stopped before the first CUDA call." | tee -a "$log"
  finish 0
fi

echo "gpu_check: $gpu" | tee -a "$log"
nvidia-smi >>"$log" 2>&1
reserve=250 build
reserve=250 step "gpu tests" 110 "$python" -m pytest -q -m gpu -p no:cacheprovider -o junit_family=xunit1 \
  --junitxml="$out/junit.xml" $gpu_tests
# The benchmark before the sanitizers: it must get its time even where a build took long.
reserve=90 step benchmark 240 "$python" -m bsgap_kernels.bench --device cuda --json "$out/bench.json" \
  --time-limit 150 $quick
# Training steps with and without tracking: eager and compiled, as far as the time goes.
for batch in 1024 8192; do
  for compiled in "" --compile; do
    reserve=30 step "overhead $batch ${compiled:-eager}" 60 "$python" -m bsgap_kernels overhead --device cuda --model resnet56 \
      --batch "$batch" --budget 4 $compiled --json "$out/overhead-$batch${compiled:+-compiled}.json"
  done
done

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
for tool in memcheck racecheck synccheck initcheck; do
  if [ -z "$sanitizer" ]; then
    skip "$tool" "no compute-sanitizer on PATH"
    continue
  fi
  small=--small # the other tools slow every launch down much more
  if [ "$tool" = memcheck ]; then small=; fi
  # Without torch's caching every tensor is an allocation of its own, whose bounds the tool knows.
  reserve=0 step "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 \
    --print-limit 20 "$python" benchmarks/gpu_sanitize.py $small
done
finish 0
