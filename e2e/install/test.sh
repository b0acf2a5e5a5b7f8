#!/usr/bin/env bash
# Runs the tests of installing that the arguments name, or all.
set -euo pipefail

cd "$(dirname "$0")"
[ $# -gt 0 ] || set -- package daemonset
for name in "$@"; do
    echo "test $name"
    "./$name.sh"
done
