#!/bin/busybox sh
# First process of a guest: loads what the disks need, and goes over to the root disk.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for module in /modules/*.ko; do $b insmod "$module"; done
tries=0
while [ ! -b /dev/vdb ] && [ $tries -lt 100 ]; do $b sleep 0.1; tries=$((tries + 1)); done
$b mount -t ext4 /dev/vda /root
$b mount -t ext4 -o ro /dev/vdb /root/mnt
release=$($b uname -r)
$b mkdir -p "/root/usr/lib/modules/$release"
$b mount --bind "/root/mnt/modules/$release" "/root/usr/lib/modules/$release"
$b umount /proc /sys
$b mount --move /dev /root/dev
exec $b switch_root /root /sbin/init
