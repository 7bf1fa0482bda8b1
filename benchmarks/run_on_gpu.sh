#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash benchmarks/run_on_gpu.sh [MINUTES] [OUT]

Builds illada on this machine, runs its CUDA tests, compute-sanitizer and the benchmarks, and leaves the numbers in a
folder. Needs an NVIDIA GPU, nvcc, cmake, ninja, and a Python with torch, pybind11, setuptools and pytest; no network,
no root. The checkout is only read, and nothing stays behind but OUT. Attention is compared with fa3-fwd and
flash-attn-4 as well, and the loss with liger-kernel, cut-cross-entropy and quack-kernels, where the Python has them.
The last benchmarks are training steps of 8e9 parameters, which take 40 to 80 GB, and scoring.

  MINUTES  for everything, build included (default 10). What does not fit is left out and listed.
  OUT      folder for the results (default runs/gpu); files of an earlier run are replaced.

  OUT/summary.md      start here: tests, sanitizer, what was left out, table of results, goals met and missed, peers
                      that did not run and why
  OUT/results.jsonl   one line for each case, provider and way of timing (python -m benchmarks.report reads it)
  OUT/machine.txt     GPU, driver, clocks, versions, commit, date
  OUT/build.log  OUT/tests.log  OUT/sanitizer.log  OUT/benchmarks.log

Exit status: 0 all ran or was left out for lack of time; 1 a test, the sanitizer or a benchmark failed; 2 something is
missing or the build failed. A missed goal is no failure: the summary says so.

Environment:
  PYTHON          the Python to use (default python3)
  CUDACXX         the nvcc to use (default: on PATH, else /usr/local/cuda/bin/nvcc)
  ILLADA_COMMIT   what to call the commit where the checkout has no .git

examples:
  bash benchmarks/run_on_gpu.sh                            # ten minutes, into runs/gpu
  bash benchmarks/run_on_gpu.sh 30 out >out.log 2>&1
  python -m benchmarks remask --only "step 128"            # one case by hand, with an installed illada
  python -m benchmarks attention --direction bwd           # what this script leaves out: gradients,
  python -m benchmarks loss --only 2048x --spread 8        # other heads, logits as after training,
  python -m benchmarks train-step --only "4 layers"        # and a training step for GPUs with less memory
HELP
}

for argument in "$@"; do
  case "$argument" in
    -h | --help) usage && exit 0 ;;
  esac
done
minutes="${1:-10}"
if [ $# -gt 2 ] || ! [[ "$minutes" =~ ^[1-9][0-9]*$ ]]; then
  usage >&2
  exit 2
fi
mkdir -p "${2:-runs/gpu}"
out="$(cd "${2:-runs/gpu}" && pwd)"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
deadline=$((SECONDS + 60 * minutes - 20)) # 20 s: to stop what overstays, and for the summary

python="${PYTHON:-python3}"
notes=() # lines of the summary
failed=0

step() { printf '=== %s (%d s left)\n' "$1" $((deadline - SECONDS)); }
note() {
  notes+=("$1")
  printf '%s\n' "$1"
}
fail() {
  failed=1
  note "$1"
}

# Runs a command, output to LOG, for at most SHARE percent of what is left. Returns its status, 124 or 137: out of time.
limited() { # limited SHARE LOG COMMAND...
  local seconds=$(((deadline - SECONDS) * $1 / 100)) log="$2"
  shift 2
  [ "$seconds" -ge 5 ] || return 124
  # INT: pytest still prints what it has
  timeout --signal=INT --kill-after=10 "$seconds" "$@" >>"$log" 2>&1 </dev/null
}

# --------------------------------------------------------------------------------------------------- what is needed

missing=()
if ! command -v "$python" >/dev/null; then
  missing+=("$python: Python 3.11 or newer; PYTHON names another")
else
  # cmake and ninja that pip installed lie beside the Python, which need not be on PATH
  PATH="$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH"
  for module in torch pybind11 setuptools pip pytest numpy safetensors tokenizers tqdm; do
    "$python" -c "import $module" 2>/dev/null || missing+=("Python package $module, for $python")
  done
  "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null ||
    missing+=("a GPU that torch can use (torch.cuda.is_available() is False)")
fi
if [ -z "${CUDACXX:-}" ]; then
  CUDACXX="$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)"
fi
export CUDACXX
[ -x "$CUDACXX" ] || missing+=("nvcc (CUDA 12.3 or newer); CUDACXX names one that is not on PATH")
for tool in cmake ninja timeout; do
  command -v "$tool" >/dev/null || missing+=("$tool")
done
command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
  missing+=("a C++17 compiler")
if [ ${#missing[@]} -gt 0 ]; then
  echo "run_on_gpu.sh: missing on this machine:" >&2
  printf '  %s\n' "${missing[@]}" >&2
  exit 2
fi

rm -f "$out"/{summary.md,results.jsonl,machine.txt,build.log,tests.log,sanitizer.log,benchmarks.log}
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# Nothing is written into the checkout, and nothing is fetched.
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INDEX=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 TMPDIR="$work"
export TORCHINDUCTOR_CACHE_DIR="$work/inductor" TRITON_CACHE_DIR="$work/triton"

{
  date -u +"date: %Y-%m-%dT%H:%M:%SZ"
  "$python" -c 'from benchmarks import runner; print("commit:", runner.commit())'
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --format=csv --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu ||
      echo "nvidia-smi failed"
  else
    echo "nvidia-smi: not found"
  fi
  "$python" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda)'
  "$CUDACXX" --version | tail -n 2
  uname -srm
} >"$out/machine.txt" 2>&1
cat "$out/machine.txt"

# ------------------------------------------------------------------------------------------------------------ build

step "build"
# pip writes beside setup.py, so it gets a copy; --target needs no root and changes no environment.
mkdir "$work/source"
cp -R CMakeLists.txt setup.py pyproject.toml README.md LICENSE MANIFEST.in cmake csrc python "$work/source"
chmod -R u+w "$work/source"
find "$work/source/python" -name '_C*.so' -delete
began=$SECONDS
if ! ILLADA_CUDA=on limited 100 "$out/build.log" \
  "$python" -m pip install --no-build-isolation --no-deps --target "$work/site" -v "$work/source"; then
  tail -n 30 "$out/build.log" >&2
  echo "run_on_gpu.sh: the build failed or ran out of time; all of its output: $out/build.log" >&2
  exit 2
fi
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
note "- Build: $((SECONDS - began)) s"

# ------------------------------------------------------------------------------------------------------------ tests

pytest=("$python" -m pytest -p no:cacheprovider -q)

step "tests/cuda"
status=0
limited 50 "$out/tests.log" "${pytest[@]}" tests/cuda || status=$?
counts="$(grep -E '[0-9]+ (passed|failed|skipped|error)' "$out/tests.log" 2>/dev/null | tail -n 1 | sed 's/^[= ]*/ /; s/[= ]*$//' || true)"
case "$status" in
  0) note "- Tests:${counts:+ $counts}" ;;
  124 | 137) note "- Tests: out of time,${counts:- none finished}" ;;
  *) fail "- Tests: FAILED (exit $status),${counts:- see tests.log}" ;;
