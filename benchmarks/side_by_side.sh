#!/usr/bin/env bash
# The README's table "Side by side", from one run each, on two quiet cores in about 20 minutes:
#
#   bash benchmarks/side_by_side.sh OUT EARLIER PHOTOS TAR...
#
#   OUT      folder for a Markdown file a part, and side_by_side.md with all of them
#   EARLIER  checkout of this repository that predict and decoding are compared with
#   PHOTOS   flat folder of 5,000 images; TAR... archives of images that are decoded
#
# PYTHON names the interpreter; REPEATS and IMAGES make a short run of it (REPEATS=1 IMAGES=200). Two streams run at the
# same time, each on a core and with one thread, timed by the processor's clock; what uses both cores comes after them.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} repeats=${REPEATS:-5} images=${IMAGES:-5000}
mkdir -p "$1"; OUT=$(cd "$1" && pwd); earlier=$2 photos=$3; shift 3
precisions="--precision fp32,bf16"

# part NAME COMMAND...: OUT/NAME.md is what it prints; an error is shown there, and the others go on
part() {
  local name=$1 start=$SECONDS; shift
  "$@" > "$OUT/$name.md" 2> "$OUT/$name.log" || { echo "failed: $(tail -1 "$OUT/$name.log")" >> "$OUT/$name.md"; }
  echo "$name: $((SECONDS - start)) s"
}
one() { env OMP_NUM_THREADS=1 taskset -c "$core" "$python" "$@"; }
distillation() { one benchmarks/distillation.py $precisions --losses ce,kd --repeats "$repeats" "$@"; }

{
  core=0
  part bare distillation --what bare
  part cached distillation --what cached,views
  part cached_base distillation --what cached --pair base --methods full --repeats $((repeats < 3 ? repeats : 3))
} &
{
  core=1
  part timm distillation --what timm
  part torchdistill distillation --what torchdistill
  part peft one benchmarks/methods.py --methods peft $precisions --repeats $((3 * repeats))
  part decoding one benchmarks/decoding.py "$@" --against "$earlier" --repeats $((repeats < 3 ? repeats : 3))
  part startup one benchmarks/startup.py --dry-run --repeats "$repeats"
} &
wait
unset OMP_NUM_THREADS
part predict "$python" benchmarks/predicting.py speed --folder "$photos" --against "$earlier" --images "$images" \
  --methods vpt_deep,linear --repeats $((repeats < 3 ? repeats : 3))
part compare "$python" benchmarks/compare_jobs.py --jobs auto --some $((repeats < 6 ? repeats + 1 : 6))

{
  echo "A step of remap over the same step of the others, processor time of one thread:"
  cat "$OUT"/{bare,timm,torchdistill,peft}.md | awk '/^\| what/ { if (seen++) { getline; next } } /^(\||failed)/'
  for name in cached cached_base predict compare decoding startup; do
    printf '\n## %s\n\n' "$name"
    [ "$name" = startup ] && sed 's/^/    /' "$OUT/$name.md" || cat "$OUT/$name.md"
  done
} > "$OUT/side_by_side.md"
cat "$OUT/side_by_side.md"
