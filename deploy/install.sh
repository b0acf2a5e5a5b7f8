#!/usr/bin/env bash
# install.sh install|uninstall: what `make build` and `make setup` made, onto
# the node. DESTDIR is put before every path, for who makes a package; PREFIX
# is /usr unless said otherwise. What the node's operator may have changed, and
# what pods have left, is never touched: /etc/drupe, /var/lib/drupe.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=$here/../out
prefix=${PREFIX:-/usr}
to=${DESTDIR:-}$prefix
lib=$to/lib/drupe
unit=$to/lib/systemd/system/drupe.service
config=${DESTDIR:-}/etc/drupe/config.yaml
bash_completion=$to/share/bash-completion/completions/drupe
zsh_completion=$to/share/zsh/site-functions/_drupe
fish_completion=$to/share/fish/vendor_completions.d/drupe.fish

# Where the prefix is another, so is what refers to it.
relocated() {
    sed -e "s|/usr/lib/drupe/|$prefix/lib/drupe/|" -e "s|/usr/bin/drupe|$prefix/bin/drupe|" "$1"
}

# What is made of the program while it is installed.
documents=$(mktemp -d)
trap 'rm -rf "$documents"' EXIT

install_all() {
    local file
    for file in bin/drupe bin/drupe-{vmm,shim,unpacker} guest/initramfs guest/kernel-kvm guest/kernel-uml; do
        [ -e "$out/$file" ] || { echo "out/$file is missing: run \`make setup build\`" >&2; exit 1; }
    done
    "$here/documents.sh" "$out/bin/drupe" "$documents"
    "$out/bin/drupe" config > "$documents/config.yaml"
    relocated "$documents/config.yaml" > "$documents/config"
    relocated "$here/systemd/drupe.service" > "$documents/unit"

    install -D -m 755 -t "$to/bin" "$out/bin/drupe"
    install -D -m 755 -t "$lib" "$out"/bin/drupe-{vmm,shim,unpacker} "$out"/guest/kernel-{kvm,uml}
    install -D -m 644 -t "$lib" "$out/guest/initramfs"
    install -D -m 644 "$documents/unit" "$unit"
    install -D -m 644 -t "$to/share/man/man8" "$documents"/*.8
    install -D -m 644 "$documents/drupe.bash" "$bash_completion"
    install -D -m 644 "$documents/_drupe" "$zsh_completion"
    install -D -m 644 "$documents/drupe.fish" "$fish_completion"
    install -D -m 644 -t "$to/share/doc/drupe" "$here/systemd/crictl.yaml"
    if [ -e "$config" ]; then
        echo "$config is kept as it is; \`drupe config\` prints the defaults"
    else
        install -D -m 644 "$documents/config" "$config"
    fi
}

uninstall_all() {
    rm -f "$to/bin/drupe" "$unit" "$bash_completion" "$zsh_completion" "$fish_completion"
    rm -f "$to/share/man/man8/drupe.8" "$to"/share/man/man8/drupe-*.8
    rm -rf "$lib" "$to/share/doc/drupe"
    echo "kept: ${DESTDIR:-}/etc/drupe and ${DESTDIR:-}/var/lib/drupe"
}

case "${1:-}" in
    install) install_all ;;
    uninstall) uninstall_all ;;
    *) echo "usage: install.sh install|uninstall" >&2; exit 2 ;;
esac
