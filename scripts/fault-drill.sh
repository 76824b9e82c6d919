#!/usr/bin/env bash
# Kills a sweep with SIGKILL at random moments, resumes it each time, and compares the result with an undisturbed run.
#
#   scripts/fault-drill.sh [EXPERIMENT] [KILLS]        default: experiments/smoke.toml, 10 kills
#
# The runner and its workers die together, as when a machine loses power. Afterwards cells.csv must hold every cell once,
# samples.jsonl every repetition once, and both runs must agree in every column that no clock measures. Exit code 0 when
# they do. LONGBIT names another binary (default: a release build), KEEP=1 keeps the folder with both results.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
experiment=${1:-$root/experiments/smoke.toml}
kills=${2:-10}
for tool in setsid awk cmp; do
    command -v "$tool" >/dev/null || { echo "fault-drill: needs $tool" >&2; exit 2; }
done
if [ -z "${LONGBIT:-}" ]; then
    cargo build --release --manifest-path "$root/Cargo.toml"
    LONGBIT=${CARGO_TARGET_DIR:-$root/target}/release/longbit
fi
dir=$(mktemp -d)
pid=
clean_up() {
    # Only what this script started: the group whose leader it knows.
    [ -z "$pid" ] || kill -KILL "-$pid" 2>/dev/null || true
    if [ -n "${KEEP:-}" ]; then echo "results: $dir"; else rm -rf "$dir"; fi
}
trap clean_up EXIT
trap 'exit 130' INT TERM

echo "undisturbed run of $experiment"
started=$(date +%s%N)
"$LONGBIT" run "$experiment" --out "$dir/undisturbed" --quiet >/dev/null
took_ms=$(( ($(date +%s%N) - started) / 1000000 ))
echo "took $took_ms ms; now $kills kills"

kill=1
while [ "$kill" -le "$kills" ]; do
    # Anywhere in the second that follows a start, or in the share of the sweep that a drill of this length leaves.
    share_ms=$(( took_ms / kills + 200 ))
    random=$(od -An -N2 -tu2 /dev/urandom | tr -d ' ')
    wait_ms=$(( random % (2 * share_ms) ))
    setsid "$LONGBIT" run "$experiment" --out "$dir/drilled" --quiet >/dev/null 2>&1 &
    pid=$!
    sleep "$(awk "BEGIN { print $wait_ms / 1000 }")"
    if kill -0 "$pid" 2>/dev/null; then met=killed; else met="had ended"; fi
    kill -KILL "-$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
    pid=
    lines=0
    if [ -f "$dir/drilled/samples.jsonl" ]; then lines=$(wc -l <"$dir/drilled/samples.jsonl"); fi
    echo "$kill: $met after $wait_ms ms, $lines lines in the log"
    kill=$(( kill + 1 ))
done

echo "last run"
"$LONGBIT" run "$experiment" --out "$dir/drilled" --quiet >/dev/null

# Columns that a clock or the operating system measures, and stamps; all others must repeat.
timings="run_id fill_ns decode_tok_s tpot_p50_ns tpot_p90_ns tpot_p99_ns tpot_p99_hi95_ns tpot_mean_ns tpot_mad_ns
tpot_min_ns tpot_max_ns tpot_p50_lo95_ns tpot_p50_hi95_ns drift_pct steady outliers achieved_gb_s probe_gb_s
roofline_fraction rss_peak_bytes user_ns sys_ns invol_switches major_faults steal_pct throttled_ms psi_cpu_pct khz_min
khz_max started_utc wall_ms"
exact() {
    awk -v timings="$(echo $timings)" '
        BEGIN { n = split(timings, t, " "); for (i = 1; i <= n; i++) drop[t[i]] = 1 }
        {
            # Fields by hand: quotes keep commas together, in any awk.
            line = $0; count = 0; field = ""; quoted = 0
            for (i = 1; i <= length(line); i++) {
                c = substr(line, i, 1)
                if (c == "\"") quoted = !quoted
                if (c == "," && !quoted) { f[++count] = field; field = "" } else field = field c
            }
            f[++count] = field
            if (NR == 1) for (i = 1; i <= count; i++) name[i] = f[i]
            text = ""
            for (i = 1; i <= count; i++) if (!(name[i] in drop)) text = text f[i] ","
            print text
        }' "$1/cells.csv"
}
exact "$dir/undisturbed" >"$dir/undisturbed.exact"
exact "$dir/drilled" >"$dir/drilled.exact"
if ! cmp -s "$dir/undisturbed.exact" "$dir/drilled.exact"; then
    echo "FAIL: the drilled run differs in more than timings"
    diff "$dir/undisturbed.exact" "$dir/drilled.exact" || true
    exit 1
fi
doubled=$(sed -n 's/.*"line":"sample".*"cell":"\([0-9a-f]*\)","rep":\([0-9]*\).*/\1 \2/p' "$dir/drilled/samples.jsonl" |
    sort | uniq -d)
if [ -n "$doubled" ]; then
    echo "FAIL: repetitions stand twice: $doubled"
    exit 1
fi
rows=$(( $(wc -l <"$dir/drilled.exact") - 1 ))
echo "ok: $rows cells, each once and equal in everything but timings"
