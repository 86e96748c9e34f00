#!/bin/sh
# PID 1 of the virtual machine. Mounts what a normal system has, runs /vm/command, reports on the control port, powers
# off. The command's output goes through its own port, so no kernel message ever mixes with it.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/usr/lib/applets HOME=/root TERM=vt220 LANG=C.UTF-8

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
mkdir -p /run/netns
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr

# Ports appear when the virtio drivers have probed. Everything else is loaded by the kernel itself on first use, except
# tun, whose device node exists only once it is loaded.
echo /usr/bin/modprobe >/proc/sys/kernel/modprobe
modprobe -a virtio_pci virtio_console tun
tries=0
control= out=
while [ -z "$control" ] || [ -z "$out" ]; do
    for name in /sys/class/virtio-ports/*/name; do
        [ -r "$name" ] || continue
        port=${name%/name}
        case "$(cat "$name")" in
            control) control=/dev/${port##*/} ;;
            out) out=/dev/${port##*/} ;;
        esac
    done
    [ -e /dev/hvc0 ] && grep -q vm.interactive /proc/cmdline && out=/dev/hvc0
    tries=$((tries + 1))
    [ $tries -gt 200 ] && { echo "vm: no control port"; poweroff -f; }
    [ -n "$control" ] && [ -n "$out" ] || sleep 0.05
done
exec 3>"$control"

ip link set lo up
hostname vm
ulimit -l unlimited
ulimit -n 65536

cd /root
echo "@NONCE@ start" >&3
if [ "$out" = /dev/hvc0 ]; then
    stty -F /dev/hvc0 sane rows "@ROWS@" cols "@COLUMNS@"
    setsid -c sh /vm/command </dev/hvc0 >/dev/hvc0 2>&1 3>&-
    status=$?
else
    # A pipe in between, since a port can be opened only once and programs do open /dev/stdout.
    mkfifo /run/out
    cat </run/out >"$out" 3>&- &
    writer=$!
    sh /vm/command </dev/null >/run/out 2>&1 3>&-
    status=$?
    # What the command left running holds the pipe open: end it, then everything written has been sent.
    for process in /proc/[0-9]*; do
        pid=${process#/proc/}
        [ "$pid" = 1 ] || [ "$pid" = "$writer" ] || [ ! -e "$process/exe" ] || kill -9 "$pid" 2>/dev/null
    done
    wait "$writer"
fi
echo "@NONCE@ exit $status" >&3
poweroff -f
