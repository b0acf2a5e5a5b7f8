# shellcheck shell=bash
# What a system in namespaces of its own is given of this machine, for scripts
# that source this.

# The directories of the control group $1 in every hierarchy.
groups_of() {
    awk '$3 ~ /^cgroup2?$/ { print $2 }' /proc/self/mounts | sed "s|\$|/$1|"
}

# Makes the control group $1 in every hierarchy, and the calling shell a member.
join_group() {
    local group
    while read -r group; do
        mkdir "$group"
        if [ -e "$group/cpuset.mems" ] && [ ! -e "$group/cgroup.controllers" ]; then
            cat "${group%/*}/cpuset.cpus" > "$group/cpuset.cpus"
            cat "${group%/*}/cpuset.mems" > "$group/cpuset.mems"
            echo 1 > "$group/cgroup.clone_children"
        fi
        echo "$BASHPID" > "$group/cgroup.procs"
    done < <(groups_of "$1")
}

# Removes the control group $1 with what is below it, whose processes have ended.
remove_group() {
    local group
    while read -r group; do
        [ ! -d "$group" ] || find "$group" -depth -type d -exec rmdir {} \;
    done < <(groups_of "$1")
}

# Mounts the hierarchies of this machine in directory $1, each from the calling
# process's own group on.
mount_groups() {
    local controllers dir type options
    if grep -qv '^0:' /proc/self/cgroup; then
        mount -t tmpfs -o mode=755 cgroup "$1"
        while IFS=: read -r _ controllers _; do
            case $controllers in
                '') dir=unified type=cgroup2 options=rw ;;
                name=*) dir=${controllers#name=} type=cgroup options=none,$controllers ;;
                *) dir=$controllers type=cgroup options=$controllers ;;
            esac
            mkdir "$1/$dir"
            mount -t "$type" -o "$options" cgroup "$1/$dir"
        done < /proc/self/cgroup
    else
        mount -t cgroup2 cgroup2 "$1"
    fi
}

# Makes directory $1, which is a mount, the root of the calling process.
enter_root() {
    cd "$1" || return
    mkdir -p mnt/old
    pivot_root . mnt/old
    cd /
    umount -l /mnt/old
    rmdir /mnt/old
    # As on a machine: mounts travel to services and pods.
    mount --make-rshared /
}

# apt's own sources of this machine, where they are of Debian's suite $1; else
# the default.
debian_sources() {
    local file
    for file in /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list; do
        if [ -s "$file" ] && grep -q "$1" "$file"; then
            cat "$file"
            return
        fi
    done
    echo "deb http://deb.debian.org/debian $1 main"
}

# The name of the link, and of the table of rules, of the fresh machine $1.
network_of() { printf 'fresh%s' "${1##*.}"; }
