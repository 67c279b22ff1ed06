# shellcheck shell=bash
# What guest and lab host have in common: a stock kernel, and an initramfs made of
# busybox and that kernel's modules. Source it after common.sh.

# fetch_kernel DIR META… unpacks a stock kernel and leaves
#   DIR/vmlinuz    the bzImage as the distribution ships it
#   DIR/vmlinux    the ELF inside it
#   DIR/release    its version, as `uname -r` says it
#   DIR/lib/modules/RELEASE
# Ubuntu keeps the modules in packages of their own.
fetch_kernel() {
    local into=$1 image release package packages
    shift
    image=$(newest_kernel "$@")
    release=${image#linux-image-}
    packages=("$image")
    for package in "linux-modules-$release" "linux-modules-extra-$release"; do
        if apt-cache show "$package" >/dev/null 2>&1; then packages+=("$package"); fi
    done
    say "fetching ${packages[*]}"
    fetch_packages "$into" "${packages[@]}"
    if [[ ! -d $into/lib/modules && -d $into/usr/lib/modules ]]; then
        mkdir -p "$into/lib"
        mv "$into/usr/lib/modules" "$into/lib/modules"
    fi
    mv "$into/boot/vmlinuz-$release" "$into/vmlinuz"
    chmod 644 "$into/vmlinuz"
    extract_vmlinux "$into/vmlinuz" "$into/vmlinux"
    printf '%s\n' "$release" >"$into/release"
    rm -rf "${into:?}"/{boot,usr}
    # These link to a source tree that is not here.
    rm -f "$into/lib/modules/$release/build" "$into/lib/modules/$release/source"
    depmod -b "$into" "$release"
}

# A little-endian 32-bit field of a file.
u32_at() { od -An -tu4 -j "$2" -N 4 "$1" | tr -d ' '; }

# Linux x86 boot protocol: setup_sects at 0x1f1 says where the protected-mode code
# begins; payload_offset (0x248) and payload_length (0x24c) where in it the
# compressed ELF is. Debian compresses the cloud kernel with lz4, others
# differently. The unpackers complain of the four bytes of size that follow the
# stream, so the result is judged instead of their exit status.
extract_vmlinux() {
    local setup_sects payload_at payload_length unpack
    setup_sects=$(od -An -tu1 -j $((0x1f1)) -N 1 "$1")
    payload_at=$(((setup_sects + 1) * 512 + $(u32_at "$1" $((0x248)))))
    payload_length=$(u32_at "$1" $((0x24c)))
    case $(od -An -tx1 -j "$payload_at" -N 4 "$1" | tr -d ' ') in
    02214c18) need lz4 && unpack=(lz4 -dc) ;;
    fd377a58) need xz-utils && unpack=(xz -dc) ;;
    28b52ffd) need zstd && unpack=(zstd -dc) ;;
    1f8b*) unpack=(gzip -dc) ;;
    *) die "$1: its kernel is compressed in a way unknown here" ;;
    esac
    tail -c +$((payload_at + 1)) "$1" | head -c "$payload_length" |
        "${unpack[@]}" >"$2" 2>/dev/null || true
    [[ $(head -c 4 "$2" | od -An -c | tr -d ' ') == '177ELF' ]] ||
        die "$1: what came out is not an ELF"
    # An ELF note of owner "Xen" and type 18 (XEN_ELFNOTE_PHYS32_ENTRY): PVH.
    LC_ALL=C grep -qaP '\x04\0\0\0[\x04\x08]\0\0\0\x12\0\0\0Xen\0' "$2" ||
        say "note: this vmlinux has no PVH entry point"
}

# initramfs_tree TREE lays out the folders and a static busybox with all its
# names. The package is only unpacked: installing it could remove `busybox`.
initramfs_tree() {
    local tree=$1 name
    mkdir -p "$tree"/{bin,dev,etc,proc,root,run,sys,tmp}
    ln -s bin "$tree/sbin"
    mkdir "$tree/usr"
    ln -s ../bin "$tree/usr/bin"
    ln -s ../bin "$tree/usr/sbin"
    fetch_packages "$tree.busybox" busybox-static
    find "$tree.busybox" -name busybox -type f -perm -u+x -exec cp {} "$tree/bin/busybox" \;
    rm -rf "$tree.busybox"
    for name in $("$tree/bin/busybox" --list); do
        [[ $name == busybox ]] || ln -s busybox "$tree/bin/$name"
    done
}

# initramfs_modules TREE KERNEL NAME… copies modules and what they depend on. A
# name the kernel has built in, or does not know, is left out: which ones are
# modules differs between distributions.
initramfs_modules() {
    local tree=$1 kernel=$2 release name kind file copy
    release=$(<"$kernel/release")
    shift 2
    for name; do
        # shellcheck disable=SC2034 # "kind" is insmod or builtin
        while read -r kind file _; do
            [[ $kind == insmod ]] || continue
            copy=$tree${file#"$kernel"}
            copy=${copy%.xz}
            copy=${copy%.zst}
            mkdir -p "${copy%/*}"
            case $file in # busybox reads only plain modules
            *.xz) need xz-utils && xz -dc "$file" >"$copy" ;;
            *.zst) need zstd && zstd -qdc "$file" >"$copy" ;;
            *) cp "$file" "$copy" ;;
            esac
        done < <(modprobe -d "$kernel" -S "$release" --ignore-install --show-depends "$name" 2>/dev/null)
    done
    cp "$kernel/lib/modules/$release"/modules.{order,builtin*} "$tree/lib/modules/$release/"
    depmod -b "$tree" "$release"
    # Busybox reads the text tables, kmod the .bin twins.
    rm -f "$tree/lib/modules/$release"/modules.{*.bin,order,builtin*,devname,softdep,symbols}
}

# initramfs_program TREE PROGRAM… copies programs of this machine with the
# libraries they load.
initramfs_program() {
    local tree=$1 program library
    shift
    for program; do
        program=$(command -v "$program")
        rm -f "$tree/bin/${program##*/}" # busybox may have a link of that name
        cp -L "$program" "$tree/bin/"
        while read -r library; do
            mkdir -p "$tree${library%/*}"
            cp -nL "$library" "$tree$library"
        done < <(ldd "$program" | grep -o '/[^ ]*')
    done
}

# initramfs_pack TREE FILE. Not compressed: at these sizes a guest is ready sooner
# when its kernel has nothing to unpack.
initramfs_pack() {
    (cd "$1" && find . -print0 | LC_ALL=C sort -z |
        cpio --quiet --null -o -H newc -R 0:0 --reproducible) >"$2"
}
