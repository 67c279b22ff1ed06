# shellcheck shell=bash
# Functions every script here shares. Source it; it runs nothing by itself.
#
#   say TEXT…              progress, on stderr (stdout stays free for results)
#   die TEXT…              the same, then exit 1
#   repo_root              the top folder of this checkout
#   cache_dir              where guest artifacts live ($BALLAST_CACHE, or target/guest)
#   lab_dir                where the lab host's kernel lives
#   target_dir             where cargo puts what it builds
#   need_cargo             end unless Rust can be built here; a linker is installed
#   need PACKAGE…          install Debian/Ubuntu packages that are missing
#   fetch_packages DIR P…  download and unpack packages without installing them
#   newest_kernel META…    the kernel package the first known META package points to
#   have_hw_kvm            true when /dev/kvm can run an unmodified guest kernel
#   in_lab_or_here CMD…    run CMD here with hardware KVM, in the lab host without

ballast_scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
    say "$@"
    exit 1
}

repo_root() { dirname "$ballast_scripts"; }

cache_dir() { printf '%s\n' "${BALLAST_CACHE:-$(repo_root)/target/guest}"; }

lab_dir() { printf '%s\n' "${BALLAST_CACHE:-$(repo_root)/target}/lab"; }

target_dir() { printf '%s\n' "${CARGO_TARGET_DIR:-$(repo_root)/target}"; }

# rustc links with the C compiler, which a toolchain from rustup does not bring.
need_cargo() {
    command -v cargo >/dev/null || die "needs a Rust toolchain: see https://rustup.rs"
    command -v cc >/dev/null || need gcc libc6-dev
}

# apt, unable to ask anything: no terminal, no debconf, no restart prompts.
# Recommends are left out: QEMU alone would pull in a desktop's worth of them.
# It waits for another apt to finish, for parallel scripts on a fresh machine.
quiet_apt() {
    DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get -qq \
        -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 -o APT::Sandbox::User=root \
        -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold \
        --no-install-recommends "$@" </dev/null
}

# Tries a command that needs apt's package lists; refreshes the lists and tries
# again only when that fails, so a prepared machine never waits for an update.
with_package_lists() {
    local log
    "$@" >/dev/null 2>&1 && return
    log=$(mktemp)
    if { quiet_apt update && "$@"; } >"$log" 2>&1; then
        rm -f "$log"
        return
    fi
    tail -n 20 "$log" >&2
    rm -f "$log"
    return 1
}

need() {
    local package missing=()
    for package; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] ||
            missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    say "installing ${missing[*]}"
    ((EUID == 0)) || die "run as root, or install by hand: ${missing[*]}"
    with_package_lists quiet_apt install -y "${missing[@]}" ||
        die "could not install ${missing[*]}"
}

# The lists may name a version the mirror has already replaced; the refresh in
# with_package_lists covers that case too.
fetch_packages() {
    local into=$1 downloads file
    shift
    downloads=$(mktemp -d "$into.deb.XXXXXX")
    (cd "$downloads" && with_package_lists quiet_apt download "$@") ||
        die "could not download $*"
    mkdir -p "$into"
    for file in "$downloads"/*.deb; do dpkg -x "$file" "$into"; done
    rm -rf "$downloads"
}

# Debian and Ubuntu name their kernels differently, so the caller lists candidates,
# best first.
newest_kernel() {
    with_package_lists any_kernel "$@" || die "no kernel package among: $*"
    any_kernel "$@"
}

# A meta package says nothing itself: among what it depends on is one with a
# version in its name.
any_kernel() {
    local meta found
    for meta; do
        found=$(apt-cache depends --important --recurse "$meta" 2>/dev/null |
            awk '/^linux-image-[0-9]/ && !found++')
        [[ $found ]] || continue
        printf '%s\n' "$found"
        return
    done
    return 1
}

# Without svm or vmx, /dev/kvm may still exist (a software KVM), but it emulates
# guest kernels so incompletely that stock ones die early.
have_hw_kvm() {
    [[ -r /dev/kvm && -w /dev/kvm ]] && grep -qwE 'svm|vmx' /proc/cpuinfo
}

# Inside the lab have_hw_kvm is true, so nested use never starts a second lab.
in_lab_or_here() {
    if have_hw_kvm; then
        say "hardware KVM: running here"
        "$@"
    else
        say "no hardware KVM: running in the lab host"
        "$ballast_scripts/lab" -- "$@"
    fi
}