esac

step "compute-sanitizer"
sanitizer="$(command -v compute-sanitizer || echo "$(dirname "$CUDACXX")/compute-sanitizer")"
# Graphs, and memory that benchmarks count, need the caching allocator, which hides overruns and is off here; compilers
# take too long under it.
"${pytest[@]}" --collect-only tests/cuda -k "not graph and not benchmarks and not compile and not opcheck" >"$work/collected" 2>/dev/null ||
  true
# Twelve of them, from all over.
mapfile -t tests < <(grep '^tests/cuda/.*::' "$work/collected" |
  awk '{ line[NR] = $0 } END { n = NR < 12 ? NR : 12; for (i = 0; i < n; i++) print line[int(i * NR / n) + 1] }')
if [ ! -x "$sanitizer" ]; then
  note "- Sanitizer: skipped, compute-sanitizer was not found"
elif [ ${#tests[@]} -eq 0 ]; then
  note "- Sanitizer: skipped, no tests were collected"
else
  for tool in memcheck racecheck; do
    status=0
    # torch asks for things that fail and copes: errors of API calls say nothing
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 20 "$out/sanitizer.log" \
      "$sanitizer" --tool "$tool" --report-api-errors no --error-exitcode 99 "${pytest[@]}" "${tests[@]}" || status=$?
    case "$status" in
      0) note "- Sanitizer, $tool: nothing found in ${#tests[@]} tests" ;;
      124 | 137) note "- Sanitizer, $tool: out of time" ;;
      *) fail "- Sanitizer, $tool: FAILED (exit $status), see sanitizer.log" ;;
    esac
  done
fi

# ------------------------------------------------------------------------------------------------------- benchmarks

# A process for each kind of case: what breaks the device in one leaves the others alone. JSON is written after every
# case, so a process that runs out of time keeps what it has.
left_out=()
run_bench() { # run_bench BENCH DEVICE TEXT
  local bench="$1" device="$2" text="$3" status=0
  step "benchmark $bench ${text% }"
  limited 100 "$out/benchmarks.log" \
    "$python" -m benchmarks "$bench" --device "$device" --only "$text" --json "$out/results.jsonl" || status=$?
  case "$status" in
    0 | 124 | 137) ;;
    *) fail "- Benchmark $bench ${text% }: FAILED (exit $status), see benchmarks.log" ;;
  esac
  while IFS= read -r name; do
    grep -qF "\"case\": \"$name\"" "$out/results.jsonl" 2>/dev/null || left_out+=("$name")
  done < <("$python" -m benchmarks "$bench" --device "$device" --only "$text" --list 2>/dev/null)
}
for kind in sample linear commit step; do
  run_bench remask cuda "$kind "
done
for kind in "32/8 D128" "32/32 D128" D64; do
  run_bench attention cuda "$kind"
done
for kind in t=0.5 t=0.1 t=0.9 "t=1 4096x155136"; do # other heads by hand
  run_bench loss cuda "$kind"
done
for kind in 8b 8b-batch; do
  run_bench generate cuda "$kind var"
done
# The longest ones, and one that fills the memory of an H100; blocks that grow leave no gaps between cases.
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True run_bench train-step cuda "8b "
run_bench score cuda ""
if [ ${#left_out[@]} -gt 0 ]; then
  note "- Cases without a result, for lack of time or after a failure: $(printf '%s\n' "${left_out[@]}" | sort -u | paste -sd ';' | sed 's/;/; /g')"
fi

{
  printf '# illada on a GPU\n\n```\n'
  cat "$out/machine.txt"
  printf '```\n\n'
  printf '%s\n' "${notes[@]}"
  printf '\n'
  "$python" -m benchmarks.report "$out/results.jsonl"
} >"$out/summary.md"
cat "$out/summary.md"
exit "$failed"
