#!/bin/bash
# Runs the steps of the plan in a guest. Lines that begin with "kernels: " are for `cargo xtask kernels`.
. /mnt/plan
export NO_COLOR=1 SYSTEMD_COLORS=0 SYSTEMD_PAGER=cat HOME=/root
export REEVE=/mnt/reeve REEVE_PEER=/mnt/peer
mkdir -p /run/kernels
cd /run/kernels

load() { bash /mnt/load.sh; }
units() { bash /mnt/units.sh; }
datapath() { /mnt/datapath --test-threads 2 --nocapture $TESTS 2>&1; }
demo() { /mnt/xtask demo --daemon "$REEVE" --peer "$REEVE_PEER" 2>&1; }
e2e() { /mnt/e2e --test-threads 1 $END_TO_END 2>&1; }

echo "$(uname -r), $(systemctl --version | head -n 1), $(stat -f -c %T /sys/fs/cgroup), $(nproc) processors"
for step in $STEPS; do
    echo "── $step"
    begun=$SECONDS
    if "$step"; then result=held; else result=failed; fi
    echo "kernels: $result $step $((SECONDS - begun))"
done
[ -z "$KEEP" ] || systemctl start serial-getty@ttyS0
echo "kernels: done"
[ -n "$KEEP" ] || poweroff -f
