#!/usr/bin/env bash
# Everything that needs a GPU, in one go of at most 8 minutes, on a machine without a network. Nothing has to be changed:
#
#   OUT=results bash benchmarks/on_gpu.sh            # from a checkout; writes OUT and benchmarks/results/
#   bash benchmarks/on_gpu.sh --cpu-smoke            # that all of it runs, with tiny models, under 3 minutes
#
# 1. environment and card  2. tests marked gpu  3. kernels  4. step time, MFU and memory of ViT-L/16 to ViT-S/16
# 5. for the rest of the time: training of the stronger mini teacher, from its newest checkpoint where there is one.
# A stage that fails, or lacks a package, is skipped with a reason (skipped.txt); the others go on.
#
# What is read:
#   WHEELS   folder of wheels to put beside what the machine has (default .gpu/wheels); for Python 3.12 on x86-64:
#            pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64
#              --platform manylinux_2_17_x86_64 -d .gpu/wheels timm==1.0.31 torchdistill torch-pruning
#              pydantic==2.14.4 pydantic-core==2.50.5 annotated-types typing-inspection
#   CIFAR    folder of cifar10-train.tar and cifar10-test.tar, plain or .xz (default .gpu/data, then shared/data);
#            xz -6 makes 16 MB of the first, which fits where a checkout may not be large
#   RESUME   folder of teacher.tar.part-* of an earlier go (default .gpu/resume, then OUT): 52 MB, so that a machine that
#            takes 64 MB a transfer gets it in a transfer of its own
#   MINUTES  of all stages together (default 8; 3 with --cpu-smoke)
# What is left in OUT, at most 8 files of at most 15 MiB: gpu.json, gpu.md, log.txt, teacher.tar.part-*.
set -u
cd "$(dirname "$0")/.."
smoke=""; [ "${1:-}" = --cpu-smoke ] && smoke=1
OUT=${OUT:-$PWD/benchmarks/results/out}; mkdir -p "$OUT"; OUT=$(cd "$OUT" && pwd)
MINUTES=${MINUTES:-$([ $smoke ] && echo 3 || echo 8)}
end=$(python3 -c "print(int($SECONDS + 60 * $MINUTES))")
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
exec > >(tee "$OUT/log.txt") 2>&1
python=${PYTHON:-python3}

skip() { echo "SKIPPED: $*" | tee -a "$work/skipped.txt"; }
# stage SECONDS NAME COMMAND...: run it, but not longer than that, nor than 15 s before the end
stage() {
  local limit=$1 name=$2 left=$((end - SECONDS - 15)); shift 2
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 5 ]; then skip "$name: no time was left"; return 1; fi
  echo "== $name (at most $limit s, $((end - SECONDS)) s are left)"
  timeout --kill-after=10 "$limit" "$@" || { skip "$name: ended with code $?"; return 1; }
}

# Packages: wheels that came along, and this checkout under the names that an installation gives it.
mkdir "$work/site"; export PYTHONPATH="$work/site:$PWD/tests:$PWD/benchmarks"
for wheels in "${WHEELS:-.gpu/wheels}"; do
  ls "$wheels"/*.whl > /dev/null 2>&1 || { echo "no wheels in $wheels"; continue; }
  $python -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$wheels"/*.whl || skip "wheels: pip failed"
done
for pair in remap:remap cli:remap_cli recipes:remap_recipes; do ln -sfn "$PWD/${pair%:*}" "$work/site/${pair#*:}"; done
export REMAP_CACHE="$work/cache" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader > "$work/environment.txt" 2>/dev/null ||
  echo "no GPU" > "$work/environment.txt"
cat "$work/environment.txt"
if [ $smoke ]; then
  stage 1000 smoke $python benchmarks/gpu_smoke.py "$work"
elif grep -q "no GPU" "$work/environment.txt"; then
  skip "everything: this machine has no GPU (--cpu-smoke needs none)"
else
  stage 75 tests $python -m pytest -n0 -p no:cacheprovider -m gpu -q --tb=short tests/engine/test_gpu.py > "$work/tests.txt"
  tail -30 "$work/tests.txt"
  stage 40 kernels $python benchmarks/kernels.py --precisions bf16,fp32 --repeats 5 --seconds 0.2 > "$work/kernels.txt"
  cat "$work/kernels.txt"
  stage 200 steps $python benchmarks/gpu_step.py --json "$work/steps.json" --seconds 160

  # The teacher: its images, its checkpoint, and a slice of training that leaves 50 s to begin, to save and to pack.
  train=""; for folder in "${CIFAR:-.gpu/data}" shared/data; do
    for ending in tar tar.xz; do
      [ -z "$train" ] && [ -f "$folder/cifar10-train.$ending" ] && [ -f "$folder/cifar10-test.$ending" ] &&
        train=$folder/cifar10-train.$ending test=$folder/cifar10-test.$ending
    done
  done
  run=$work/teacher; mkdir -p "$run"
  for folder in "${RESUME:-.gpu/resume}" "$OUT"; do
    ls "$folder"/teacher.tar.part-* > /dev/null 2>&1 && [ ! -f "$run/recipe.yaml" ] &&
      cat "$folder"/teacher.tar.part-* | tar -x -C "$run" && echo "resuming what lies in $folder"
  done
  rmdir "$run" 2>/dev/null
  seconds=$((end - SECONDS - 50))
  if [ -z "$train" ]; then skip "teacher: no CIFAR-10 in ${CIFAR:-.gpu/data} or shared/data"
  elif [ "$seconds" -lt 5 ]; then skip "teacher: no time was left"
  else
    stage $((seconds + 40)) teacher $python benchmarks/gpu_slice.py --recipe benchmarks/stronger_mini_teacher.yaml \
      --run "$run" --data "$train" --val-data "$test" --seconds "$seconds" --json "$work/slice.json"
    newest=$(ls "$run/checkpoint" 2>/dev/null | grep json | sort | tail -1); newest=${newest%.json}
    if [ "$newest" ]; then
      rm -f "$OUT"/teacher.tar.part-*
      # The newest checkpoint alone, and none where the task is there: transfers are limited.
      [ -d "$run/task" ] && newest="" || newest="checkpoint/$newest.json checkpoint/$newest.safetensors"
      (cd "$run" && tar -c $(ls | grep -v '^checkpoint$') $newest) | split -b 15m - "$OUT/teacher.tar.part-"
    fi
  fi
fi
$python benchmarks/gpu_report.py "$work" && cp "$work"/gpu.json "$work"/gpu.md "$OUT/"
[ $smoke ] || { mkdir -p benchmarks/results && cp "$work"/gpu.json "$work"/gpu.md benchmarks/results/; }
echo "done after $SECONDS s; results in $OUT"
if [ $smoke ] && [ -s "$work/skipped.txt" ]; then cat "$work/skipped.txt"; exit 1; fi
