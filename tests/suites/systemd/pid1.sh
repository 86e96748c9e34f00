#!/bin/sh
# Becomes PID 1 of a small system: systemd with its journal, and one more unit. It runs in namespaces that its caller
# made: mount, pid and cgroup, and the network namespace of a gateway. What it writes is in memory and seen by nobody
# else, except /sys/fs/bpf and the directory of the configuration.
# Usage: pid1.sh UNITS CONFIGURATION PROGRAM
set -e
units=$1 configuration=$2 program=$3
mount --make-rprivate /
mount -t proc proc /proc
# Only settings of the network can be written: the others are this machine's.
mount --bind /proc/sys /proc/sys
mount --bind /proc/sys/net /proc/sys/net
mount -o remount,bind,ro /proc/sys

mount -t tmpfs -o mode=755 tmpfs /mnt
cd /mnt
mkdir -p bin cgroup dev/net dev/pts dev/shm etc/ecmpvpn etc/systemd/system run tmp var/tmp
chmod 1777 tmp var/tmp dev/shm
# A file system is not mounted on itself, but it is bound there: here its root is the group of this system.
mount -t cgroup2 cgroup2 cgroup
mount --bind cgroup /sys/fs/cgroup
for node in null zero full random urandom tty net/tun; do
    touch dev/$node
    mount --bind /dev/$node dev/$node
done
for file in passwd group nsswitch.conf hosts ld.so.cache; do
    cp /etc/$file etc/
done
echo 0123456789abcdef0123456789abcdef >etc/machine-id
printf '[Journal]\nStorage=volatile\n' >etc/systemd/journald.conf
mount --bind "$configuration" etc/ecmpvpn
touch bin/ecmpvpn
mount --bind "$program" bin/ecmpvpn
cp -r "$units"/. etc/systemd/system/
cp /lib/systemd/system/systemd-journald.service /lib/systemd/system/systemd-journald.socket etc/systemd/system/
# The units of a whole system would start all that is installed on this machine.
for target in sysinit sockets network-pre network-online multi-user shutdown; do
    printf '[Unit]\nDefaultDependencies=no\n' >etc/systemd/system/$target.target
done
printf '[Unit]\nDefaultDependencies=no\nRequires=%s\nAfter=%s\n' systemd-journald.socket systemd-journald.socket \
    >etc/systemd/system/basic.target
mount --rbind bin /usr/local/bin
for dir in dev etc run tmp var; do
    mount --rbind $dir /$dir
done
cd /
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_UNIT_PATH=/etc/systemd/system \
    /lib/systemd/systemd --system --unit=basic.target --log-target=journal
