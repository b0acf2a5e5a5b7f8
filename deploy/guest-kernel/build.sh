#!/usr/bin/env bash
# Builds the kernel that pods boot.
#
#   build.sh uml|kvm OUTDIR     leaves OUTDIR/kernel-uml, or OUTDIR/kernel-kvm
#                               (vmlinux, PVH) and OUTDIR/kernel-kvm.bzImage
#
# The source is the newest linux-source-N that Debian offers for this release,
# in backports, or in unstable. The mirror is the one this machine's apt uses;
# Debian's archive keys verify what comes from it.
#
# Patches in patches/MACHINE-*.patch mend what Debian's source lacks; each says
# why in its first lines. One for speed that no longer applies is left out and
# named, and so are those after it: the kernel works without, only slower. The
# one that seals the kernel's process has to apply: without it pods do not start.
#
# A build is kept under its source version, configuration, patches and this
# script, so the next one with the same copies files and asks no network. Set
# GUEST_KERNEL_REFRESH=1 to look for a newer source, GUEST_KERNEL_ONLY=config to
# stop once the configuration has been found to hold.
set -euo pipefail

# Older UML panics at its first process on CPUs with AMX.
readonly OLDEST_USABLE=6.16
readonly KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/drupe/guest-kernel

say() { printf 'guest-kernel: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

usage() { die "usage: build.sh uml|kvm OUTDIR"; }
[ $# -eq 2 ] || usage
machine=$1
outdir=$2
case $machine in
    uml) arch=um targets=(linux) ;;
    kvm) arch=x86_64 targets=(vmlinux bzImage) ;;
    *) usage ;;
esac
fragments=("$here/guest.config" "$here/$machine.config")
shopt -s nullglob
patches=("$here/patches/$machine"-*.patch)

# Name of the build that `source version` $1 gives: what it is made of, hashed.
build_key() {
    { printf '%s\n' "$1" "$machine"; cat "${fragments[@]}" "${patches[@]}" "$here/build.sh"; } | sha256sum | cut -c1-24
}

# Copies build $1 to where the caller wants it.
deliver() {
    mkdir -p "$outdir"
    local file
    for file in "$cache/$1"/kernel-*; do
        cmp -s "$file" "$outdir/${file##*/}" || install -m 0755 "$file" "$outdir/"
    done
    say "$machine: $(cat "$cache/$1/version") is in $outdir"
}

# apt with a state of its own: the machine's lists stay as they are.
private_apt() {
    local tool=$1
    shift
    "$tool" -q \
        -o Dir::State="$cache/apt/state" -o Dir::Cache="$cache/apt/cache" \
        -o Dir::Etc::sourcelist="$cache/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State::status=/dev/null -o APT::Sandbox::User=root \
        -o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
        -o Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false \
        -o Acquire::Retries=3 "$@"
}

# The URI this machine gets its own release from.
mirror() {
    local codename=$1 release target_codename component uri
    # shellcheck disable=SC2016 # apt expands the format
    while IFS='|' read -r release target_codename component uri; do
        if [ "$component" = main ] && { [ "$release" = "$codename" ] || [ "$target_codename" = "$codename" ]; }; then
            printf '%s\n' "$uri"
            return
        fi
    done < <(apt-get indextargets --format '$(RELEASE)|$(CODENAME)|$(COMPONENT)|$(REPO_URI)' 'Created-By: Packages')
    return 1
}

# Prints "package version" of the newest source on offer.
newest_source() {
    local codename uri suite
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
    [ -r "$KEYRING" ] || die "$KEYRING is missing: install debian-archive-keyring"
    uri=$(mirror "$codename") || die "no apt source of this machine offers $codename main"

    mkdir -p "$cache/apt/state/lists/partial" "$cache/apt/cache/archives/partial"
    # By codename: a mirror may serve an alias such as stable-backports stale.
    for suite in "$codename" "$codename-backports" trixie-backports sid; do
        printf 'deb [signed-by=%s] %s %s main\n' "$KEYRING" "$uri" "$suite"
    done | sort -u > "$cache/apt/sources.list"
    # Not every mirror has every suite: what counts is what could be read.
    private_apt apt-get update > "$cache/apt/update.log" 2>&1 || true

    local package found best='' best_version=''
    while read -r package; do
        dpkg --compare-versions "${package#linux-source-}" ge "$OLDEST_USABLE" || continue
        found=$(private_apt apt-cache madison "$package" | awk -F'|' '{ gsub(/ /, "", $2); print $2 }' | sort -rV | head -n 1)
        if [ -n "$found" ] && { [ -z "$best" ] || dpkg --compare-versions "$found" gt "$best_version"; }; then
            best=$package best_version=$found
        fi
    done < <(private_apt apt-cache --names-only search '^linux-source-[0-9.]+$' | awk '{ print $1 }')
    if [ -z "$best" ]; then
        cat "$cache/apt/update.log" >&2
        die "Debian offers no linux-source-N with N >= $OLDEST_USABLE that could be read"
    fi
    printf '%s %s\n' "$best" "$best_version"
}

