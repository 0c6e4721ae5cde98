#!/usr/bin/env bash
# bench/gpu_check.sh OUT [build] [tests] [sanitizer] [bench]
#
# On a machine with an NVIDIA GPU: builds the kernels for that GPU, runs their tests on it, compute-sanitizer on small
# cases, and every operator's bench beside the peers that are installed; a table comes last. Without network: it takes
# the torch, nvcc, CMake, ninja and nanobind that are there. Each part has a time limit of its own, and all together stay
# under 10 minutes; parts can be run one by one, after `build`.
#
# OUT gets <part>.log, the benches' JSON and summary.txt. Exit code 1 when a part failed. What this machine has not got
# is skipped and said so, which is no failure: without a GPU the build (for the CPU) and the tests that need none remain.
#
#   PYTHON=python3          the interpreter, with torch
#   BUILD=build/gpu_check   where to build
#   ARCHITECTURES=90a-real  build for this chip, GPU or not, instead of for the GPU that is there
#   LIMIT=600               seconds for each part, instead of the limits below
#   QUICK=1                 a few of the tests only
set -uo pipefail

if [ $# -lt 1 ]; then
  echo "usage: bench/gpu_check.sh OUT [build] [tests] [sanitizer] [bench]" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
PARTS=${*:-build tests sanitizer bench}
PYTHON=${PYTHON:-python3}
PYTHON=$(command -v "$PYTHON") || { echo "no $PYTHON"; exit 2; }
PATH=$(dirname "$PYTHON"):$PATH:/usr/local/cuda/bin
BUILD=${BUILD:-build/gpu_check}
mkdir -p "$BUILD" && BUILD=$(cd "$BUILD" && pwd) || exit 2
QUICK=${QUICK:-}
ARCHITECTURES=${ARCHITECTURES:-}
OPERATORS="ms_deform_attn lora_linear fusion_attention query_attention slot_head"

# Seconds. Compiling five operators for one chip takes the most.
declare -A LIMITS=([build]=210 [tests]=120 [sanitizer]=110 [bench]=150)

GPU=$(nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv,noheader 2>/dev/null | head -1)
NVCC=$(command -v nvcc)
export PYTHONPATH=$BUILD/python PYTHONUNBUFFERED=1 VISIONLLM_RESULTS=$OUT
# JAX, which some tests hand arrays over from, would take most of the GPU's memory.
export JAX_PLATFORMS=cpu
export VISIONLLM_COMMIT=${VISIONLLM_COMMIT:-$(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)}

FAILED=0
SUMMARY=$OUT/summary.txt
: > "$SUMMARY"

# What happened, for the end of the output and for the summary.
say() { echo "$*" | tee -a "$SUMMARY"; }

# run PART SECONDS NAME command...: its output goes to PART.log; says what came of it.
run() {
  local part=$1 limit=$2 name=$3 start=$SECONDS code output
  shift 3
  output=$(mktemp)
  timeout --kill-after=5 "$limit" "$@" > "$output" 2>&1
  code=$?
  { echo "== $name: $*"; cat "$output"; echo "== $name gave $code"; } >> "$OUT/$part.log"
  if [ $code -eq 124 ] || [ $code -eq 137 ]; then
    say "$part: $name FAILED: not finished after $limit s ($OUT/$part.log)"
  elif [ $code -ne 0 ]; then
    say "$part: $name FAILED with exit code $code ($OUT/$part.log)"
  elif [ -n "$GPU" ] && grep -q '^skipped: ' "$output"; then
    # There is a GPU, and yet a program found none that it can use.
    say "$part: $name FAILED: $(grep -m1 '^skipped: ' "$output")"
    code=1
  else
    say "$part: $name ok, $((SECONDS - start)) s"
  fi
  if [ $code -ne 0 ]; then
    tail -n 25 "$output"
    FAILED=1
  fi
  rm -f "$output"
  return $code
}

left() { echo $((DEADLINE > SECONDS ? DEADLINE - SECONDS : 1)); }

has_gpu_kernels() { [ -n "$GPU" ] && [ -n "$NVCC" ]; }

part_build() {
  local options=(-DVISIONLLM_PYTHON=ON -DVISIONLLM_INSTALL=OFF "-DPython_EXECUTABLE=$PYTHON" -DCMAKE_BUILD_TYPE=Release)
  if [ -n "$ARCHITECTURES" ] || has_gpu_kernels; then
    # Line numbers for compute-sanitizer; they cost no time when the kernels run.
    options+=(-DVISIONLLM_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=${ARCHITECTURES:-native}" -DCMAKE_CUDA_FLAGS=-lineinfo)
  else
    options+=(-DVISIONLLM_CUDA=OFF)
    say "build: skipped: CUDA kernels (${GPU:-no GPU}, ${NVCC:-no nvcc})"
  fi
  run build "$(left)" configure cmake -S . -B "$BUILD" -G Ninja "${options[@]}" || return
  run build "$(left)" compile cmake --build "$BUILD" --parallel "${JOBS:-$(nproc)}" || return
  # The package as it is in the tree, with the module just built.
  rm -rf "$BUILD/python"
  mkdir -p "$BUILD/python/visionllm"
  find "$PWD/python/visionllm" -mindepth 1 -maxdepth 1 ! -name '_core*.so' ! -name __pycache__ \
    -exec ln -s -t "$BUILD/python/visionllm" {} +
  cp "$BUILD"/_core*.so "$BUILD/python/visionllm/"
  run build "$(left)" import "$PYTHON" -c "
from visionllm import _core, doctor
print(doctor.report())
assert not '$GPU' or not _core.cuda_architectures or not _core.cuda_problem(), _core.cuda_problem()"
}

part_tests() {
  local files=() name file select=()
  for name in $OPERATORS; do
    for file in tests/test_"$name"*.py; do
      [ -f "$file" ] && files+=("$file")
    done
  done
  # The kernels under emulation are `make test`'s business; of the files for CUDA only what runs on a device is run here.
  select=(-k "(device or not cuda.py) and not more_than_2_to_31")
  [ -n "$QUICK" ] && select=(-k "not cuda.py and signature")
  [ -n "$GPU" ] || say "tests: skipped: those on a device (no GPU)"
  local parallel=()
  if [ -n "$GPU" ] && "$PYTHON" -c "import xdist" 2>/dev/null; then parallel=(-n 6); fi
  run tests "$(left)" pytest "$PYTHON" -m pytest -q -p no:cacheprovider "${parallel[@]}" "${select[@]}" "${files[@]}"
  grep -E "^[0-9]+ (passed|failed)|passed|failed" "$OUT/tests.log" | tail -1 | tee -a "$SUMMARY"
}

part_sanitizer() {
  if ! has_gpu_kernels; then
    say "sanitizer: skipped: no kernels on a GPU here (${GPU:-no GPU}, ${NVCC:-no nvcc})"
    return
  fi
  run sanitizer "$(left)" "cases without a tool" "$PYTHON" bench/gpu_cases.py --device cuda
  if ! command -v compute-sanitizer > /dev/null; then
    say "sanitizer: skipped: compute-sanitizer is not installed"
    return
  fi
  # torch's allocator would put all tensors into one block, where an access beyond one of them is no error. The tools
  # run side by side: most of their time is the start of torch under instrumentation.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  local tool code limit pids=()
  limit=$(left)
  for tool in memcheck racecheck initcheck synccheck; do
    timeout --kill-after=5 "$limit" compute-sanitizer --tool $tool --error-exitcode 9 "$PYTHON" bench/gpu_cases.py \
      --device cuda --types float32 bfloat16 > "$OUT/sanitizer_$tool.log" 2>&1 &
    pids+=("$tool:$!")
  done
  for tool in "${pids[@]}"; do
    wait "${tool#*:}"
    code=$?
    tool=${tool%:*}
    if [ $code -eq 0 ]; then
      say "sanitizer: $tool ok"
    elif grep -q "Device not supported" "$OUT/sanitizer_$tool.log"; then
      say "sanitizer: skipped: $tool does not know this device"
    else
      say "sanitizer: $tool FAILED with exit code $code ($OUT/sanitizer_$tool.log)"
      tail -n 15 "$OUT/sanitizer_$tool.log"
      FAILED=1
    fi
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

part_bench() {
  if ! has_gpu_kernels; then
    say "bench: skipped: no kernels on a GPU here (${GPU:-no GPU}, ${NVCC:-no nvcc})"
    return
  fi
  local name share count=5
  for name in $OPERATORS; do
    if [ ! -f "bench/$name.py" ]; then
      say "bench: skipped: there is no bench/$name.py"
      count=$((count - 1))
      continue
    fi
    share=$(($(left) / count))
    count=$((count - 1))
    : > "$OUT/bench_$name.log"
    run "bench_$name" "$share" "$name" "$PYTHON" "bench/$name.py" --device cuda
  done
}

for part in $PARTS; do
  case $part in
    build | tests | sanitizer | bench)
      DEADLINE=$((SECONDS + ${LIMIT:-${LIMITS[$part]}}))
      : > "$OUT/$part.log"
      if [ "$part" != build ] && ! ls "$BUILD"/python/visionllm/_core*.so > /dev/null 2>&1; then
        say "$part: FAILED: there is no build in $BUILD: run the part build first"
        FAILED=1
      else
        "part_$part"
      fi
      ;;
    *)
      echo "there is no part '$part': build, tests, sanitizer, bench" >&2
      exit 2
      ;;
  esac
done

echo
echo "==== ${GPU:-no GPU}; nvcc $(nvcc --version 2>/dev/null | sed -n 's/.*, V//p'); commit $VISIONLLM_COMMIT; $SECONDS s"
for name in $OPERATORS; do
  [ -s "$OUT/bench_$name.log" ] && grep -E " us, graph | skipped" "$OUT/bench_$name.log"
done
cat "$SUMMARY"
exit $FAILED
