#!/bin/sh
# PID 1 of the simulation. Its root is the host's, read only; what a system writes to is in memory. Runs /run/sim/command
# and leaves its exit status in /run/sim/status: /run/sim is the run's directory on the host.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM="${TERM:-dumb}" LANG=C.UTF-8

mount -t proc proc /proc
mount -t sysfs sysfs /sys
[ -e /dev/null ] || mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
for dir in /dev/shm /run /tmp /root /var/tmp; do
    mount -t tmpfs tmpfs $dir
done
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /run/netns /run/sim
mount -t hostfs -o /proc/self/cwd none /run/sim
# What the command needs of the host where the above has covered it.
while read -r dir; do
    [ -d "$dir" ] || { mkdir -p "$dir" && mount -t hostfs -o ro,"$dir" none "$dir"; }
done </run/sim/needed
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr

ip link set lo up
hostname sim
ulimit -l unlimited
ulimit -n 65536

if grep -q -w sim.interactive /proc/cmdline; then
    setsid -c sh /run/sim/command </dev/tty0 >/dev/tty0 2>&1
    status=$?
else
    stty -F /dev/ttyS0 raw
    # A pipe in between, since programs treat a terminal unlike anything else.
    mkfifo /run/out
    cat </run/out >/dev/ttyS0 &
    writer=$!
    sh /run/sim/command </dev/null >/run/out 2>&1
    status=$?
    # What the command left running holds the pipe open: end it, then everything written has arrived.
    for process in /proc/[0-9]*; do
        pid=${process#/proc/}
        [ "$pid" = 1 ] || [ "$pid" = "$writer" ] || [ ! -e "$process/exe" ] || kill -9 "$pid" 2>/dev/null
    done
    wait "$writer"
fi
echo "$status" >/run/sim/status
exec busybox poweroff -f
