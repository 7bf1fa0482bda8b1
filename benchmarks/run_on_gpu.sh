#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash benchmarks/run_on_gpu.sh [MINUTES] [OUT] [--stages LIST] [--prebuilt FOLDER] [--keep FOLDER] [--dry-run]

Builds illada on this machine, then answers, the most important question first: does each kernel run, and is it right;
which of its variants is the fastest; how it compares with its peers; whether the tests pass. Needs an NVIDIA GPU, nvcc,
cmake, ninja, and a Python with torch, numpy, safetensors, tokenizers, tqdm and pytest, for the build pybind11,
setuptools, pip and the headers of CUTLASS as well; no network, no root. The checkout is only read, and nothing stays
behind but OUT. Kernels run in processes of their own with time limits: one that hangs costs seconds.

  MINUTES  for everything, build included (default 10). What does not fit is left out and listed.
  OUT      folder for the results (default runs/gpu); files of an earlier run are replaced.
  --stages LIST      of smoke,tune,peers,tests,models,sanitizer, separated by commas (default: all, in this order)
  --prebuilt FOLDER  use the illada in this folder (it goes on PYTHONPATH) and build nothing
  --keep FOLDER      build into this folder and leave it there, as --prebuilt of a later run
  --dry-run          the same on the simulator CUSIM, with the illada that PYTHON finds or --prebuilt has, and small
                     shapes: it shows that the script works, and nothing about speed

The stages, each with a module that may be run by itself (`python -m benchmarks.smoke --help`):
  smoke      each kernel once at a small shape, against float64, then each value of each choice between kernels: a line
             OK, WRONG, HANG or ERROR for each, at once                        up to 3 minutes, the build not counted
  tune       these values timed at the shapes that count; the fastest right one, and what to write into the defaults
                                                                               up to 4 minutes
  peers      cuDNN and flash attention of torch, fa3-fwd, Liger, cuBLAS, forward and backward, taking turns with ours;
             a compiled flex_attention last                                    up to 4 minutes
  tests      tests/cuda by file; faster with pytest-xdist, safer with pytest-timeout         up to 4 minutes
  models     the other benchmarks: whole steps of remasking, generation, training (40 to 80 GB) and scoring
  sanitizer  memcheck, racecheck and synccheck on the smoke jobs; reported, never a failure  up to 2 minutes
With more than 10 minutes each limit is longer in proportion.

  OUT/summary.md       start here: what became of the stages, tables, goals met and missed, measured against predicted
  OUT/smoke.jsonl  tune.json  tune.jsonl  tests.json  sanitizer.json  peers.jsonl  as the stages' modules say
  OUT/results.jsonl    one line for each case, provider and way of timing (python -m benchmarks.report reads it)
  OUT/results.png      they as a picture, where there is matplotlib
  OUT/kernels.jsonl    the time of each kernel in each case of peers (python -m benchmarks compare reads it)
  OUT/machine.txt      GPU, driver, clocks, versions, commit, date
  OUT/build.log  and for each stage OUT/STAGE.txt, what it printed

Exit status: 0 all ran or was left out for lack of time; 1 a kernel, a test or a benchmark failed; 2 something is
missing or the build failed. A missed goal is no failure: the summary says so.

Environment:
  PYTHON          the Python to use (default python3)
  CUDACXX         the nvcc to use (default: on PATH, else /usr/local/cuda/bin/nvcc)
  CUSIM           the simulator's folder, of a dry run
  ILLADA_CUTLASS_DIR   the headers of CUTLASS 4.0 or newer, for the build: a checkout, its include folder, or an
                  unpacked wheel (default: .cache/cutlass-* in the checkout, as `make ptxas` leaves it)
  PIP_FIND_LINKS  a folder with the wheel nvidia_cutlass-*.whl (6 MB), which does instead
  ILLADA_COMMIT   what to call the commit where the checkout has no .git

examples:
  bash benchmarks/run_on_gpu.sh                            # ten minutes, into runs/gpu
  bash benchmarks/run_on_gpu.sh 9 out --stages smoke,tune,peers --keep build/gpu   # a quarter of an hour in two calls:
  bash benchmarks/run_on_gpu.sh 5 out2 --stages tests,sanitizer --prebuilt build/gpu
  python -m benchmarks remask --only "step 128"            # one case by hand, with an installed illada
  python -m benchmarks train-step --only "4 layers"        # a training step for GPUs with less memory
  python -m benchmarks compare out/kernels.jsonl           # predicted against measured