# Fails unless every line of the fragments is what the kernel's .config says; a
# later fragment overrides an earlier one.
verify_config() {
    local config=$1 lost
    lost=$(awk -F= '
        FILENAME == ARGV[1] {
            if ($0 ~ /^CONFIG_/) { key = $1; sub(/^[^=]*=/, ""); have[key] = $0 }
            next
        }
        /^CONFIG_/ { key = $1; sub(/^[^=]*=/, ""); want[key] = $0 }
        END {
            for (key in want) {
                got = (key in have) ? have[key] : "n"
                if (got != want[key]) print "  " key "=" want[key] " became " got
            }
        }' "$config" "${fragments[@]}" | sort)
    [ -z "$lost" ] || die "$machine: these lines did not survive Kconfig's dependencies:"$'\n'"$lost"
}

# Runs make with the arguments after $1, its output in file $1, and says every
# few seconds how many files it has compiled.
make_with_progress() {
    local log=$1
    shift
    if ! make "$@" 2>&1 | tee "$log" | awk -v machine="$machine" -v every=15 '
        BEGIN { begun = last = systime() }
        /^  (CC|AS|HOSTCC) / { files++ }
        systime() - last >= every {
            last = systime()
            printf "guest-kernel: %s: %d files compiled, %d s\n", machine, files, last - begun
            fflush()
        }' >&2
    then
        grep -E 'error|Error|undefined' "$log" | tail -n 20 >&2
        tail -n 5 "$log" >&2
        die "$machine: make ${*: -1} failed"
    fi
}

# Puts the source package "$1 $2" into the cache, unless it is there.
fetch_source() {
    local package=$1 version=$2
    [ ! -s "$(deb_path "$package" "$version")" ] || return 0
    say "downloading $package $version"
    local fresh
    fresh=$(mktemp -d "$cache/apt/download.XXXXXX")
    (cd "$fresh" && private_apt apt-get download "$package=$version" > download.log 2>&1) ||
        { cat "$fresh/download.log" >&2; die "$package $version: download failed"; }
    # One source at a time: an older one is of no use once a newer one is here.
    rm -rf "$cache/source"
    mkdir -p "$cache/source"
    mv "$fresh"/*.deb "$(deb_path "$package" "$version")"
    rm -rf "$fresh"
}

deb_path() { printf '%s/source/%s_%s.deb' "$cache" "$1" "$2"; }

# Configures, and unless $3 is "config" builds, source "$1 $2" into $work/result.
build() {
    local package=$1 version=$2 only=$3 tree="$work/source" objects="$work/objects" begun=$SECONDS
    say "$machine: unpacking $package $version"
    mkdir -p "$tree" "$objects" "$work/result"
    dpkg-deb --fsys-tarfile "$(deb_path "$package" "$version")" |
        tar -xO --wildcards "./usr/src/$package.tar.*" | tar -xJ -C "$tree" --strip-components=1

    local file slower=''
    for file in "${patches[@]}"; do
        [ -z "$slower" ] || [[ $file == *-seal.patch ]] || continue
        if patch -d "$tree" -p1 -s -f --dry-run < "$file" > /dev/null; then
            patch -d "$tree" -p1 -s -f < "$file"
        elif [[ $file == *-seal.patch ]]; then
            die "$machine: ${file##*/} does not apply to $package $version, and a kernel without it runs no pods"
        else
            say "$machine: warning: ${file##*/} does not apply to $package $version: built without it and the others for speed"
            slower=yes
        fi
    done

    # SYSCTL was a choice called PROC_SYSCTL before 7.3.
    { cat "${fragments[@]}"; echo CONFIG_PROC_SYSCTL=y; } > "$work/fragments"
    # The same sources and configuration give the same bytes on any machine.
    export KBUILD_BUILD_USER=drupe KBUILD_BUILD_HOST=drupe KBUILD_BUILD_TIMESTAMP='1970-01-01 00:00:00 UTC'
    local flags=(-C "$tree" O="$objects" ARCH="$arch")
    KCONFIG_ALLCONFIG="$work/fragments" make_with_progress "$work/config.log" "${flags[@]}" allnoconfig
    verify_config "$objects/.config"
    if [ "$only" = config ]; then
        say "$machine: the configuration holds with $package $version"
        return
    fi

    say "$machine: building with $(nproc) jobs; takes minutes, once"
    make_with_progress "$work/build.log" "${flags[@]}" -j"$(nproc)" "${targets[@]}"
    if [ "$machine" = uml ]; then
        strip -o "$work/result/kernel-uml" "$objects/linux"
    else
        # The PVH entry is an ELF note, which strip keeps.
        strip -o "$work/result/kernel-kvm" "$objects/vmlinux"
        cp "$objects/arch/x86/boot/bzImage" "$work/result/kernel-kvm.bzImage"
    fi
    cp "$objects/.config" "$work/result/config-$machine"
    printf '%s\n' "$package $version" > "$work/result/version"
    say "$machine: built in $((SECONDS - begun)) s"
}

stamp="$cache/source-version"
if [ -z "${GUEST_KERNEL_REFRESH:-}" ] && [ -s "$stamp" ]; then
    key=$(build_key "$(cat "$stamp")")
    if [ -d "$cache/$key" ]; then
        deliver "$key"
        exit
    fi
fi

mkdir -p "$cache/apt"
exec 9> "$cache/lock"
flock 9
say "$machine: looking for the newest kernel source"
if ! source=$(newest_source); then
    # Offline with a source at hand is enough.
    read -r package version < "$stamp" 2> /dev/null && [ -s "$(deb_path "$package" "$version")" ] || exit 1
    source="$package $version"
    say "going on with $source, which is here"
fi
read -r package version <<< "$source"
key=$(build_key "$source")
if [ ! -d "$cache/$key" ]; then
    work=$(mktemp -d "$cache/build.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    fetch_source "$package" "$version"
    build "$package" "$version" "${GUEST_KERNEL_ONLY:-all}"
    [ "${GUEST_KERNEL_ONLY:-all}" != config ] || exit 0
    mv "$work/result" "$cache/$key"
fi
printf '%s\n' "$source" > "$stamp.new"
mv "$stamp.new" "$stamp"
deliver "$key"
