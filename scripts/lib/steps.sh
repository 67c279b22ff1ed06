# shellcheck shell=bash
# Steps that are all carried out, whatever became of the ones before, and counted.
# Source it after common.sh.
#
#   step NAME COMMAND…   run it; its output is shown and kept in target/NAME-OF-SCRIPT/
#   skip NAME WHY        say that it is not run
#   count_steps          print what was skipped and what failed, with the words it failed with
#
# $passed and $failed are the counts so far.

step_logs=$(target_dir)/${0##*/}
mkdir -p "$step_logs"
passed=0 failed=0 failures=() failed_logs=() skips=()

# Not to be used in a condition: `set -e` would be off in the command.
step() {
    local name=$1 log started=$SECONDS status ok bad
    log=$step_logs/${name// /-}.log
    shift
    printf '\n── %s\n' "$name"
    set +e
    (
        set -e
        "$@"
    ) </dev/null 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    set -e
    read -r ok bad < <(results <"$log")
    # A step that counts nothing counts for one. One may also fail beside what it
    # counted, as when a test program dies.
    ((ok + bad || status)) || ok=1
    ((bad || !status)) || bad=1
    ((bad == 0)) || status=1
    passed=$((passed + ok)) failed=$((failed + bad))
    ((status == 0)) || failures+=("$name ($log)") failed_logs+=("$log")
    printf '── %s: %s, %s s\n' "$name" "$( ((status)) && echo FAILED || echo ok)" $((SECONDS - started))
}

# Sums what test programs say: "test result: ok. 12 passed; 0 failed; …", and what
# scripts/check says: "check: 12 ok, 0 failed".
results() {
    sed -nE 's/.*test result: .* ([0-9]+) passed; ([0-9]+) failed;.*/\1 \2/p
        s/^[a-z]+: ([0-9]+) ok, ([0-9]+) failed.*/\1 \2/p' |
        awk '{ ok += $1; bad += $2 } END { print ok + 0, bad + 0 }'
}

skip() {
    skips+=("$1: $2")
    printf '\n── %s: skipped: %s\n' "$1" "$2"
}

count_steps() {
    local line
    printf '\n'
    for line in "${skips[@]}"; do printf 'skipped: %s\n' "$line"; done
    # Where only the end of the output is kept, this is the end.
    for line in "${failed_logs[@]}"; do
        printf '\nfrom %s:\n' "$line"
        grep -E -A 8 'panicked at|^error|FAILED|failed:' "$line" | tail -n 60 || true
    done
    for line in "${failures[@]}"; do printf 'FAILED: %s\n' "$line"; done
}
