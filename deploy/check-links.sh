#!/usr/bin/env bash
# check-links.sh PAGE...: names the links of these Markdown pages to files and
# headings of this tree that do not exist. Headings are linked to as forges do.
set -euo pipefail

broken=0
for page in "$@"; do
    while IFS= read -r link; do
        file=${link%%#*}
        target=$page
        [ -z "$file" ] || target=$(dirname "$page")/$file
        if [ ! -e "$target" ]; then
            echo "$page: $link: there is no such file" >&2
            broken=1
        elif [ "$file" != "$link" ] && ! grep '^#' "$target" | tr '[:upper:]' '[:lower:]' |
            sed 's/^#* //; s/[^a-z0-9 _-]//g; s/ /-/g' | grep -qxF -- "${link#*#}"; then
            echo "$page: $link: there is no such heading" >&2
            broken=1
        fi
    done < <(grep -o '\](\([^)]*\))' "$page" | sed 's/^](//; s/)$//' | grep -v '^https\?:' || true)
done
exit "$broken"
