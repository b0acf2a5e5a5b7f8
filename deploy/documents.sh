#!/usr/bin/env bash
# documents.sh PROGRAM OUTDIR: pages for man and completions of shells, which
# the program prints.
set -euo pipefail

[ $# -eq 2 ] || { echo "usage: documents.sh PROGRAM OUTDIR" >&2; exit 2; }
program=$1
to=$2
mkdir -p "$to"
"$program" man > "$to/drupe.8"
# The page names the others.
while read -r command; do
    "$program" man "$command" > "$to/drupe-$command.8"
done < <(sed -n 's/^drupe\\-\([a-z]*\)(8)$/\1/p' "$to/drupe.8")
[ -e "$to/drupe-serve.8" ] || { echo "no page of a command was made" >&2; exit 1; }
"$program" completions bash > "$to/drupe.bash"
"$program" completions zsh > "$to/_drupe"
"$program" completions fish > "$to/drupe.fish"