HELP
}

fault() {
  printf 'run_on_gpu.sh: %s\n\n' "$1" >&2
  usage >&2
  exit 2
}

known=smoke,tune,peers,tests,models,sanitizer
stages="$known" prebuilt="" keep="" dry="" places=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --dry-run) dry=1 ;;
    --stages | --prebuilt | --keep)
      [ $# -gt 1 ] || fault "$1 needs a value"
      case "$1" in
        --stages) stages="$2" ;;
        --prebuilt) prebuilt="$2" ;;
        --keep) keep="$2" ;;
      esac
      shift
      ;;
    -*) fault "unknown option $1" ;;
    *) places+=("$1") ;;
  esac
  shift
done
minutes="${places[0]:-10}"
[ ${#places[@]} -le 2 ] || fault "at most MINUTES and OUT, got ${places[*]}"
[[ "$minutes" =~ ^[1-9][0-9]*$ ]] || fault "MINUTES must be a positive whole number, got $minutes"
for stage in ${stages//,/ }; do
  [[ ",$known," == *",$stage,"* ]] || fault "there is no stage $stage; there are $known"
done
absolute() { case "$1" in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$PWD" "$1" ;; esac; }
[ -z "$prebuilt" ] || prebuilt="$(absolute "$prebuilt")"
[ -z "$keep" ] || keep="$(absolute "$keep")"
[ ! -d "${ILLADA_CUTLASS_DIR:-}" ] || export ILLADA_CUTLASS_DIR="$(absolute "$ILLADA_CUTLASS_DIR")"
[ ! -d "${PIP_FIND_LINKS:-}" ] || export PIP_FIND_LINKS="$(absolute "$PIP_FIND_LINKS")"
mkdir -p "${places[1]:-runs/gpu}"
out="$(cd "${places[1]:-runs/gpu}" && pwd)"
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

# --------------------------------------------------------------------------------------------------- what is needed

missing=()
run=("$python")
if [ -n "$dry" ]; then
  cusim="$(cd "${CUSIM:-/nonexistent}" 2>/dev/null && pwd || true)"
  [ -n "$cusim" ] && [ -x "$cusim/cusim" ] || missing+=("the simulator; CUSIM names its folder")
  export ILLADA_DRY_RUN=1 PYTHONPATH="$cusim${PYTHONPATH:+:$PYTHONPATH}"
  run=("$cusim/cusim" run -- "$python")
fi
if [ -n "$prebuilt" ]; then
  [ -e "$prebuilt/illada/__init__.py" ] || missing+=("illada in $prebuilt, the folder of --prebuilt")
  export PYTHONPATH="$prebuilt${PYTHONPATH:+:$PYTHONPATH}"
fi
if ! command -v "$python" >/dev/null; then
  missing+=("$python: Python 3.11 or newer; PYTHON names another")
else
  # cmake and ninja that pip installed lie beside the Python, which need not be on PATH
  PATH="$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH"
  modules=(torch pytest numpy safetensors tokenizers tqdm)
  [ -n "$dry$prebuilt" ] || modules+=(pybind11 setuptools pip)
  [ -z "$dry" ] || modules+=(illada)
  for module in "${modules[@]}"; do
    "$python" -c "import $module" 2>/dev/null || missing+=("Python package $module, for $python")
  done
  [ -n "$dry" ] || "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null ||
    missing+=("a GPU that torch can use (torch.cuda.is_available() is False)")
fi
if [ -z "${CUDACXX:-}" ]; then
  CUDACXX="$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)"
fi
export CUDACXX
command -v timeout >/dev/null || missing+=("timeout")
# The headers of CUTLASS, for the build and for the tests' own programs; of several the newest.
cutlass_wheel=""
if [ -z "${ILLADA_CUTLASS_DIR:-}" ]; then
  ILLADA_CUTLASS_DIR="$(printf '%s\n' "$PWD"/.cache/cutlass-*[0-9] | sort -V | tail -n 1)"
  if [ ! -d "$ILLADA_CUTLASS_DIR" ]; then
    ILLADA_CUTLASS_DIR=""
    cutlass_wheel="$(compgen -G "${PIP_FIND_LINKS:-/nonexistent}/nvidia_cutlass-*.whl" | sort -V | tail -n 1)" || true
  fi
fi
export ILLADA_CUTLASS_DIR
if [ -z "$dry$prebuilt" ]; then
  [ -x "$CUDACXX" ] || missing+=("nvcc (CUDA 12.3 or newer); CUDACXX names one that is not on PATH")
  for tool in cmake ninja; do
    command -v "$tool" >/dev/null || missing+=("$tool")
  done
  command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    missing+=("a C++17 compiler")
  # An installed wheel does as well. CMake looks again, and checks the version.
  [ -n "$ILLADA_CUTLASS_DIR$cutlass_wheel" ] ||
    "$python" -c 'from importlib.util import find_spec; raise SystemExit(not find_spec("cutlass_library"))' 2>/dev/null ||
    missing+=("the headers of CUTLASS 4.0 or newer; ILLADA_CUTLASS_DIR names them, or PIP_FIND_LINKS its wheel's folder")
fi
if [ ${#missing[@]} -gt 0 ]; then
  echo "run_on_gpu.sh: missing on this machine:" >&2
  printf '  %s\n' "${missing[@]}" >&2
  exit 2
fi

rm -f "$out"/{summary.md,results.jsonl,results.png,kernels.jsonl,machine.txt,build.log,compare.txt} \
  "$out"/{smoke,tune,peers,tests,models,sanitizer}.{txt,json,jsonl,log}
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
if [ -n "$cutlass_wheel" ]; then
  "$python" -m zipfile -e "$cutlass_wheel" "$work/cutlass"
  ILLADA_CUTLASS_DIR="$work/cutlass"
fi

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
  [ ! -x "$CUDACXX" ] || "$CUDACXX" --version | tail -n 2
  uname -srm
} >"$out/machine.txt" 2>&1
cat "$out/machine.txt"

# ------------------------------------------------------------------------------------------------------------ build

if [ -z "$dry$prebuilt" ]; then
  step "build"
  # pip writes beside setup.py, so it gets a copy; --target needs no root and changes no environment.
  site="${keep:-$work/site}"
  mkdir "$work/source"
  cp -R CMakeLists.txt setup.py pyproject.toml README.md LICENSE NOTICE MANIFEST.in build_backend cmake csrc python \
    "$work/source"
  chmod -R u+w "$work/source"
  find "$work/source/python" -name '_C*.so' -delete
  began=$SECONDS
  left=$((deadline - SECONDS))
  # INT, and a while later KILL: pip stops the compilers. Lines of source are for the sanitizer's reports.
  if ! ILLADA_CUDA=on CMAKE_ARGS="-DILLADA_NVCC_FLAGS=-lineinfo ${CMAKE_ARGS:-}" timeout --signal=INT --kill-after=10 "$((left > 1 ? left : 1))" "$python" -m pip install \
    --no-build-isolation --no-deps --upgrade --target "$site" -v "$work/source" >"$out/build.log" 2>&1 </dev/null; then
    tail -n 30 "$out/build.log" >&2
    echo "run_on_gpu.sh: the build failed or ran out of time; all of its output: $out/build.log" >&2
    exit 2
  fi
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
  note "- build: $((SECONDS - began)) s"
fi

# ----------------------------------------------------------------------------------------------------------- stages

# Runs a stage's module, with at most SECONDS (more in proportion where there are more than 10 minutes) and what is left.
# It ends by itself, and notes the last line that it printed; the limit around it is for a fault in the module.
stage() { # stage NAME SECONDS MODULE ARGUMENT...
  local name="$1" seconds="$2" status=0 left=$((deadline - SECONDS))
  shift 2
  [ "$minutes" -le 10 ] || seconds=$((seconds * minutes / 10))
  [ "$seconds" -le "$left" ] || seconds="$left"
  step "$name"
  if [ "$seconds" -lt 15 ]; then
    note "- $name: left out, no time"
    return
  fi
  timeout --signal=INT --kill-after=10 $((seconds + 15)) "${run[@]}" -m "$@" --seconds "$seconds" </dev/null 2>&1 |
    tee "$out/$name.txt" || status=$?
  local last
  last="$(grep -v '^ ' "$out/$name.txt" | tail -n 1 || true)"
  case "$status" in
    0) note "- $name: $last" ;;
    124 | 137) note "- $name: out of time; $last" ;;
    *)
      failed=1
      note "- $name: FAILED (exit $status); $last"
      ;;
  esac
}

# The other benchmarks, a process for each kind of case: what breaks the device in one leaves the others alone. JSON is
# written after every case, so a process that runs out of time keeps what it has.
left_out=()
models() {
  local bench text status left name listed=" "
  while read -r bench text; do
    if [ -n "$dry" ]; then # these have no small shapes: a look at the names of each bench
      [[ "$listed" != *" $bench "* ]] || continue
      listed+="$bench "
    fi
    step "models: $bench ${text:-}"
    left=$((deadline - SECONDS)) status=0
    if [ -n "$dry" ]; then
      "${run[@]}" -m benchmarks "$bench" --device cuda --only "$text" --list >>"$out/models.txt" 2>&1 || status=$?
    elif [ "$left" -ge 15 ]; then
      # a case that fills the memory of an H100 needs blocks that grow
      PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True timeout --signal=INT --kill-after=10 "$left" "${run[@]}" \
        -m benchmarks "$bench" --device cuda --only "$text" --json "$out/results.jsonl" </dev/null >>"$out/models.txt" 2>&1 ||
        status=$?
    fi
    case "$status" in
      0 | 124 | 137) ;;
      *)
        failed=1
        note "- models: $bench $text FAILED (exit $status), see models.txt"
        ;;
    esac
    [ -n "$dry" ] || while IFS= read -r name; do
      grep -qF "\"case\": \"$name\"" "$out/results.jsonl" 2>/dev/null || left_out+=("$name")
    done < <("$python" -m benchmarks "$bench" --device cuda --only "$text" --list 2>/dev/null |
      sed -n '/^cases of /,$s/^  //p')
  done <<'CASES'
train-step 8b 8192
remask step
generate 8b var
score 
remask commit
attention 32/8 D128
loss t=0.1
loss t=0.9
generate 8b-batch var
train-step 8b 5120
CASES
  if [ ${#left_out[@]} -gt 0 ]; then
    note "- models: without a result, for lack of time or after a failure: $(printf '%s\n' "${left_out[@]}" | sort -u | paste -sd ';' | sed 's/;/; /g')"
  fi
}

limit=()
[ -z "$dry" ] || limit=(--limit 120) # a simulator takes its time
few=()
[ -z "$dry" ] || few=(--at-once 2)
for stage in ${known//,/ }; do
  [[ ",$stages," == *",$stage,"* ]] || continue
  case "$stage" in
    smoke) stage smoke 180 benchmarks.smoke --json "$out/smoke.jsonl" "${limit[@]}" "${few[@]}" ;;
    tune) stage tune 240 benchmarks.tune --json "$out/tune.json" --records "$out/tune.jsonl" "${limit[@]}" ;;
    peers)
      stage peers 240 benchmarks.peers --json "$out/results.jsonl" --kernels "$out/kernels.jsonl" \
        --outcomes "$out/peers.jsonl" "${limit[@]}"
      ;;
    tests) stage tests 240 benchmarks.run_tests --json "$out/tests.json" --log "$out/tests.log" "${few[@]}" ;;
    models) models ;;
    sanitizer) stage sanitizer 120 benchmarks.sanitizer --json "$out/sanitizer.json" --log "$out/sanitizer.log" ;;
  esac
done

measured=()
for file in kernels.jsonl tune.jsonl results.jsonl; do
  [ ! -s "$out/$file" ] || measured+=("$out/$file")
done
{
  printf '# illada on a GPU\n\n```\n'
  cat "$out/machine.txt"
  printf '```\n\n'
  printf '%s\n' "${notes[@]}"
  if [ -s "$out/tune.txt" ]; then
    printf '\n## Choices between kernels\n\n'
    sed -n '/^What to write/,$p' "$out/tune.txt"
  fi
  printf '\n'
  if [ -s "$out/results.jsonl" ]; then
    "$python" -m benchmarks.report "$out/results.jsonl" --markdown || true
  else
    echo "No results."
  fi
  if [ ${#measured[@]} -gt 0 ]; then
    "$python" -m benchmarks compare "${measured[@]}" | tee "$out/compare.txt" || true
  fi
} >"$out/summary.md"
cat "$out/summary.md"
if [ -s "$out/results.jsonl" ] && "$python" -c 'import matplotlib' 2>/dev/null; then
  MPLCONFIGDIR="$work" "$python" -m benchmarks.report "$out/results.jsonl" --plot "$out/results.png" >/dev/null || true
fi
exit "$failed"
