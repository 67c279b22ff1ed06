# shellcheck shell=bash
# QEMU's own image tests ("iotests"), unmodified, with `ballast disk io` as their qemu-io, or the
# other verbs of `ballast disk` as their qemu-img. Sourced by scripts/soak, after common.sh.
#
#   fetch_iotests DIR              fetch and unpack the tests of the QEMU that is installed
#   iotests DIR PROGRAM TOOL ARGS… run them, with `check`'s arguments; what passes with TOOL (qemu-io
#                                  or qemu-img) has to pass with PROGRAM in its place, but for what
#                                  iotests-differences-TOOL lists
#
# The tests are not ours (GPL), and not kept: they come with QEMU's source package, through apt.

: "${ballast_scripts:?common.sh comes first}"

# Source packages come from where the packages do; this machine need not have them configured.
fetch_iotests() {
    local into=$1 apt=$1/apt file version options
    [[ ! -x $into/tests/qemu-iotests/check ]] || return 0
    version=$(dpkg-query -W -f '${source:Version}' qemu-utils)
    say "fetching the source of QEMU $version"
    rm -rf "$into"
    mkdir -p "$apt/lists/partial" "$apt/parts"
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
        [[ ! -f $file ]] ||
            sed -E 's/^deb([[:space:]])/deb-src\1/; s/^Types:.*/Types: deb-src/' "$file" \
                >"$apt/parts/${file##*/}"
    done
    options=(-o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$apt/parts"
        -o Dir::State::Lists="$apt/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
    # A source that can't be had may not be that of QEMU.
    quiet_apt "${options[@]}" update || say "not all package lists could be had"
    (cd "$apt" && quiet_apt "${options[@]}" source --download-only "qemu=$version" >/dev/null) ||
        die "could not fetch the source of QEMU $version"
    tar -C "$into" --strip-components 1 --wildcards -xf "$(ls "$apt"/qemu_*.orig.tar.*z)" \
        '*/tests/qemu-iotests' '*/python' ||
        die "the source of QEMU $version is not what it was"
    rm -rf "$apt"
}

# iotest DIR IMG IO TEST ARGS… runs one and prints how it went: pass, fail, skip or late. What it
# said is in DIR/log. There is no system emulator for it: tests that want one fail with qemu-io too.
iotest() {
    local dir=$1 img=$2 io=$3 test=$4 log=$1/log
    shift 4
    rm -rf "$dir/run"
    mkdir -p "$dir/run"
    (
        cd "$dir/tests/qemu-iotests"
        export TEST_DIR=$dir/run SOCK_DIR=$dir/run QEMU_IO_PROG=$io
        export QEMU_IMG_PROG=$img QEMU_NBD_PROG=/usr/bin/qemu-nbd
        export QEMU_PROG=/usr/bin/true QSD_PROG=/usr/bin/true
        timeout -k 5 "${BALLAST_IOTEST_SECONDS:-120}" python3 check -tap "$@" "$test" </dev/null
    ) >"$log" 2>&1 || true
    if grep -q '^not ok' "$log"; then
        echo fail
    elif grep -q '# SKIP' "$log"; then
        echo skip
    elif grep -q '^ok' "$log"; then
        echo pass
    else
        echo late
    fi
}

# Sets $same, $differ, $calls and $handed_over; ends where something differs that is not listed.
iotests() {
    local dir=$1 program=$2 tool=$3 test how failed=() before lib=$ballast_scripts/lib
    local stock=(/usr/bin/qemu-img /usr/bin/qemu-io) ours differences=$lib/iotests-differences-$3
    shift 3
    case $tool in
        qemu-img) ours=("$lib/as-qemu-img" /usr/bin/qemu-io) ;;
        qemu-io) ours=(/usr/bin/qemu-img "$lib/as-qemu-io") ;;
    esac
    export BALLAST=$program BALLAST_CALLS=$dir/calls
    : >"$BALLAST_CALLS"
    same=0 differ=0
    for test in $(cd "$dir/tests/qemu-iotests" && iotests_with "$tool"); do
        before=$(calls_of ballast)
        how=$(iotest "$dir" "${ours[@]}" "$test" "$@")
        # One that is about nothing but what is refused says nothing.
        (($(calls_of ballast) > before)) || how=skip
        case $how in
            pass) same=$((same + 1)) ;;
            skip) ;;
            *)
                mv "$dir/log" "$dir/log.ballast"
                [[ $(iotest "$dir" "${stock[@]}" "$test" "$@") == pass ]] || continue
                if grep -qE "^$test " "$differences"; then
                    differ=$((differ + 1))
                else
                    failed+=("$test")
                    grep -v '^#' "$dir/log.ballast" >&2 || true
                fi
                ;;
        esac
    done
    handed_over=$(calls_of "$tool")
    calls=$((handed_over + $(calls_of ballast)))
    say "check $*: $same as with $tool, $differ differ as listed, ${#failed[@]} differ otherwise;" \
        "$handed_over of $calls calls were $tool's own"
    ((same > 0)) || die "no test ran: $(tail -n 3 "$dir/log")"
    ((${#failed[@]} == 0)) || die "check $* ${failed[*]}: not as with $tool"
}

calls_of() { grep -cx "$1" "$BALLAST_CALLS" || true; }

# Those that are shell scripts and use it. Of qemu-img's, those that need a server or an emulator as
# well are left out: of images they do no more than make some.
iotests_with() {
    local test uses='QEMU_IO|io_(pattern|zero|test)' not='none of them'
    if [[ $1 == qemu-img ]]; then
        uses='QEMU_IMG|_make_test_img|_img_info|_check_test_img'
        not='_launch_qemu|_require_qemu|[$]QEMU |QSD|run_qemu|QEMU_NBD|nbd_server|qemu-nbd'
    fi
    for test in [0-9][0-9][0-9] tests/*; do
        if [[ $(head -n 1 "$test") == *bash* ]] && grep -qE "$uses" "$test" &&
            ! grep -qE "$not" "$test"; then
            echo "$test"
        fi
    done
}
